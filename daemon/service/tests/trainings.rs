//! How trainings end, and what is left of each: nothing that anybody has to give back by hand, and a checkpoint wherever
//! the same training may be asked for again.

#![allow(clippy::unwrap_used)]

mod common;

use std::os::fd::AsFd;
use std::path::Path;

use common::{Client, Daemon, Dict, ROOT, dict, long, step_of, train, training, until};
use zbus::OwnedObjectPath;

/// The owned slots.
async fn slots(client: &Client) -> Vec<Dict> {
    client.call(ROOT, "Manager", "ListSlots", &(Dict::new(), 0u32, 1000u32)).await.unwrap()
}

/// The jobs that have not ended.
async fn active(client: &Client) -> Vec<Dict> {
    client.call(ROOT, "Manager", "ListJobs", &(dict([("active", true.into())]), 0u32, 100u32)).await.unwrap()
}

fn text(dict: &Dict, key: &str) -> String {
    String::try_from(dict[key].try_clone().unwrap()).unwrap()
}

fn number(dict: &Dict, key: &str) -> u32 {
    u32::try_from(dict[key].try_clone().unwrap()).unwrap()
}

/// How many files and folders `folder` has; 0 if it is not there.
fn count(folder: &Path) -> usize {
    std::fs::read_dir(folder).into_iter().flatten().count()
}

/// That no training holds anything any more, and that the next daemon has none to go on with.
async fn is_over(daemon: &mut Daemon) {
    for _ in 0..2 {
        let client = daemon.client().await;
        assert!(slots(&client).await.is_empty(), "{:?}", slots(&client).await);
        assert_eq!(count(&daemon.state().join("jobs")), 0);
        assert!(active(&client).await.is_empty());
        daemon.restart();
    }
}

