//! What clients bring and what they own: nobody gets the file of another, and nothing outlives its client.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use blocklora_spec::{Adapter, AdapterBuilder, Layer, Manifest, Partition, Scheme, Storage};
use common::{Bus, Client, Daemon, Dict, NAME, ROOT, adapter_file, dict, entries_of, long, small, until};
use zbus::{Message, OwnedObjectPath, Variant};

/// Brings a bundled adapter for the length of the connection; its path.
async fn bring(client: &Client, name: &str) -> String {
    let file = File::open(adapter_file(name)).unwrap();
    common::bring(client, &file).await.unwrap().as_str().to_owned()
}

/// Asks for the file of a brought adapter again and again.
async fn export(client: Client, name: &'static str) {
    let path = bring(&client, name).await;
    let file = std::fs::read(adapter_file(name)).unwrap();
    for turn in 0..150 {
        let format = ("blocklora", Dict::new());
        let files: Vec<(zbus::OwnedFd, Dict)> = client.call(&path, "Adapter", "Export", &format).await.unwrap();
        assert!(common::read_fd(&files[0].0) == file, "{name}, turn {turn}: another file");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_bring_adapters_get_their_own_files_back() {
    let daemon = Daemon::start();
    let (mut one, mut other) = (Vec::new(), Vec::new());
    for _ in 0..2 {
        one.push(tokio::spawn(export(daemon.client().await, "poodle")));
        other.push(tokio::spawn(export(daemon.client().await, "teddy")));
    }
    for task in one.into_iter().chain(other) {
        task.await.unwrap();
    }
}

async fn draw_with(client: &Client, adapter: &str) -> Result<Vec<u8>, String> {
    let mut params = small("a <poodle>", 5);
    params.extend(dict([("adapters", Variant::from(entries_of(&[(adapter, 1.0)])))]));
    client.draw("/", params).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_brought_file_counts_whatever_becomes_of_the_librarys() {
    // Factors are not kept from one job to the next: every job opens the file.
    let daemon = Daemon::start_with(None, "[models]\nadapter_cache_bytes = 0\n", &[]);
    let (client, other) = (daemon.client().await, daemon.client().await);
    let path = client.register("poodle").await;
    let pixels = draw_with(&client, &path).await.unwrap();
    let file = daemon.state().join("adapters").join(format!("{}.safetensors", path.rsplit('/').next().unwrap()));
    std::fs::remove_file(&file).unwrap();
    let error = draw_with(&client, &path).await.unwrap_err();
    assert!(error.starts_with("AdapterNotFound: "), "{error}");
    // The library's is missing, the client has one.
    assert_eq!(bring(&client, "poodle").await, path);
    assert!(client.get::<Vec<(String, String)>>(&path, "Adapter", "Problems").await.is_empty());
    assert!(draw_with(&client, &path).await.unwrap() == pixels);
    // It is sound again, and then somebody else takes it out.
    other.register("poodle").await;
    let remove = (dict([("remove", true.into())]),);
    other.call::<_, ()>(&path, "Adapter", "Unregister", &remove).await.unwrap();
    assert!(!file.exists());
    assert!(draw_with(&client, &path).await.unwrap() == pixels);
    drop(client);
    until("the end of the brought adapter", || async { draw_with(&other, &path).await.is_err() }).await;
    let error = draw_with(&other, &path).await.unwrap_err();
    assert!(error.ends_with("is not an adapter"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_waits_does_without_no_adapter_that_was_removed() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let path = client.register("poodle").await;
    // Its factors are in memory from here on.
    draw_with(&client, &path).await.unwrap();
    let running = client.generate("/", long(900), Dict::new()).await.unwrap();
    until("the start", || async { client.get::<String>(&running, "Job", "State").await == "running" }).await;
    let mut params = small("a <poodle>", 5);
    params.extend(dict([("adapters", Variant::from(entries_of(&[(&path, 1.0)])))]));
    let waiting = client.generate("/", params, Dict::new()).await.unwrap();
    client.call::<_, ()>(&path, "Adapter", "Unregister", &(dict([("remove", true.into())]),)).await.unwrap();
    client.call::<_, ()>(&running, "Job", "Cancel", &("", Dict::new())).await.unwrap();
    let error = client.wait(&waiting).await.unwrap_err();
    assert!(error.starts_with("AdapterNotFound: adapter \"poodle\""), "{error}");
}

/// Sends a call, and does not wait for its answer.
async fn send<B: serde::Serialize + zbus::DynamicType>(client: &Client, path: &str, member: &str, body: &B) {
    let interface = if path == ROOT { "Manager" } else { "Model" };
    let call = Message::method_call(path, member).interface(format!("{NAME}.{interface}"));
    let call = if client.bus { call.destination(NAME) } else { call };
    client.connection.send(&call.build(body).unwrap()).await.unwrap();
}

/// Clients that ask for all kinds of things and go at once.
async fn ask_and_go(client: Client, poodle: &str) {
    let count = dict([("count", 50u32.into())]);
    let file = File::open(adapter_file("teddy")).unwrap();
    let loose = (zbus::Fd::from(file.as_fd()), dict([("lifetime", "connection".into())]));
    send(&client, ROOT, "RegisterAdapter", &loose).await;
    let entries = entries_of(&[(poodle, 1.0)]);
    send(&client, &format!("{ROOT}/model/starter"), "Compose", &(&entries, Dict::new())).await;
    send(&client, ROOT, "Merge", &("", &entries, Dict::new())).await;
    let params: Dict = long(900).into_iter().chain(count).collect();
    send(&client, ROOT, "Generate", &(zbus::ObjectPath::try_from("/").unwrap(), params, Dict::new())).await;
    client.connection.close().await.unwrap();
}

/// What is left of clients that have gone: compositions, adapters that nobody has, unfinished jobs.
async fn left(client: &Client, poodle: &str) -> Vec<String> {
    let objects: HashMap<OwnedObjectPath, HashMap<String, Dict>> =
        client.call(ROOT, "org.freedesktop.DBus.ObjectManager", "GetManagedObjects", &()).await.unwrap();
    let mut left: Vec<String> = objects.into_keys().map(|path| path.as_str().to_owned()).collect();
    left.retain(|path| path.contains("/composition/") || path.contains("/adapter/") && path != poodle);
    let active = (dict([("active", true.into())]), 0u32, 1000u32);
    let jobs: Vec<Dict> = client.call(ROOT, "Manager", "ListJobs", &active).await.unwrap();
    left.extend(jobs.iter().map(|job| String::try_from(job["id"].try_clone().unwrap()).unwrap()));
    left
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_client_asked_for_just_before_it_left_goes_with_it() {
    let bus = Bus::start();
    let daemon = Daemon::start_with(Some(&bus), "", &[]);
    let client = daemon.client().await;
    let poodle = client.register("poodle").await;
    for _ in 0..40 {
        ask_and_go(daemon.client().await, &poodle).await;
        ask_and_go(Client::on_bus(&bus).await, &poodle).await;
    }
    until("the end of what they asked for", || async { left(&client, &poodle).await.is_empty() }).await;
    // Calls that were still being answered end, too.
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(left(&client, &poodle).await, Vec::<String>::new());
    assert!(!client.draw("/", small("a dog", 1)).await.unwrap().is_empty());
}

/// One row of 65,536 in each of three layers: 25 KiB that other formats write as 768 MiB, nearly all of them zeros.
fn write_adapter_of_few_rows(path: &Path) {
    let poodle = Adapter::open(adapter_file("poodle")).unwrap();
    let partition = Some(Partition { scheme: Scheme::Contiguous, capacity: 1 << 16, seed: 0, slot: 5 });
    let manifest = Manifest { partition, tokens: vec![], rank: 1024, ..poodle.manifest().clone() };
    let numbers = vec![1.5; 1024];
    let builder = (0..3).fold(AdapterBuilder::new(&manifest, Storage::F32), |builder, i| {
        builder.layer(Layer { name: &format!("unet.l{i}.x"), outputs: 1 << 16, a: &numbers, b: &numbers })
    });
    builder.write(path).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_takes_no_more_memory_than_the_adapter_has_rows() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("few.safetensors");
    write_adapter_of_few_rows(&file);
    let adapter = client.register_file(&file).await;
    let before = daemon.peak_memory();
    for format in ["kohya", "diffusers", "peft"] {
        let files: Vec<(zbus::OwnedFd, Dict)> =
            client.call(&adapter, "Adapter", "Export", &(format, Dict::new())).await.unwrap();
        let (fd, info) = files.last().unwrap();
        let stat = rustix::fs::fstat(fd).unwrap();
        assert_eq!(u64::try_from(info["size"].try_clone().unwrap()), Ok(stat.st_size as u64), "{format}");
        assert!(stat.st_size > 768 << 20, "{format}: {}", stat.st_size);
        assert!(stat.st_blocks * 512 < 1 << 20, "{format}: {} blocks of 512 bytes", stat.st_blocks);
        let grown = daemon.peak_memory() - before;
        assert!(grown < 64 << 20, "{format}: the daemon took {grown} bytes");
    }
}
