//! Daemons that end in the middle of their work, and what the next one finds: nothing that was promised is lost, and
//! nothing is there by half.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{Client, Daemon, Dict, ROOT, adapter_file, alive, dict, step_of, train, until};
use rustix::process::Signal;
use zbus::OwnedObjectPath;

#[tokio::test(flavor = "multi_thread")]
async fn a_training_goes_on_after_kill_9_and_gives_the_same_file() {
    let mut daemon = Daemon::start();
    let client = daemon.client().await;
    let options = || dict([("slot", 1u32.into())]);
    let job = train(&client, "rex", 8, options()).await.unwrap();
    // The checkpoint of step 2 or 4 is there, and the run is not over.
    until("step 3", || async { step_of(&client, &job).await.0 >= 3 }).await;
    daemon.kill();
    daemon.restart();
    let client = daemon.client().await;
    let details = client.wait(&job).await.unwrap();
    assert!(u32::try_from(details["resumed_at"].try_clone().unwrap()).unwrap() >= 2, "{}", daemon.log());
    let resumed = client.results(&job).await.unwrap().remove(0).0;
    // The same training without a break.
    let fresh = Daemon::start();
    let client = fresh.client().await;
    let job = train(&client, "rex", 8, options()).await.unwrap();
    client.wait(&job).await.unwrap();
    assert_eq!(client.results(&job).await.unwrap().remove(0).0, resumed);
    // Nothing but the adapter is left.
    assert_eq!(std::fs::read_dir(daemon.state().join("jobs")).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_saves_a_training_and_the_next_daemon_goes_on() {
    let mut daemon = Daemon::start();
    let client = daemon.client().await;
    let job = train(&client, "rex", 200, Dict::new()).await.unwrap();
    until("a step", || async { step_of(&client, &job).await.0 >= 1 }).await;
    let since = Instant::now();
    daemon.signal(Signal::TERM);
    // Pending calls are answered.
    let error = client.wait(&job).await.unwrap_err();
    assert!(error.starts_with("ShuttingDown: ") || error.contains("I/O error"), "{error}");
    assert!(daemon.child.wait().unwrap().success());
    assert!(since.elapsed() < Duration::from_secs(30), "{:?}", since.elapsed());
    daemon.restart();
    let client = daemon.client().await;
    until("the training", || async { step_of(&client, &job).await.0 >= 1 }).await;
    client.call::<_, ()>(&job, "Job", "Cancel", &("discard", Dict::new())).await.unwrap();
    assert!(client.wait(&job).await.unwrap_err().starts_with("Cancelled: "));
    alive(&mut daemon, &client).await;
    // Cancelled for good: the next daemon does not begin it again, and its slot is free.
    daemon.restart();
    let client = daemon.client().await;
    let slots: Vec<Dict> = client.call(ROOT, "Manager", "ListSlots", &(Dict::new(), 0u32, 1000u32)).await.unwrap();
    assert!(slots.is_empty());
    let active: Vec<Dict> =
        client.call(ROOT, "Manager", "ListJobs", &(dict([("active", true.into())]), 0u32, 9u32)).await.unwrap();
    assert!(active.is_empty());
}

/// What the daemon has promised of a thing: that it is there, that it is gone, or neither, while a call is on its way.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Promise {
    There,
    Gone,
    Open,
}

/// The promises, by what they are about.
type Promises = Arc<Mutex<BTreeMap<String, Promise>>>;

fn note(promises: &Promises, what: &str, promise: Promise) {
    promises.lock().unwrap().insert(what.to_owned(), promise);
}

/// Imports, merges and removes adapters until the daemon is gone.
async fn come_and_go(client: Client, names: [&str; 2], promises: Promises) -> Result<(), String> {
    loop {
        for name in names {
            note(&promises, name, Promise::Open);
            let file = File::open(adapter_file(name)).unwrap();
            let body = (zbus::Fd::from(file.as_fd()), Dict::new());
            let adapter: OwnedObjectPath = client.call(ROOT, "Manager", "RegisterAdapter", &body).await?;
            note(&promises, name, Promise::There);
            let parts = ("blocklora", common::entries_of(&[(adapter.as_str(), 1.0)]), Dict::new());
            let job: OwnedObjectPath = client.call(ROOT, "Manager", "Merge", &parts).await?;
            client.wait(job.as_str()).await?;
            note(&promises, name, Promise::Open);
            let remove = (dict([("remove", true.into())]),);
            client.call::<_, ()>(adapter.as_str(), "Adapter", "Unregister", &remove).await?;
            note(&promises, name, Promise::Gone);
        }
    }
}

/// Leases slots and gives every other one back until the daemon is gone.
async fn lease_and_release(client: Client, promises: Promises) -> Result<(), String> {
    loop {
        let slot = promises.lock().unwrap().keys().filter(|what| what.starts_with("slot ")).count();
        let what = format!("slot {slot}");
        note(&promises, &what, Promise::Open);
        let partition = dict([("capacity", 4096u32.into())]);
        let options = dict([("slot", (slot as u32).into())]);
        let (lease, _): (String, u32) = client.call(ROOT, "Manager", "LeaseSlot", &(partition, options)).await?;
        note(&promises, &what, Promise::There);
        if slot % 2 == 1 {
            note(&promises, &what, Promise::Open);
            client.call::<_, ()>(ROOT, "Manager", "ReleaseSlot", &(lease, Dict::new())).await?;
            note(&promises, &what, Promise::Gone);
        }
    }
}

/// What SQLite itself says of the catalogue.
fn integrity(state: &Path) -> String {
    let connection = rusqlite::Connection::open(state.join("catalogue.sqlite")).unwrap();
    connection.query_row("PRAGMA integrity_check", [], |row| row.get(0)).unwrap()
}

/// The names in a folder; none if it is not there.
fn names_in(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten();
    let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn text(dict: &Dict, key: &str) -> String {
    String::try_from(dict[key].try_clone().unwrap()).unwrap()
}

/// kill -9 at moments that a generator chooses, in the middle of imports, merges, removals and leases.
/// BLOCKLORA_KILL_ROUNDS makes it as long as one likes.
#[tokio::test(flavor = "multi_thread")]
async fn kill_9_at_any_moment_loses_no_promise_and_leaves_no_half() {
    let rounds: u32 = std::env::var("BLOCKLORA_KILL_ROUNDS").map_or(8, |text| text.parse().unwrap());
    let mut daemon = Daemon::start();
    let promises = Promises::default();
    let mut noise: u32 = 7;
    for round in 0..rounds {
        let client = daemon.client().await;
        // The model is there before the killing begins: a moment counted from here falls into the work.
        let job: OwnedObjectPath = client.call(ROOT, "Manager", "LoadModel", &("starter", Dict::new())).await.unwrap();
        client.wait(job.as_str()).await.unwrap();
        let work = [
            tokio::spawn(come_and_go(client.clone(), ["poodle", "teddy"], promises.clone())),
            tokio::spawn(come_and_go(daemon.client().await, ["zombie", "black_cat"], promises.clone())),
            tokio::spawn(lease_and_release(client, promises.clone())),
        ];
        noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let moment = Duration::from_micros(u64::from(noise >> 8) % 400_000);
        tokio::time::sleep(moment).await;
        daemon.kill();
        for work in work {
            // Each ends by the connection's end, and by nothing else.
            let error = work.await.unwrap().unwrap_err();
            assert!(error.contains("I/O error") || error.contains("closed"), "{error}");
        }
        daemon.restart();
        let seen = format!("round {round}, killed after {moment:?}");
        assert_eq!(integrity(&daemon.state()), "ok", "{seen}");
        check_promises(&daemon, &promises, &seen).await;
    }
}

/// The entries of the library.
async fn library(client: &Client) -> Vec<Dict> {
    client.call(ROOT, "Manager", "QueryLibrary", &(Dict::new(), 0u32, 100u32)).await.unwrap()
}

/// The names of their files, in order.
fn files_of(page: &[Dict]) -> Vec<String> {
    let mut files: Vec<String> = page.iter().map(|entry| format!("{}.safetensors", text(entry, "digest"))).collect();
    files.sort();
    files
}

/// That what the daemon shows now keeps `promises`, and that files and entries agree.
async fn check_promises(daemon: &Daemon, promises: &Promises, seen: &str) {
    let client = daemon.client().await;
    // A file without its entry is checked and taken in beside the start.
    until("the files that an import left", || async {
        files_of(&library(&client).await) == names_in(&daemon.state().join("adapters"))
    })
    .await;
    let page = library(&client).await;
    let names: Vec<String> = page.iter().map(|entry| text(entry, "name")).collect();
    let slots: Vec<Dict> = client.call(ROOT, "Manager", "ListSlots", &(Dict::new(), 0u32, 1000u32)).await.unwrap();
    let slot = |dict: &Dict| format!("slot {}", u32::try_from(dict["slot"].try_clone().unwrap()).unwrap());
    let leased: Vec<String> = slots.iter().filter(|dict| text(dict, "holder") == "lease").map(slot).collect();
    for (what, promise) in promises.lock().unwrap().iter_mut() {
        let there = names.contains(what) || leased.contains(what);
        assert!(*promise == Promise::Open || (*promise == Promise::There) == there, "{seen}: {what}: {promise:?}");
        // What was open is decided now, and stays so.
        *promise = if there { Promise::There } else { Promise::Gone };
    }
    let files = files_of(&page);
    assert_eq!(names_in(&daemon.state().join("adapters")), files, "{seen}");
    assert_eq!(names_in(&daemon.state().join("tmp")), [""; 0], "{seen}");
    let job: OwnedObjectPath = client.call(ROOT, "Manager", "ValidateLibrary", &(Dict::new(),)).await.unwrap();
    let details = client.wait(job.as_str()).await.unwrap();
    assert_eq!(u64::try_from(details["checked"].try_clone().unwrap()).unwrap(), files.len() as u64, "{seen}");
    let problems = <&zbus::Array>::try_from(&details["problems"]).unwrap();
    assert!(problems.is_empty(), "{seen}: {problems:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn kill_9_while_a_model_is_written_leaves_no_folder_and_ends_the_archive() {
    let mut daemon = Daemon::start();
    let client = daemon.client().await;
    let poodle = client.register("poodle").await;
    let set = client.compose(&[(&poodle, 1.0)], Dict::new()).await.unwrap();
    let (mut reader, writer) = std::io::pipe().unwrap();
    let body = (zbus::Fd::from(writer.as_fd()), Dict::new());
    let job: OwnedObjectPath = client.call(&set, "Composition", "Bake", &body).await.unwrap();
    drop(body);
    drop(writer);
    let waiting = client.clone();
    let ended = tokio::spawn(async move { waiting.wait(job.as_str()).await });
    // The folder is there and nobody reads the archive: the daemon cannot be done.
    let tmp = daemon.state().join("tmp");
    until("the folder", || async { !names_in(&tmp).is_empty() }).await;
    let mut first = [0; 512];
    reader.read_exact(&mut first).unwrap();
    daemon.kill();
    let error = ended.await.unwrap().unwrap_err();
    assert!(error.contains("I/O error") || error.contains("closed"), "{error}");
    // The archive ends in the middle instead of leaving its reader waiting.
    reader.read_to_end(&mut Vec::new()).unwrap();
    daemon.restart();
    assert_eq!(names_in(&tmp), [""; 0]);
    let client = daemon.client().await;
    assert_eq!(client.register("poodle").await, poodle);
    alive(&mut daemon, &client).await;
}