/// The options of a training in slot 1 that ends with its client, and more.
fn with_client<const N: usize>(more: [(&str, zbus::Variant<'static>); N]) -> Dict {
    let mut options = dict([("slot", 1u32.into()), ("lifetime", "connection".into())]);
    options.extend(dict(more));
    options
}

#[tokio::test(flavor = "multi_thread")]
async fn kill_9_keeps_the_checkpoint_of_a_training_that_ends_with_its_client() {
    let mut daemon = Daemon::start();
    let client = daemon.client().await;
    // There is nothing to go on from yet.
    let job = train(&client, "rex", 8, with_client([("resume", true.into())])).await.unwrap();
    let error = client.wait(&job).await.unwrap_err();
    assert!(error.starts_with("InvalidOption: option \"resume\": no checkpoint"), "{error}");
    let job = train(&client, "rex", 8, with_client([])).await.unwrap();
    until("step 3", || async { step_of(&client, &job).await.0 >= 3 }).await;
    daemon.kill();
    daemon.restart();
    is_over(&mut daemon).await;
    let client = daemon.client().await;
    let job = train(&client, "rex", 8, with_client([("resume", true.into())])).await.unwrap();
    let details = client.wait(&job).await.unwrap();
    assert!(number(&details, "resumed_at") >= 2, "{}", daemon.log());
    assert_eq!(count(&daemon.state().join("checkpoints")), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_training_that_timed_out_before_it_began_is_over() {
    let mut daemon = Daemon::start();
    let client = daemon.client().await;
    let job = train(&client, "rex", 100_000, dict([("timeout_usec", 1u64.into())])).await.unwrap();
    let error = client.wait(&job).await.unwrap_err();
    assert!(error.starts_with("TimedOut: "), "{error}");
    is_over(&mut daemon).await;
    let client = daemon.client().await;
    let jobs: Vec<Dict> =
        client.call(ROOT, "Manager", "ListJobs", &(dict([("kind", "train".into())]), 0u32, 9u32)).await.unwrap();
    assert_eq!(jobs.iter().map(|job| text(job, "state")).collect::<Vec<_>>(), ["failed"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_training_that_cannot_begin_gives_its_slot_back() {
    let copy = tempfile::tempdir().unwrap();
    let model = copy.path().join("model");
    let stub = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/pipeline");
    assert!(std::process::Command::new("cp").arg("-r").arg(stub).arg(&model).status().unwrap().success());
    let config = format!("[models]\nfolders = {{ copy = {:?} }}\n", model.display().to_string());
    let mut daemon = Daemon::start_with(None, &config, &[]);
    let client = daemon.client().await;
    let before = client.generate("/", long(900), Dict::new()).await.unwrap();
    until("the start", || async { client.get::<String>(&before, "Job", "State").await == "running" }).await;
    let partition = zbus::Variant::from(dict([("capacity", 4u32.into())]));
    let options = dict([("model", "copy".into()), ("partition", partition)]);
    let job = train(&client, "rex", 2, options).await.unwrap();
    // A lease of a training is not given back while it waits.
    let lease = text(&slots(&client).await[0], "lease");
    let error = client.call::<_, ()>(ROOT, "Manager", "ReleaseSlot", &(lease, Dict::new())).await.unwrap_err();
    assert!(error.starts_with("InvalidOption: ") && error.contains("cancel the job"), "{error}");
    std::fs::remove_dir_all(&model).unwrap();
    client.call::<_, ()>(&before, "Job", "Cancel", &("", Dict::new())).await.unwrap();
    let error = client.wait(&job).await.unwrap_err();
    assert!(error.starts_with("ModelNotFound: "), "{error}");
    is_over(&mut daemon).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_training_that_cannot_go_on_gives_its_slot_back() {
    let mut daemon = Daemon::start();
    let client = daemon.client().await;
    train(&client, "rex", 100_000, Dict::new()).await.unwrap();
    assert_eq!(slots(&client).await.len(), 1);
    daemon.kill();
    std::fs::remove_dir_all(daemon.state().join("jobs")).unwrap();
    daemon.restart();
    is_over(&mut daemon).await;
    // A lease whose training the catalogue has lost.
    train(&daemon.client().await, "rex", 100_000, Dict::new()).await.unwrap();
    daemon.kill();
    let catalogue = rusqlite::Connection::open(daemon.state().join("catalogue.sqlite")).unwrap();
    catalogue.execute("DELETE FROM jobs", []).unwrap();
    drop(catalogue);
    daemon.restart();
    is_over(&mut daemon).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_is_good_for_one_training() {
    let mut daemon = Daemon::start();
    let client = daemon.client().await;
    let (lease, slot): (String, u32) =
        client.call(ROOT, "Manager", "LeaseSlot", &(Dict::new(), Dict::new())).await.unwrap();
    let on_it = || dict([("lease", lease.clone().into())]);
    // One that cannot be queued leaves the lease as it was.
    let wrong = dict([("lease", lease.clone().into()), ("model", "none".into())]);
    train(&client, "rex", 100_000, wrong).await.unwrap_err();
    let job = train(&client, "rex", 100_000, on_it()).await.unwrap();
    let error = train(&client, "max", 100_000, on_it()).await.unwrap_err();
    assert!(error.starts_with("InvalidOption: there is no lease"), "{error}");
    let held = slots(&client).await;
    assert_eq!((held.len(), number(&held[0], "slot")), (1, slot));
    client.call::<_, ()>(&job, "Job", "Cancel", &("", Dict::new())).await.unwrap();
    client.wait(&job).await.unwrap_err();
    is_over(&mut daemon).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_training_keeps_its_time_limit_over_a_restart() {
    const LIMIT: std::time::Duration = std::time::Duration::from_secs(8);
    let mut daemon = Daemon::start();
    let client = daemon.client().await;
    let since = std::time::Instant::now();
    let limit = dict([("timeout_usec", (LIMIT.as_micros() as u64).into())]);
    let job = train(&client, "rex", 100_000, limit).await.unwrap();
    let asked = client.get::<u64>(&job, "Job", "CreatedUSec").await;
    daemon.kill();
    daemon.restart();
    let client = daemon.client().await;
    assert_eq!(client.get::<u64>(&job, "Job", "CreatedUSec").await, asked);
    let error = client.wait(&job).await.unwrap_err();
    assert!(error.starts_with("TimedOut: ") && since.elapsed() >= LIMIT, "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn accepted_trainings_outlive_the_limits_of_the_queue() {
    let mut daemon = Daemon::start_with(None, "[jobs]\nqueue_limit = 2\nqueue_limit_per_client = 1\n", &[]);
    let clients = [daemon.client().await, daemon.client().await, daemon.client().await];
    let first = train(&clients[0], "a", 100_000, Dict::new()).await.unwrap();
    until("the start", || async { step_of(&clients[0], &first).await.0 >= 1 }).await;
    train(&clients[1], "b", 100_000, Dict::new()).await.unwrap();
    train(&clients[2], "c", 100_000, Dict::new()).await.unwrap();
    for _ in 0..2 {
        daemon.kill();
        daemon.restart();
        let client = daemon.client().await;
        let mut names: Vec<String> = active(&client).await.iter().map(|job| text(job, "description")).collect();
        names.sort();
        assert_eq!(names, ["a", "b", "c"], "{}", daemon.log());
        assert_eq!(slots(&client).await.len(), 3);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_file_may_not_say_is_refused_before_the_training() {
    let mut daemon = Daemon::start();
    let client = daemon.client().await;
    let wrong: [(&str, &str); 4] =
        [("licence", ""), ("licence", "a\tb"), ("created", "yesterday"), ("class_word", "dog\t")];
    for (key, value) in wrong {
        let (config, files) = training(2);
        let fds: Vec<zbus::Fd> = files.iter().map(|file| zbus::Fd::from(file.as_fd())).collect();
        let mut options = dict([("name", "rex".into()), ("class_word", "dog".into())]);
        options.extend(dict([(key, value.to_owned().into())]));
        let body = ("blocklora", config, fds, options);
        let error = client.call::<_, OwnedObjectPath>(ROOT, "Manager", "Train", &body).await.unwrap_err();
        assert!(error.starts_with(&format!("InvalidOption: {key} = {value:?}: must be ")), "{error}");
    }
    let (mut config, files) = training(2);
    config.extend(dict([("alpha", 0.0f64.into())]));
    let fds: Vec<zbus::Fd> = files.iter().map(|file| zbus::Fd::from(file.as_fd())).collect();
    let body = ("blocklora", config, fds, dict([("name", "rex".into()), ("class_word", "dog".into())]));
    let error = client.call::<_, OwnedObjectPath>(ROOT, "Manager", "Train", &body).await.unwrap_err();
    assert!(error.starts_with("InvalidOption: ") && error.contains("alpha"), "{error}");
    is_over(&mut daemon).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_training_whose_adapter_cannot_be_added_keeps_its_checkpoint() {
    let mut daemon = Daemon::start();
    let client = daemon.client().await;
    let (library, away) = (daemon.state().join("adapters"), daemon.state().join("away"));
    let job = train(&client, "rex", 5, Dict::new()).await.unwrap();
    std::fs::rename(&library, &away).unwrap();
    client.wait(&job).await.unwrap_err();
    std::fs::rename(&away, &library).unwrap();
    is_over(&mut daemon).await;
    // It may say something else now: that does not change what was trained.
    let client = daemon.client().await;
    let options = dict([("resume", true.into()), ("licence", "CC0-1.0".into()), ("storage", "f16".into())]);
    let job = train(&client, "rex", 5, options).await.unwrap();
    assert_eq!(number(&client.wait(&job).await.unwrap(), "resumed_at"), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_kept_checkpoints_the_newest_stay() {
    let mut daemon = Daemon::start_with(None, "[jobs]\ncheckpoints_max = 1\n", &[]);
    let client = daemon.client().await;
    for name in ["a", "b"] {
        let job = train(&client, name, 100_000, Dict::new()).await.unwrap();
        until("a step", || async { step_of(&client, &job).await.0 >= 1 }).await;
        client.call::<_, ()>(&job, "Job", "Cancel", &("checkpoint", Dict::new())).await.unwrap();
        client.wait(&job).await.unwrap_err();
        assert_eq!(count(&daemon.state().join("checkpoints")), 1);
    }
    is_over(&mut daemon).await;
    let client = daemon.client().await;
    for (name, there) in [("a", false), ("b", true)] {
        let job = train(&client, name, 100_000, dict([("resume", true.into())])).await.unwrap();
        until("the training or its end", || async {
            step_of(&client, &job).await.0 >= 1 || client.get::<String>(&job, "Job", "State").await == "failed"
        })
        .await;
        assert_eq!(client.get::<String>(&job, "Job", "State").await == "running", there, "{name}");
    }
}
