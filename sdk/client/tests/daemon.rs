//! What the client can do, tried on the real daemon: the same body on a message bus and on the socket.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs::File;
use std::time::{Duration, Instant};

use blocklora_client::{
    CancelMode, Client, Entry, Error, ErrorKind, Generate, JobOptions, Load, Merge, Options, Partition, Place, Train,
};
use common::{Home, adapter, root};
use futures_util::StreamExt;
use serde_json::json;

/// A drawing that takes long.
fn long() -> Generate {
    Generate { count: Some(1000), steps: Some(900), ..Generate::new("a cat") }
}

async fn library(client: &Client) -> usize {
    client.library(Options::new()).await.unwrap().len()
}

async fn tells_what_it_is(client: &Client) {
    let status = client.status().await.unwrap();
    assert_eq!(status.version, env!("CARGO_PKG_VERSION"));
    assert!(status.samplers.iter().any(|id| id == "ddim") && status.strategies.iter().any(|id| id == "blocklora"));
    assert!(!client.devices().await.unwrap().is_empty() && status.queue_limit > 0);
    let models = client.models().await.unwrap();
    let default = models[0].state().await.unwrap();
    assert_eq!(default.id, status.default_model);
    assert_eq!(default.path, root().join("daemon/starter/model").to_str().unwrap());
    let plugins = client.plugins().await.unwrap();
    let mut ids = Vec::new();
    for plugin in &plugins {
        ids.push(plugin.state().await.unwrap().id);
    }
    assert!(ids.iter().any(|id| id.ends_with("dpmpp-2m")), "{ids:?}");
}

async fn keeps_a_library(client: &Client) {
    let before = library(client).await;
    let one = client.register_adapter(&adapter(0)).await.unwrap();
    let again = client.register_adapter(&adapter(0)).await.unwrap();
    assert_eq!(one.path(), again.path(), "the same file twice is one entry");
    assert_eq!(library(client).await, before + 1);
    let state = one.state().await.unwrap();
    assert!(state.problems.is_empty() && adapter(0).file_stem().unwrap() == state.name.as_str());
    let found = client.open_adapter(&state.digest[..12]).await.unwrap();
    assert_eq!(found.path(), one.path());
    let file = one.export("blocklora").await.unwrap();
    assert!(file[0].bytes == std::fs::read(adapter(0)).unwrap(), "the file itself comes back");
    let peft = one.export("peft").await.unwrap();
    assert!(peft.len() > 1 && peft.iter().any(|f| f.name.ends_with("adapter_config.json")));
    assert!(one.inspect().await.unwrap()["manifest"].as_str().unwrap().contains(&state.name));
    let slots = client.slots(Some(&state.base_digest), Some(&Partition::default())).await.unwrap();
    assert!(slots.iter().any(|slot| slot.digest == state.digest), "{slots:?}");
    one.unregister(true).await.unwrap();
    assert_eq!(library(client).await, before);
    let gone = client.open_adapter(&state.digest).await.unwrap_err();
    assert_eq!(gone.kind(), Some(ErrorKind::AdapterNotFound), "{gone}");
}

async fn draws(client: &Client) {
    let before = library(client).await;
    let one = client.borrow_adapter(&adapter(1)).await.unwrap();
    assert_eq!(library(client).await, before, "a borrowed adapter is not in the library");
    let name = one.state().await.unwrap().name;
    let request = Generate {
        steps: Some(4),
        seed: Some(3),
        count: Some(2),
        adapters: vec![Entry::new(&one).weight(0.5)],
        ..Generate::new(format!("a <{name}>"))
    };
    let job = client.generate(&request).await.unwrap();
    let done = job.wait().await.unwrap();
    assert_eq!((done.images, &done.seeds[..]), (2, &[3, 4][..]));
    assert_eq!((done.adapters[0].name.as_str(), done.adapters[0].weight), (name.as_str(), 0.5));
    let files = job.take_results(false).await.unwrap();
    let raw: Vec<_> = files.iter().filter(|f| f.media_type == "image/x-raw-rgb").collect();
    let png: Vec<_> = files.iter().filter(|f| f.media_type == "image/png").collect();
    assert_eq!((raw.len(), png.len()), (2, 2));
    let [width, height, stride] = ["width", "height", "stride"].map(|key| raw[0].number(key).unwrap() as usize);
    assert!(stride == 3 * width && raw[0].bytes.len() == stride * height && raw[0].bytes != raw[1].bytes);
    assert!(png[0].bytes.starts_with(b"\x89PNG") && png[0].text("parameters").contains("Seed: 3"));
    // More files than one answer holds, kept and then taken.
    let many = Generate { count: Some(20), steps: Some(1), ..request.clone() };
    let job = client.generate(&many).await.unwrap();
    job.wait().await.unwrap();
    let kept = job.take_results(true).await.unwrap();
    assert_eq!(kept.len(), 40);
    assert!(kept.iter().enumerate().all(|(place, file)| file.index as usize == place / 2));
    assert_eq!(job.take_results(false).await.unwrap(), kept);
    assert_eq!(job.take_results(false).await.unwrap(), []);
    // The same through a composition, to the byte.
    let model = client.models().await.unwrap().remove(0);
    let set = model.compose(&[Entry::new(&one).weight(0.5)], Options::new()).await.unwrap();
    let target = Some(set.path().clone().into());
    let job = client.generate(&Generate { target, adapters: Vec::new(), ..request }).await.unwrap();
    job.wait().await.unwrap();
    let again = job.take_results(false).await.unwrap();
    assert!(again.iter().find(|f| f.media_type == "image/png").unwrap().bytes == png[0].bytes);
    let generation = set.generation().await.unwrap();
    assert_eq!(set.swap(&[], generation, Options::new()).await.unwrap(), generation + 1);
    let late = set.swap(&[], generation, Options::new()).await.unwrap_err();
    assert_eq!(late.kind(), Some(ErrorKind::GenerationConflict));
    set.close().await.unwrap();
    one.unregister(false).await.unwrap();
}

