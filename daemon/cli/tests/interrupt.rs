//! Ctrl-C, and jobs that somebody else cancels: how commands end, and what they say.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::{Daemon, Make, adapter, snapshot, temporary, text, until};

/// Starts the command, with both outputs kept.
fn start(command: &mut Command) -> Child {
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn signal(name: &str, process: u32) {
    let status = Command::new("kill").args([&format!("-{name}"), &process.to_string()]).status();
    assert!(status.unwrap().success());
}

/// Waits until `child` listens for Ctrl-C.
fn until_it_listens(child: &Child) {
    let status = format!("/proc/{}/status", child.id());
    until("a handler of SIGINT", || {
        let text = std::fs::read_to_string(&status).unwrap_or_default();
        let caught = text.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap_or_default();
        u64::from_str_radix(caught.trim(), 16).unwrap_or_default() & 2 != 0
    });
}

/// `output` must be that of a command that was interrupted.
#[track_caller]
fn is_interrupted(output: &Output, says: &str) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(130), "{stderr}");
    assert_eq!(stderr, format!("blocklora: interrupted{says}\n"));
    assert!(output.stdout.is_empty(), "{:?}", String::from_utf8_lossy(&output.stdout));
}

/// The processes that `parent` started.
fn children(parent: u32) -> Vec<u32> {
    let output = Command::new("ps").args(["-o", "pid=", "--ppid", &parent.to_string()]).output().unwrap();
    String::from_utf8(output.stdout).unwrap().split_whitespace().map(|pid| pid.parse().unwrap()).collect()
}

#[test]
fn one_press_ends_a_command_that_does_not_look() {
    let mut child = start(common::command().args(["bench", "merge", "--repeats", "10000"]));
    until_it_listens(&child);
    assert!(child.try_wait().unwrap().is_none());
    signal("INT", child.id());
    is_interrupted(&child.wait_with_output().unwrap(), "");
}

#[test]
fn a_job_that_somebody_else_cancels_has_failed() {
    let folder = temporary();
    let daemon = Daemon::start();
    let command = |args: &[&str]| {
        let mut command = common::command();
        command.env("BLOCKLORA_DAEMON", daemon.socket()).args(args).current_dir(folder.path());
        command
    };
    let drawing = start(&mut command(&["generate", "a cat", "--steps", "900", "--count", "1000", "-o", "x.png"]));
    let job = || {
        let output = command(&["jobs", "list", "--kind", "generate", "--active", "--json"]).output().unwrap();
        let jobs: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        jobs[0]["id"].as_str().map(str::to_owned)
    };
    until("the job", || job().is_some());
    let id = job().unwrap();
    // One who watches may stop to do so at any time, though nothing changes that could be printed.
    let waiting = start(&mut command(&["generate", "a cat", "--steps", "1", "-o", "y.png"]));
    let queued = || {
        let output = command(&["jobs", "list", "--state", "queued", "--json"]).output().unwrap();
        let jobs: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        jobs[0]["id"].as_str().map(str::to_owned)
    };
    until("the job that waits", || queued().is_some());
    let watching = start(&mut command(&["jobs", "watch", &queued().unwrap(), "--json"]));
    until_it_listens(&watching);
    std::thread::sleep(Duration::from_millis(500));
    let asked = Instant::now();
    signal("INT", watching.id());
    let output = watching.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(130), "{stderr}");
    assert!(stderr.contains("interrupted: the job goes on"), "{stderr}");
    assert!(asked.elapsed() < Duration::from_secs(10), "it took {:?}", asked.elapsed());

    let watching = start(&mut command(&["jobs", "watch", &id]));
    until_it_listens(&watching);
    std::thread::sleep(Duration::from_millis(500));
    assert!(command(&["jobs", "cancel", &id]).output().unwrap().status.success());
    for child in [drawing, watching] {
        common::is_one_clear_line(&child.wait_with_output().unwrap(), 1, &["the job was cancelled"]);
    }
    assert!(waiting.wait_with_output().unwrap().status.success());
    assert!(folder.path().join("y.png").is_file() && !folder.path().join("x.png").exists());
}

