//! The process that starts one process for each test, and outlives them.

use std::ffi::OsString;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use crate::report::{Outcome, Report, Status};
use crate::subject::read_manifest;
use crate::tests::{Level, Test, all};

/// What to run and how.
pub struct Options<'a> {
    /// The program that runs one test and its fixed arguments; what follows them it passes on to
    /// [`run_one`](crate::run_one).
    pub runner: Vec<OsString>,
    /// How much to test.
    pub level: Level,
    /// Only the tests of these names; all if it is empty.
    pub only: Vec<String>,
    /// Decides every random number.
    pub seed: u64,
    /// Each test's time limit.
    pub limit: Duration,
    /// Whether the caller has cancelled: the run then ends with what it has.
    pub is_cancelled: &'a dyn Fn() -> bool,
}

/// Checks the library `file`, beside which its manifest lies. Fails only if no process can be started; what is wrong with
/// the plugin is in the report.
pub fn check(file: &Path, options: &Options<'_>) -> std::io::Result<Report> {
    let manifest = read_manifest(file);
    let mut tests = Vec::new();
    for test in all().filter(|test| test.level <= options.level) {
        let is_wanted = options.only.is_empty() || options.only.iter().any(|name| name == test.name);
        let is_of_kind = match (&manifest, test.kind) {
            (_, None) => true,
            (Ok((_, manifest)), Some(kind)) => kind == manifest.kind,
            (Err(_), Some(_)) => false,
        };
        if !is_wanted || !is_of_kind {
            continue;
        }
        if (options.is_cancelled)() {
            break;
        }
        let outcome = run(file, test, options)?;
        let is_hopeless = test.name == "library.loads" && !outcome.status.is_fine();
        tests.push(outcome);
        // A library that does not load fails everything else for the same reason.
        if is_hopeless {
            break;
        }
    }
    Ok(Report {
        file: file.display().to_string(),
        plugin: manifest.map(|(_, manifest)| manifest.full_name()).unwrap_or_default(),
        seed: options.seed,
        // What was cancelled has not been tested.
        passed: !(options.is_cancelled)() && !tests.is_empty() && tests.iter().all(|test| test.status.is_fine()),
        tests,
    })
}

fn run(file: &Path, test: &Test, options: &Options<'_>) -> std::io::Result<Outcome> {
    let folder = tempfile::tempdir()?;
    let result: PathBuf = folder.path().join("result");
    let stderr = folder.path().join("stderr");
    let Some((program, arguments)) = options.runner.split_first() else {
        return Err(std::io::Error::other("no program that runs a test"));
    };
    let mut child = Command::new(program)
        .args(arguments)
        .arg(test.name)
        .arg(options.seed.to_string())
        .arg(&result)
        .arg(file)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(std::fs::File::create(&stderr)?)
        // Whatever it starts ends with it.
        .process_group(0)
        .spawn()?;
    let start = Instant::now();
    let ended = wait(&mut child, options, start)?;
    let (status, message) = match ended {
        Ended::Late => (Status::TimedOut, format!("it did not end within {} s", options.limit.as_secs_f64())),
        Ended::Cancelled => (Status::Skipped, "cancelled".to_owned()),
        Ended::Itself(exit) => match std::fs::read_to_string(&result).ok().and_then(|text| parse(&text)) {
            Some(verdict) if exit.success() => verdict,
            _ => crash(exit, &std::fs::read_to_string(&stderr).unwrap_or_default()),
        },
    };
    let message = message.split_whitespace().collect::<Vec<_>>().join(" ");
    let seconds = start.elapsed().as_secs_f64();
    Ok(Outcome { test: test.name.to_owned(), level: test.level, status, message, seconds })
}

enum Ended {
    Itself(ExitStatus),
    Late,
    Cancelled,
}

fn wait(child: &mut Child, options: &Options<'_>, start: Instant) -> std::io::Result<Ended> {
    loop {
        if let Some(exit) = child.try_wait()? {
            kill_group(child);
            return Ok(Ended::Itself(exit));
        }
        let cancelled = (options.is_cancelled)();
        if cancelled || start.elapsed() > options.limit {
            kill_group(child);
            child.kill()?;
            child.wait()?;
            return Ok(if cancelled { Ended::Cancelled } else { Ended::Late });
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Ends what the test's process has started, too.
fn kill_group(child: &Child) {
    if let Some(group) = rustix::process::Pid::from_raw(child.id() as i32) {
        let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
    }
}

fn parse(text: &str) -> Option<(Status, String)> {
    serde_json::from_str(text).ok()
}

/// A process that ended without a result.
fn crash(exit: ExitStatus, stderr: &str) -> (Status, String) {
    // What Rust and C++ say when the limit on memory stops them.
    if ["memory allocation of", "bad_alloc", "out of memory"].iter().any(|said| stderr.contains(said)) {
        let cure = "free what is no longer needed, or declare more as memory_mib in the manifest";
        return (Status::OutOfMemory, format!("it took more memory than its manifest declares: {cure}"));
    }
    let how = match exit.signal() {
        Some(11 | 7) => "it accessed memory that is not its own (SIGSEGV): look for unsafe code".to_owned(),
        Some(6) => "it aborted (SIGABRT): return an error instead".to_owned(),
        Some(signal) => format!("it was ended by signal {signal}"),
        None => format!("it ended its process with code {}: return an error instead", exit.code().unwrap_or_default()),
    };
    let last = stderr.lines().rev().find(|line| !line.trim().is_empty() && !line.contains("RUST_BACKTRACE"));
    (Status::Crashed, last.map_or(how.clone(), |last| format!("{how}; it said: {last}")))
}