async fn shows_progress_and_cancels(client: &Client) {
    let job = client.generate(&long()).await.unwrap();
    let mut progress = job.progress().await.unwrap();
    let mut previews = job.previews(0, 64).await.unwrap();
    let frame = previews.next().await.unwrap().unwrap();
    assert!(frame.png.starts_with(b"\x89PNG") && frame.width <= 64 && frame.steps == 900);
    let moving = async {
        while let Some(state) = progress.next().await {
            if state.step.0 > 2 && state.progress_valid && state.progress > 0.0 {
                return state;
            }
        }
        panic!("no progress");
    };
    let state = tokio::time::timeout(Duration::from_secs(60), moving).await.unwrap();
    assert_eq!((state.kind.as_str(), state.state.as_str(), state.step.1), ("generate", "running", 900_000));
    assert!(client.jobs(Options::new().with("active", true), 0, 10).await.unwrap().iter().any(|j| j.id == job.id()));
    job.cancel(CancelMode::Discard).await.unwrap();
    let error = job.wait().await.unwrap_err();
    assert_eq!(error.kind(), Some(ErrorKind::Cancelled), "{error}");
    // The last state is the final one, then the stream ends.
    let mut last = state;
    while let Some(state) = progress.next().await {
        last = state;
    }
    assert_eq!(last.state, "cancelled");
}

/// Rules of signals are taken back: a connection has only so many of them on the socket.
async fn follows_jobs_without_end(client: &Client) {
    let job = client.empty_job().await.unwrap();
    job.wait().await.unwrap();
    for _ in 0..300 {
        assert_eq!(job.progress().await.unwrap().next().await.unwrap().state, "done");
    }
}

async fn names_errors(client: &Client) {
    let error = |e: Error| e.kind().unwrap_or_else(|| panic!("{e} has no name"));
    let unknown = Generate { sampler: Some("magic".into()), ..Generate::new("a cat") };
    assert_eq!(error(client.generate(&unknown).await.unwrap_err()), ErrorKind::PluginNotFound);
    let steps = Generate { steps: Some(0), ..Generate::new("a cat") };
    let refused = client.generate(&steps).await.unwrap_err();
    assert!(refused.to_string().contains("steps"), "{refused}");
    assert_eq!(error(refused), ErrorKind::InvalidOption);
    let load = Load { precision: Some("f64".into()), ..Load::default() };
    let id = client.status().await.unwrap().default_model;
    assert_eq!(error(client.load_model(&id, &load).await.unwrap_err()), ErrorKind::InvalidOption);
    assert_eq!(error(client.load_model("none", &Load::default()).await.unwrap_err()), ErrorKind::ModelNotFound);
    let junk = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(junk.path(), "no adapter").unwrap();
    assert_eq!(error(client.register_adapter(junk.path()).await.unwrap_err()), ErrorKind::InvalidAdapter);
    let job = client.generate(&long()).await.unwrap();
    assert_eq!(error(job.take_results(false).await.unwrap_err()), ErrorKind::JobNotFinished);
    job.cancel(CancelMode::Discard).await.unwrap();
    let missing = client.job::<serde_json::Value>("/org/blocklora/Daemon1/job/none".try_into().unwrap()).await.unwrap();
    assert!(matches!(missing.wait().await.unwrap_err(), Error::NoSuchObject(_)));
    let jobs = JobOptions { timeout_usec: Some(1), ..JobOptions::default() };
    let late = client.generate(&Generate { job: jobs, ..long() }).await.unwrap().wait().await.unwrap_err();
    assert_eq!(error(late), ErrorKind::TimedOut);
}

async fn merges_and_bakes(client: &Client) {
    let (one, other) =
        (client.borrow_adapter(&adapter(0)).await.unwrap(), client.borrow_adapter(&adapter(1)).await.unwrap());
    let set = vec![Entry::new(&one), Entry::new(&other)];
    let job = client.merge(&Merge { adapters: set, ..Merge::default() }).await.unwrap();
    let merged = job.wait().await.unwrap();
    assert!(merged.rows_rewritten > 0);
    let set = client.composition(merged.composition.try_into().unwrap()).await.unwrap();
    let report = set.explain(false).await.unwrap();
    assert_eq!(report["norms"].as_array().unwrap().len(), 2, "{report:?}");
    let archive = tempfile::NamedTempFile::new().unwrap();
    let job = client.bake(&set, archive.as_file(), &JobOptions::default()).await.unwrap();
    let baked = job.wait().await.unwrap();
    let bytes = std::fs::read(archive.path()).unwrap();
    assert_eq!(bytes.len() as u64, baked.bytes);
    assert_eq!(&bytes[257..262], b"ustar");
    set.close().await.unwrap();
}