#[test]
fn a_merge_is_interrupted_while_its_folder_is_written() {
    let folder = temporary();
    let milo = adapter(folder.path(), &Make::default());
    let before = snapshot(folder.path());
    let is_being_written = || {
        let entries = folder.path().read_dir().unwrap().map(|entry| entry.unwrap().path());
        entries.into_iter().any(|path| path.is_dir() && path.read_dir().is_ok_and(|mut files| files.next().is_some()))
    };
    // It may be done before it hears of the interruption.
    let interrupted = (0..10).any(|_| {
        let mut command = common::command();
        let child = start(command.args(["merge", text(&milo), "-o", "x"]).current_dir(folder.path()));
        until("the folder", is_being_written);
        // The daemon is held up, so that the command asks it to stop before it goes on to write.
        let daemon = children(child.id());
        daemon.iter().for_each(|&daemon| signal("STOP", daemon));
        signal("INT", child.id());
        std::thread::sleep(Duration::from_millis(300));
        daemon.iter().for_each(|&daemon| signal("CONT", daemon));
        let output = child.wait_with_output().unwrap();
        if output.status.success() {
            std::fs::remove_dir_all(folder.path().join("x")).unwrap();
            return false;
        }
        is_interrupted(&output, "");
        true
    });
    assert!(interrupted, "no merge was interrupted");
    assert_eq!(snapshot(folder.path()), before, "something was left behind");
}

/// The plugins of sdk/check/examples, one of which hangs.
#[test]
fn a_check_of_a_plugin_that_is_interrupted_says_nothing_of_it() {
    let folder = temporary();
    let manifests = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../sdk/check/examples/hostile");
    let library = folder.path().join("libhostile_merge.so");
    let built = Path::new(common::BLOCKLORA).with_file_name("examples").join("libhostile_merge.so");
    let copied = std::fs::copy(&built, &library);
    copied.unwrap_or_else(|e| panic!("{}: {e}: cargo build --workspace --examples", built.display()));
    std::fs::copy(manifests.join("merge-hostile.toml"), folder.path().join("merge-hostile.toml")).unwrap();
    let mut command = common::command();
    command.args(["plugin", "check", text(&library), "--test", "merge.plan"]).env("BLOCKLORA_HOSTILE", "hang-plan");
    let child = start(&mut command);
    until("the test's process", || !children(child.id()).is_empty());
    signal("INT", child.id());
    is_interrupted(&child.wait_with_output().unwrap(), "");

    // What was not found is named by what there is.
    let output = common::blocklora(["plugin", "check", text(&library), "--test", "nonsense"]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && stderr.contains("merge.random (3)"), "{stderr}");
}

/// What plugins and other users wrote is not obeyed by a terminal.
#[test]
fn texts_of_others_are_shown_and_not_obeyed() {
    let folder = temporary();
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../sdk/check/examples/hostile/merge-hostile.toml");
    let honest = std::fs::read_to_string(manifest).unwrap();
    let version = honest.replace("version = \"0.1.0\"", "version = \"\\u001b[2J\"");
    assert_ne!(version, honest);
    std::fs::write(folder.path().join("merge-hostile.toml"), version).unwrap();
    std::fs::write(folder.path().join("merge-broken.toml"), format!("\"\\u001b[2J\" = 1\n{honest}")).unwrap();
    let output =
        common::command().args(["plugin", "list"]).env("BLOCKLORA_PLUGIN_PATH", folder.path()).output().unwrap();
    for said in [&output.stdout, &output.stderr] {
        let said = String::from_utf8_lossy(said);
        assert!(said.contains("\\u{1b}[2J") && !said.contains('\u{1b}'), "{said:?}");
    }
}
