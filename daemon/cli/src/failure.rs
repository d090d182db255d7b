//! How errors end the program: one line on stderr, and an exit code.

use std::process::ExitCode;

use blocklora_service::plugins::words::shown;

use crate::daemon::watch;
use crate::interrupt;

/// An error in how the command was called; exits with 2 like a usage error found by the parser.
#[derive(Debug)]
pub struct Usage(pub String);

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// The user pressed Ctrl-C; the text says what was kept and how to go on, if anything was.
#[derive(Debug)]
pub struct Interrupted(pub String);

impl std::fmt::Display for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.0.is_empty() { f.write_str("interrupted") } else { write!(f, "interrupted: {}", self.0) }
    }
}

impl std::error::Error for Interrupted {}

/// No daemon could be reached or started; exits with 3.
#[derive(Debug)]
pub struct NoDaemon(pub String);

impl std::fmt::Display for NoDaemon {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "no daemon: {}", self.0)
    }
}

impl std::error::Error for NoDaemon {}

/// Fails with exit code 2.
pub fn usage<T>(reason: impl Into<String>) -> anyhow::Result<T> {
    Err(Usage(reason.into()).into())
}

/// What the argument parser has to say: help and version are printed, anything else is an error in one line.
pub fn of_parser(error: &clap::Error) -> anyhow::Result<()> {
    use clap::error::ErrorKind as Kind;
    if let Kind::DisplayHelp | Kind::DisplayVersion | Kind::DisplayHelpOnMissingArgumentOrSubcommand = error.kind() {
        error.print()?;
        // Help that nobody asked for: the command was called without arguments.
        return if error.exit_code() == 0 { Ok(()) } else { usage("a command is missing; they are listed above") };
    }
    // "error: what is wrong", hints, "Usage: ...", "For more information, try '--help'.": all but the last two count.
    let text = error.render().to_string();
    let reason = text.split("\nUsage:").next().unwrap_or_default().replace("For more information, try '--help'.", "");
    let reason = one_line(reason.trim().trim_start_matches("error: "));
    usage(format!("{reason} (--help explains all options)"))
}

/// Prints `error` as one line and gives the exit code for it.
pub fn report(error: &anyhow::Error) -> ExitCode {
    if is_broken_pipe(error) {
        return ExitCode::SUCCESS;
    }
    let line = line_of(error);
    let cancelled =
        matches!(error.downcast_ref(), Some(blocklora_engine::Error::Cancelled)) || watch::is_cancelled(error);
    // A job that somebody else cancelled has failed.
    let cancelled = cancelled && interrupt::requested();
    if cancelled || error.is::<Interrupted>() {
        eprintln!("blocklora: {}", if cancelled { "interrupted" } else { &line });
        return ExitCode::from(130);
    }
    eprintln!("blocklora: error: {line}");
    ExitCode::from(if error.is::<Usage>() {
        2
    } else if error.is::<NoDaemon>() {
        3
    } else {
        1
    })
}

/// `text` with every run of white space that contains a line break made one space, and safe for a terminal: errors quote
/// files and other programs.
fn one_line(text: &str) -> String {
    shown(&text.lines().map(str::trim).filter(|l| !l.is_empty()).collect::<Vec<_>>().join(" "))
}

/// The error with its causes, each said once, and what to do where the system says no more than what failed.
fn line_of(error: &anyhow::Error) -> String {
    use std::io::ErrorKind as Kind;
    let mut line = String::new();
    for cause in error.chain() {
        let text = one_line(&cause.to_string());
        // Our own errors quote their cause.
        if !line.contains(&text) {
            line += if line.is_empty() { "" } else { ": " };
            line += &text;
        }
    }
    if line.contains("the library has no adapter") {
        return format!("{line}: `blocklora adapters list` shows those that are there");
    }
    // Daemon and plugins speak of settings; here this one has an option.
    let line = line.replace("clash = \"mean\"", "--on-clash mean");
    let io = error.chain().find_map(|cause| cause.downcast_ref::<std::io::Error>());
    let cure = match io.map(std::io::Error::kind) {
        Some(Kind::StorageFull | Kind::QuotaExceeded) => "free some space or choose another disk; nothing was kept",
        Some(Kind::FileTooLarge) => "raise the limit on file sizes or choose another disk; nothing was kept",
        Some(Kind::PermissionDenied | Kind::ReadOnlyFilesystem) => "choose a place that you may read and write",
        Some(Kind::NotFound) => "check the name",
        _ => return line,
    };
    format!("{line}: {cure}")
}

/// Whoever read our output (`head`, a pager) has seen enough; that is no error.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let io = error.downcast_ref::<std::io::Error>();
    io.is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::{line_of, one_line};

    #[test]
    fn errors_are_one_line() {
        assert_eq!(one_line("a: b\n  at c\n\n d"), "a: b at c d");
        assert_eq!(one_line("made for \u{202e}1-ds\u{1b}[2J"), "made for \\u{202e}1-ds\\u{1b}[2J");
    }

    #[test]
    fn a_cause_is_said_once_and_with_its_cure() {
        let cause = || std::io::Error::from(std::io::ErrorKind::StorageFull);
        let engine: anyhow::Error = blocklora_engine::Error::io("x.png", cause()).into();
        assert_eq!(
            line_of(&engine.context("drawing")),
            "drawing: x.png: no storage space: free some space or choose another disk; nothing was kept"
        );
        let plain = Err::<(), _>(cause()).context("x.png").map_err(|e| line_of(&e));
        assert_eq!(
            plain,
            Err("x.png: no storage space: free some space or choose another disk; nothing was kept".into())
        );
    }
}