async fn trains(client: &Client, name: &str) {
    let folder = root().join("daemon/starter/concepts");
    let photos = folder.read_dir().unwrap().map(|e| e.unwrap().path()).find(|p| p.is_dir()).unwrap();
    let picture = photos.read_dir().unwrap().map(|e| e.unwrap().path());
    let picture = picture.into_iter().find(|p| p.extension().is_some_and(|e| e == "png" || e == "jpg")).unwrap();
    let pictures = [File::open(&picture).unwrap()];
    let config = json!({ "steps": 2, "batch_size": 1, "rank": 2, "learning_rate": { "unet": 1e-4 } });
    let request = Train { seed: Some(1), ..Train::new(name, "dog") };
    let job = client.train("blocklora", config.as_object().unwrap(), &pictures, &request).await.unwrap();
    let trained = job.wait().await.unwrap();
    assert_eq!((trained.name.as_str(), trained.steps), (name, 2));
    let file = job.take_results(false).await.unwrap().remove(0);
    assert!(file.media_type == "application/vnd.safetensors" && file.bytes.len() > 1000);
    client.open_adapter(name).await.unwrap().unregister(true).await.unwrap();
    // More pictures than a message on a bus carries as files; the last is none, which is said with its number.
    let mut many: Vec<File> = (0..20).map(|_| File::open(&picture).unwrap()).collect();
    let captions = (0..20).map(|i| format!("a {{c}} number {i}")).collect();
    let twenty = Train { captions, ..request.clone() };
    let job = client.train("blocklora", config.as_object().unwrap(), &many, &twenty).await.unwrap();
    assert_eq!(job.wait().await.unwrap().steps, 2);
    client.open_adapter(name).await.unwrap().unregister(true).await.unwrap();
    many[19] = File::open(root().join("README.md")).unwrap();
    let error = client.train("blocklora", config.as_object().unwrap(), &many, &twenty).await.unwrap_err();
    assert!(error.kind() == Some(ErrorKind::InvalidOption) && error.to_string().contains("picture 19"), "{error}");
    let wrong = json!({ "stepz": 2 });
    let error = client.train("blocklora", wrong.as_object().unwrap(), &pictures, &request).await.unwrap_err();
    assert!(error.kind() == Some(ErrorKind::InvalidOption) && error.to_string().contains("stepz"), "{error}");
}

async fn body(client: &Client, name: &str) {
    tells_what_it_is(client).await;
    keeps_a_library(client).await;
    draws(client).await;
    shows_progress_and_cancels(client).await;
    follows_jobs_without_end(client).await;
    names_errors(client).await;
    merges_and_bakes(client).await;
    trains(client, name).await;
    client.empty_job().await.unwrap().wait().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_works_on_bus_and_socket() {
    let home = Home::new().await;
    for (place, name) in home.places().into_iter().zip(["over-bus", "over-socket"]) {
        println!("on {place}");
        body(&Client::connect(place).await.unwrap(), name).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pending_calls_fail_at_once_when_the_daemon_goes_and_the_client_connects_again() {
    let mut home = Home::new().await;
    for place in home.places() {
        let client = Client::connect(place.clone()).await.unwrap();
        let job = client.generate(&long()).await.unwrap();
        let mut progress = job.progress().await.unwrap();
        let waiting = job.clone();
        let pending = tokio::spawn(async move { waiting.wait().await });
        while progress.next().await.unwrap().state != "running" {}
        let killed = Instant::now();
        home.kill();
        let error = tokio::time::timeout(Duration::from_secs(5), pending).await.unwrap().unwrap().unwrap_err();
        assert!(error.is_disconnected(), "{place}: {error:?}");
        assert!(killed.elapsed() < Duration::from_secs(2), "{place}: {:?}", killed.elapsed());
        // The stream of states ends, too.
        tokio::time::timeout(Duration::from_secs(5), async { while progress.next().await.is_some() {} }).await.unwrap();
        assert!(client.status().await.unwrap_err().is_disconnected());
        home.start().await;
        client.reconnect(Duration::from_secs(20)).await.unwrap();
        client.status().await.unwrap();
    }
}

#[tokio::test]
async fn a_place_without_a_daemon_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bus");
    let error = Client::connect(Place::Socket(path.clone())).await.unwrap_err();
    assert!(matches!(&error, Error::NotRunning { place, .. } if place.contains("bus")), "{error}");
    // A socket whose owner says nothing is given up.
    let _silent = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let started = Instant::now();
    let error = Client::connect(Place::Socket(path)).await.unwrap_err();
    assert!(error.is_disconnected() && started.elapsed() < Duration::from_secs(15), "{error}");
}
