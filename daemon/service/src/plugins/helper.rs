//! Helper processes: the same program as the daemon, under limits.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process_group, setrlimit};
use std::os::unix::process::{CommandExt, ExitStatusExt};

use super::error::{PluginError, Result};

/// How long a child that is waited for may go without a look at it.
pub const POLL: Duration = Duration::from_millis(5);

/// The daemon's program: beside this one, or one folder up (tests), or in PATH.
pub fn program() -> Result<PathBuf> {
    const NAME: &str = "blocklorad";
    let executable = std::env::current_exe().unwrap_or_default();
    if executable.file_name().is_some_and(|name| name == NAME) {
        return Ok(executable);
    }
    let near = executable.ancestors().skip(1).take(2).map(|folder| folder.join(NAME));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let in_path = std::env::split_paths(&path).map(|folder| folder.join(NAME)).collect::<Vec<_>>();
    near.chain(in_path).find(|path| path.is_file()).ok_or_else(|| PluginError::Host {
        path: NAME.into(),
        reason: "the program that runs plugins' helper processes is neither beside this one nor in PATH: install it"
            .into(),
    })
}

/// How a helper ended.
pub enum End {
    /// With this status, having written this to stdout.
    Exited(ExitStatus, Vec<u8>),
    /// It was killed for taking too long.
    TimedOut,
}

/// Runs `program arguments` for at most `limit`.
pub fn run(program: &Path, arguments: &[&std::ffi::OsStr], limit: Duration) -> Result<End> {
    let failed = |reason: String| PluginError::Host { path: program.to_owned(), reason };
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        // Ctrl-C on the terminal is for the program that the user sees.
        .process_group(0)
        .spawn()
        .map_err(|e| failed(e.to_string()))?;
    let group = Pid::from_raw(child.id().cast_signed());
    let stdout = reader(child.stdout.take());
    let status = wait(&mut child, limit).map_err(|e| failed(e.to_string()))?;
    // Whatever the library has started ends, too: it holds the pipe.
    if let Some(group) = group {
        // None may be left.
        let _ = kill_process_group(group, Signal::KILL);
    }
    let stdout = stdout.join().unwrap_or_default();
    Ok(match status {
        Some(status) => End::Exited(status, stdout),
        None => End::TimedOut,
    })
}

/// Bytes of a helper's output that are kept.
const OUTPUT_BYTES_MAX: u64 = 16 << 20;

fn reader(pipe: Option<impl Read + Send + 'static>) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            // A pipe that breaks gives what came before.
            drop(pipe.by_ref().take(OUTPUT_BYTES_MAX).read_to_end(&mut bytes));
            drop(std::io::copy(&mut pipe, &mut std::io::sink()));
        }
        bytes
    })
}

/// Waits for at most `limit`, then kills; `None` if it had to.
pub fn wait(child: &mut Child, limit: Duration) -> std::io::Result<Option<ExitStatus>> {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if start.elapsed() > limit {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        std::thread::sleep(POLL);
    }
}

/// Whether somebody else ended the process: a signal that no plugin's fault gives. (A limit that it exceeds does not kill
/// it; the system, where memory is short, and people do.)
pub fn was_ended(status: ExitStatus) -> bool {
    status.signal().is_some_and(|signal| [1, 2, 9, 15].contains(&signal))
}

/// How a process died, for people.
pub fn death(status: ExitStatus) -> String {
    match status.signal() {
        Some(11) => "crashed (segmentation fault)".into(),
        Some(6) => "crashed (aborted)".into(),
        Some(signal) if was_ended(status) => format!("was killed (signal {signal}) by somebody or for want of memory"),
        Some(signal) => format!("crashed (signal {signal})"),
        None => format!("ended its process (exit status {})", status.code().unwrap_or(-1)),
    }
}

/// Limits this process, a helper, before it loads anything: `data_bytes` of private memory, no core dumps.
pub fn limit_self(data_bytes: u64) {
    for (resource, limit) in [(Resource::Data, data_bytes), (Resource::Core, 0)] {
        let maximum = getrlimit(resource).maximum;
        let limit = maximum.map_or(limit, |maximum| maximum.min(limit));
        // Refused only where the limit is lower already.
        let _ = setrlimit(resource, Rlimit { current: Some(limit), maximum: Some(limit) });
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_a_helper_leaves_behind_is_not_waited_for() {
        let since = Instant::now();
        let arguments = ["-c", "sleep 60 & echo here"].map(std::ffi::OsStr::new);
        let end = run(Path::new("/bin/sh"), &arguments, Duration::from_secs(30)).unwrap();
        let End::Exited(status, stdout) = end else { panic!("it takes no time") };
        assert!(status.success() && stdout == b"here\n");
        assert!(since.elapsed() < Duration::from_secs(30), "{:?}", since.elapsed());
    }
}
