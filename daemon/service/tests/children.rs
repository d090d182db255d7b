//! No process outlives the daemon that started it, however the daemon ends and whatever the plugin in it is doing.

#![allow(clippy::unwrap_used)]

mod common;

use std::time::{Duration, Instant};

use common::hostile::Hostile;
use common::{Client, Daemon, Dict, ROOT, dict, stub, until};
use zbus::OwnedObjectPath;

/// How long they may take to end.
const END: Duration = Duration::from_secs(10);

/// A process: its id and when it started, which together name it for good.
type Process = (u32, u64);

fn stat(pid: u32) -> Option<(u32, Process)> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // Behind the name, which may hold anything: state, parent, ..., and as the 20th the start.
    let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
    if fields[0] == "Z" {
        return None;
    }
    Some((fields[1].parse().ok()?, (pid, fields[19].parse().ok()?)))
}

/// All processes below `pid`.
fn descendants(pid: u32) -> Vec<Process> {
    let pids = std::fs::read_dir("/proc").unwrap().flatten().filter_map(|e| e.file_name().to_str()?.parse().ok());
    let all: Vec<(u32, Process)> = pids.filter_map(stat).collect();
    let (mut parents, mut found) = (vec![pid], Vec::new());
    while let Some(parent) = parents.pop() {
        for (_, process) in all.iter().filter(|(of, _)| *of == parent) {
            parents.push(process.0);
            found.push(*process);
        }
    }
    found
}

fn lives((pid, start): Process) -> bool {
    stat(pid).is_some_and(|(_, process)| process == (pid, start))
}

/// Kills the daemon while its children are at work, and waits for them to end.
async fn killed(what: &str, mut daemon: Daemon) {
    let pid = daemon.child.id();
    until(&format!("{what}: a child"), async || !descendants(pid).is_empty()).await;
    // Far enough in to hang.
    tokio::time::sleep(Duration::from_millis(300)).await;
    let children = descendants(pid);
    assert!(!children.is_empty(), "{what}");
    daemon.kill();
    let since = Instant::now();
    while children.iter().any(|&child| lives(child)) {
        assert!(since.elapsed() < END, "{what}: {children:?} outlive the daemon");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn ask_for_sampler(client: &Client) -> Result<String, String> {
    let mut params = stub::picture("a dog", 1, 2);
    params.extend(dict([("sampler", "hostile".into())]));
    client.generate("/", params, Dict::new()).await
}

#[tokio::test]
async fn a_worker_that_hangs_in_its_plugin_ends_with_a_killed_daemon() {
    let hostile = Hostile::install();
    let daemon = hostile.daemon("worker");
    let client = daemon.client().await;
    let job = ask_for_sampler(&client).await.unwrap();
    client.wait(&job).await.unwrap();
    // From now on every step hangs.
    hostile.set_mode("hang-sample");
    let job = ask_for_sampler(&client).await.unwrap();
    // Before the first step is done.
    until("the job", async || client.get::<String>(&job, "Job", "Stage").await == "encoding").await;
    killed("worker", daemon).await;
}

#[tokio::test]
async fn a_scan_that_hangs_ends_with_a_killed_daemon() {
    let hostile = Hostile::install();
    let daemon = hostile.daemon("in-process");
    let client = daemon.client().await;
    // Another file, which was not scanned when the daemon started.
    hostile.change("sample");
    hostile.set_mode("hang-load");
    let asking = tokio::spawn(async move { ask_for_sampler(&client).await });
    killed("scan", daemon).await;
    assert!(asking.await.unwrap().is_err());
}

#[tokio::test]
async fn a_conformance_test_that_hangs_ends_with_a_killed_daemon() {
    let hostile = Hostile::install();
    let daemon = hostile.daemon("in-process");
    let client = daemon.client().await;
    hostile.set_mode("hang-load");
    let plugin = format!("{ROOT}/plugin/sample_2dhostile");
    let job: OwnedObjectPath = client.call(&plugin, "Plugin", "Validate", &(0u32, Dict::new())).await.unwrap();
    until("the job", async || client.get::<String>(job.as_str(), "Job", "State").await == "running").await;
    killed("check", daemon).await;
}
