//! The command `blocklora-check`: the conformance tests of a plugin, without the daemon. `blocklora plugin check` is the
//! same.

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use blocklora_check::{Level, Options, check, new_plugin, run_one};
use blocklora_sdk::manifest::PluginKind;

const USAGE: &str = "\
usage: blocklora-check FILE [--level 0..3] [--test NAME]... [--reproduce SEED] [--limit SECONDS] [--json]
       blocklora-check --list
       blocklora-check new ID --kind merge|sample|train [--sdk FOLDER]";
const ONE: &str = "__one";

struct Arguments {
    file: OsString,
    level: Level,
    only: Vec<String>,
    seed: u64,
    limit: Duration,
    json: bool,
}

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    match arguments.first() {
        Some(first) if first == ONE => return ExitCode::from(run_one(&arguments[1..])),
        Some(first) if first == "new" => return new(&arguments[1..]),
        Some(first) if first == "--list" => {
            for (name, level, what) in blocklora_check::list() {
                println!("{} {name:<22} {what}", level.number());
            }
            return ExitCode::SUCCESS;
        }
        _ => {}
    }
    let (arguments, program) = match (parse(&arguments), std::env::current_exe()) {
        (Ok(arguments), Ok(program)) => (arguments, program),
        (Err(e), _) => return fail(&format!("{e}\n{USAGE}"), 2),
        (_, Err(e)) => return fail(&e.to_string(), 1),
    };
    let options = Options {
        runner: vec![program.into(), ONE.into()],
        level: arguments.level,
        only: arguments.only,
        seed: arguments.seed,
        limit: arguments.limit,
        is_cancelled: &|| false,
    };
    match check(Path::new(&arguments.file), &options) {
        Ok(report) => {
            let json = serde_json::to_string_pretty(&report).unwrap_or_default() + "\n";
            print!("{}", if arguments.json { json } else { report.to_text() });
            if report.passed { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(e) => fail(&e.to_string(), 1),
    }
}

/// Makes a crate in the current folder.
fn new(arguments: &[OsString]) -> ExitCode {
    let words: Vec<String> = arguments.iter().map(|a| a.to_string_lossy().into_owned()).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let (id, kind, sdk) = match words[..] {
        [id, "--kind", kind] => (id, kind, None),
        [id, "--kind", kind, "--sdk", sdk] => (id, kind, Some(Path::new(sdk))),
        _ => return fail(&format!("new needs an id and a kind\n{USAGE}"), 2),
    };
    let kind = match kind {
        "merge" => PluginKind::Merge,
        "sample" => PluginKind::Sample,
        "train" => PluginKind::Train,
        other => return fail(&format!("--kind {other}: merge, sample or train"), 2),
    };
    match new_plugin(id, kind, Path::new("."), sdk) {
        Ok(folder) => {
            println!("{}: build it with cargo build, then check the library", folder.display());
            ExitCode::SUCCESS
        }
        Err(e) => fail(&e.to_string(), 1),
    }
}

fn fail(message: &str, code: u8) -> ExitCode {
    eprintln!("blocklora-check: {message}");
    ExitCode::from(code)
}

fn parse(arguments: &[OsString]) -> Result<Arguments, String> {
    let mut parsed = Arguments {
        file: OsString::new(),
        level: Level::Behaviour,
        only: Vec::new(),
        seed: 1,
        limit: Duration::from_secs(60),
        json: false,
    };
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        let name = argument.to_string_lossy();
        let mut value = || rest.next().map(|v| v.to_string_lossy().into_owned()).ok_or(format!("{name} needs a value"));
        match name.as_ref() {
            "--json" => parsed.json = true,
            "--level" => parsed.level = value()?.parse().ok().and_then(Level::from_number).ok_or("--level: 0 to 3")?,
            "--test" => parsed.only.push(value()?),
            "--reproduce" => parsed.seed = value()?.parse().map_err(|_| "--reproduce: a whole number")?,
            "--limit" => {
                let seconds = value()?.parse().ok().filter(|s| *s > 0.0);
                let limit = seconds.and_then(|s| Duration::try_from_secs_f64(s).ok());
                parsed.limit = limit.ok_or("--limit: seconds, more than 0")?;
            }
            other if other.starts_with("--") => return Err(format!("unknown option {other}")),
            _ if parsed.file.is_empty() => parsed.file.clone_from(argument),
            _ => return Err("one file only".into()),
        }
    }
    if parsed.file.is_empty() { Err("which file?".into()) } else { Ok(parsed) }
}
