//! Helper processes: the same program as the daemon, under limits.

use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process_group, setrlimit};
use std::os::unix::process::{CommandExt, ExitStatusExt};

use super::error::{PluginError, Result};

/// How long a child that is waited for may go without a look at it.
const POLL: Duration = Duration::from_millis(5);

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
    let mut stdout = Output::of(child.stdout.take()).map_err(|e| failed(e.to_string()))?;
    let status = wait_and(&mut child, limit, || stdout.read()).map_err(|e| failed(e.to_string()))?;
    // Whatever the library has started ends, too.
    if let Some(group) = group {
        // None may be left.
        let _ = kill_process_group(group, Signal::KILL);
    }
    stdout.read();
    Ok(match status {
        Some(status) => End::Exited(status, stdout.bytes),
        None => End::TimedOut,
    })
}

/// Bytes of a helper's output that are kept.
const OUTPUT_BYTES_MAX: usize = 16 << 20;

/// What a helper writes, read without waiting for more: a process that it has left behind may hold the pipe for ever.
struct Output {
    pipe: Option<ChildStdout>,
    bytes: Vec<u8>,
}

impl Output {
    fn of(pipe: Option<ChildStdout>) -> std::io::Result<Self> {
        if let Some(pipe) = &pipe {
            fcntl_setfl(pipe, fcntl_getfl(pipe)? | OFlags::NONBLOCK)?;
        }
        Ok(Self { pipe, bytes: Vec::new() })
    }

    /// Reads what is there, and no more than the largest pipe holds, or who writes without end would keep us here. A pipe
    /// that breaks gives what came before.
    fn read(&mut self) {
        const PIPE_BYTES_MAX: usize = 1 << 20;
        let mut part = [0; 1 << 14];
        let Some(pipe) = &mut self.pipe else { return };
        for _ in 0..PIPE_BYTES_MAX / part.len() {
            match pipe.read(&mut part) {
                Ok(0) => break,
                Ok(read) => {
                    let room = OUTPUT_BYTES_MAX - self.bytes.len();
                    self.bytes.extend_from_slice(&part[..read.min(room)]);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
    }
}

/// Waits for at most `limit`, then kills; `None` if it had to.
pub fn wait(child: &mut Child, limit: Duration) -> std::io::Result<Option<ExitStatus>> {
    wait_and(child, limit, || ())
}

/// The same, with something to do now and then.
fn wait_and(child: &mut Child, limit: Duration, mut meanwhile: impl FnMut()) -> std::io::Result<Option<ExitStatus>> {
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
        meanwhile();
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
        // The second is in a session of its own, where it is not found: it goes on, with the pipe.
        for script in ["sleep 60 & echo here", "setsid sleep 40 & echo here"] {
            let arguments = ["-c", script].map(std::ffi::OsStr::new);
            let end = run(Path::new("/bin/sh"), &arguments, Duration::from_secs(30)).unwrap();
            let End::Exited(status, stdout) = end else { panic!("it takes no time") };
            assert!(status.success() && stdout == b"here\n");
        }
        assert!(since.elapsed() < Duration::from_secs(30), "{:?}", since.elapsed());
    }

    #[test]
    fn one_that_writes_without_end_is_ended() {
        let arguments = ["-c", "cat /dev/zero"].map(std::ffi::OsStr::new);
        let end = run(Path::new("/bin/sh"), &arguments, Duration::from_millis(300)).unwrap();
        assert!(matches!(end, End::TimedOut));
    }

    #[test]
    fn more_than_a_pipe_holds_is_read() {
        let arguments = ["-c", "head -c 1000000 /dev/zero; echo end"].map(std::ffi::OsStr::new);
        let end = run(Path::new("/bin/sh"), &arguments, Duration::from_secs(30)).unwrap();
        let End::Exited(status, stdout) = end else { panic!("it waits for its reader only") };
        assert!(status.success() && stdout.len() == 1_000_004 && stdout.ends_with(b"end\n"));
    }
}
