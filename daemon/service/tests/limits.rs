//! What one client may cost all others: long texts, answers that it does not read, messages that it only claims to send,
//! results that it does not take.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use blocklora_spec::{Adapter, AdapterBuilder, Layer, Manifest, Storage};
use common::raw::raw_connection;
use common::{Bus, Client, Daemon, Dict, ROOT, adapter_file, alive, bring, dict, stub, until};
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use zbus::{OwnedObjectPath, OwnedVariant, Structure};

/// Bytes of a text that is shown.
const TEXT_MAX: usize = 1024;
const OBJECTS: &str = "org.freedesktop.DBus.ObjectManager";

fn text(entry: &Dict, key: &str) -> String {
    String::try_from(entry[key].try_clone().unwrap()).unwrap()
}

/// Jobs that fail with as much to say as a request can make them; their paths.
async fn talkative(client: &Client, count: usize) -> Vec<String> {
    let lasting = || dict([("lifetime", "daemon".into())]);
    let mut jobs = Vec::new();
    for _ in 0..count {
        // Every character of it is six when it is shown.
        let prompt = "\u{1}".repeat(64 << 10);
        jobs.push(client.generate("/", stub::picture(&prompt, 1, 1), lasting()).await.unwrap());
    }
    jobs
}

/// All drawings, page by page; how many pages they are.
async fn all_jobs(client: &Client) -> (Vec<Dict>, usize) {
    let (mut all, mut pages) = (Vec::new(), 0);
    loop {
        let body = (dict([("kind", "generate".into())]), all.len() as u32, 1000u32);
        let page: Vec<Dict> = client.call(ROOT, "Manager", "ListJobs", &body).await.unwrap();
        if page.is_empty() {
            return (all, pages);
        }
        pages += 1;
        all.extend(page);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn long_texts_are_cut_and_lists_come_in_pages() {
    const JOBS: usize = 700;
    let bus = Bus::start_with_system_limits();
    let limits = "[jobs]\nqueue_limit_per_client = 1000\nresults_keep_max = 300\n";
    let mut daemon = stub::daemon_on(Some(&bus), limits, &[]);
    let client = Client::on_bus(&bus).await;
    let jobs = talkative(&client, JOBS).await;
    let last = &jobs[JOBS - 1];
    let error = client.wait(last).await.unwrap_err();
    assert!(error.starts_with("InvalidOption: prompt \"\\u{1}") && error.contains("...\": 65536 tokens"), "{error}");
    assert!(error.len() < TEXT_MAX, "{}", error.len());
    let description: String = client.get(last, "Job", "Description").await;
    assert_eq!(description.len(), TEXT_MAX);
    let error: OwnedVariant = client.get(last, "Job", "Error").await;
    let (_, message, _): (String, String, Dict) = Structure::try_from(error).unwrap().try_into().unwrap();
    assert!(message.len() < TEXT_MAX, "{}", message.len());
    let objects: HashMap<OwnedObjectPath, HashMap<String, Dict>> =
        client.call(ROOT, OBJECTS, "GetManagedObjects", &()).await.unwrap();
    assert!(objects.keys().any(|path| path.as_str() == last));
    // Those that are objects, and those of the history.
    for client in [client, daemon.client().await] {
        let (all, pages) = all_jobs(&client).await;
        let ids: BTreeSet<String> = all.iter().map(|job| text(job, "id")).collect();
        assert_eq!((all.len(), ids.len()), (JOBS, JOBS));
        assert!(pages > 1, "a message of all");
        assert!(all.iter().all(|job| text(job, "description").len() == TEXT_MAX));
        alive(&mut daemon, &client).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_is_shown_by_its_beginning() {
    let bus = Bus::start_with_system_limits();
    let mut daemon = stub::daemon_on(Some(&bus), "", &[]);
    for client in [Client::on_bus(&bus).await, daemon.client().await] {
        // A name that is no name, and one that is longer than a name may be.
        for name in ["two words", "x".repeat(65).as_str(), "q".repeat(8 << 20).as_str()] {
            let options = dict([("name", name.to_owned().into())]);
            let error = client.call::<_, (String, u32)>(ROOT, "Manager", "LeaseSlot", &(Dict::new(), options)).await;
            let error = error.unwrap_err();
            assert!(error.starts_with("InvalidOption: option \"name\": "), "{error}");
            assert!(error.contains("must be 1 to 64") && error.len() < 300, "{}", error.len());
        }
        // A key that nobody knows.
        let key = "\u{1}".repeat(8 << 20);
        let options: Dict = [(key, OwnedVariant::from(1u32))].into();
        let error = client.call::<_, OwnedObjectPath>(ROOT, "Manager", "EmptyJob", &(options,)).await.unwrap_err();
        assert!(error.starts_with("InvalidOption: unknown option") && error.len() < 5000, "{}", error.len());
        alive(&mut daemon, &client).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reply_that_is_too_large_is_refused_and_the_daemon_stays() {
    let bus = Bus::start_with_system_limits();
    let limits = "[jobs]\nqueue_limit = 20000\nqueue_limit_per_client = 20000\nresults_keep_max = 20000\n";
    let mut daemon = stub::daemon_on(Some(&bus), limits, &[]);
    let client = Client::on_bus(&bus).await;
    // Jobs that wait are objects as those that have ended are, and are made faster.
    let mut blocker = stub::picture("a dog", 1, 900);
    blocker.extend(dict([("count", 1000u32.into())]));
    client.generate("/", blocker, Dict::new()).await.unwrap();
    let prompt = "x".repeat(TEXT_MAX);
    let mut asked = Vec::new();
    for _ in 0..8 {
        let (client, prompt) = (client.clone(), prompt.clone());
        asked.push(tokio::spawn(async move {
            for _ in 0..1500 {
                client.generate("/", stub::picture(&prompt, 1, 1), Dict::new()).await.unwrap();
            }
        }));
    }
    for task in asked {
        task.await.unwrap();
    }
    let error = client.message(ROOT, OBJECTS, "GetManagedObjects", &()).await.unwrap_err().to_string();
    assert!(error.contains("LimitsExceeded") && error.contains("GetManagedObjects: the reply has"), "{error}");
    let page: Vec<Dict> = client.call(ROOT, "Manager", "ListJobs", &(Dict::new(), 0u32, 1000u32)).await.unwrap();
    assert!(!page.is_empty());
    assert!(daemon.lives());
}

/// A call without arguments, as bytes.
fn bytes_of(member: &str, interface: &str) -> Vec<u8> {
    let call = zbus::Message::method_call(ROOT, member).interface(interface).build(&()).unwrap();
    call.data().bytes().to_vec()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_does_not_read_costs_little_and_is_disconnected() {
    let mut daemon = stub::daemon("");
    let client = daemon.client().await;
    for _ in 0..300 {
        alive(&mut daemon, &client).await;
    }
    let before = daemon.memory();
    let mut deaf = raw_connection(&daemon);
    deaf.set_write_timeout(Some(Duration::from_secs(2))).unwrap();
    let call = bytes_of("GetManagedObjects", OBJECTS);
    // As much as it takes.
    let since = Instant::now();
    let mut sent = 0;
    while sent < 16_000 && deaf.write_all(&call).is_ok() {
        sent += 1;
        assert!(daemon.memory() < before + (160 << 20), "{sent} calls: {} MB", daemon.memory() >> 20);
    }
    println!("{sent} calls, {} MB more", daemon.memory().saturating_sub(before) >> 20);
    assert!(sent < 16_000, "every call was read");
    // Nobody else notices.
    assert_eq!(connected(&client).await, 3);
    alive(&mut daemon, &client).await;
    until("the end of the connection", || async { connected(&client).await == 2 }).await;
    assert!(since.elapsed() > Duration::from_secs(20), "after {:?} only", since.elapsed());
    alive(&mut daemon, &client).await;
}

/// How many are connected to the socket, the daemon itself included.
async fn connected(client: &Client) -> usize {
    let path = "/org/freedesktop/DBus";
    let names: Vec<String> = client.call(path, "org.freedesktop.DBus", "ListNames", &()).await.unwrap();
    names.iter().filter(|name| name.starts_with(":peer.")).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_is_only_claimed_costs_nothing() {
    let mut daemon = stub::daemon("");
    let client = daemon.client().await;
    alive(&mut daemon, &client).await;
    let before = daemon.memory();
    let claim = |bytes: u32| {
        [&[b'l', 1, 0, 1][..], &bytes.to_le_bytes(), &1u32.to_le_bytes(), &16u32.to_le_bytes(), &[0; 16]].concat()
    };
    let mut waiting = Vec::new();
    for _ in 0..16 {
        // Too much: the end.
        let mut stream = raw_connection(&daemon);
        stream.write_all(&claim(120 << 20)).unwrap();
        assert!(matches!(stream.read(&mut [0; 256]), Ok(0) | Err(_)));
        // It may be so large, and does not come.
        let mut stream = raw_connection(&daemon);
        stream.write_all(&claim(15 << 20)).unwrap();
        waiting.push(stream);
    }
    alive(&mut daemon, &client).await;
    let grown = daemon.memory().saturating_sub(before);
    assert!(grown < 32 << 20, "{} MB for 16 claims of 15 MiB", grown >> 20);
    // Larger than a message may be, and sent.
    let large = client.generate("/", stub::picture(&"x".repeat(17 << 20), 1, 1), Dict::new());
    assert!(tokio::time::timeout(Duration::from_secs(60), large).await.unwrap().is_err());
    let client = daemon.client().await;
    alive(&mut daemon, &client).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn results_that_nobody_takes_leave_files_for_the_others() {
    const FILES: usize = 256;
    let mut daemon = stub::daemon("");
    let client = daemon.client().await;
    alive(&mut daemon, &client).await;
    limit_files(&daemon, FILES as u64);
    let open = || std::fs::read_dir(format!("/proc/{}/fd", daemon.child.id())).unwrap().count();
    let own = open();
    let draw = async |count: u32| {
        let mut params = stub::picture("a dog", 1, 1);
        params.extend(dict([("count", count.into())]));
        let job = client.generate("/", params, Dict::new()).await.unwrap();
        client.wait(&job).await.map(|_| job)
    };
    // Two files each.
    let error = draw(65).await.unwrap_err();
    assert!(error.starts_with("NotSupported: 130 files of results are more than the 128"), "{error}");
    let mut jobs = Vec::new();
    for _ in 0..6 {
        jobs.push(draw(30).await.unwrap());
        assert!(open() <= own + FILES / 2 + 4, "{} files, {own} without results", open());
        daemon.client().await.call::<_, u64>(ROOT, "Manager", "CountLibrary", &(Dict::new(),)).await.unwrap();
    }
    // The oldest went, the newest two are there.
    assert!(client.results(&jobs[0]).await.unwrap_err().contains("UnknownObject"));
    for job in &jobs[4..] {
        assert_eq!(client.results(job).await.unwrap().len(), 60);
    }
    alive(&mut daemon, &client).await;
}

/// Leaves the daemon so many file descriptors.
fn limit_files(daemon: &Daemon, files: u64) {
    let limit = Rlimit { current: Some(files), maximum: Some(files) };
    prlimit(Some(Pid::from_child(&daemon.child)), Resource::Nofile, limit).unwrap();
}

/// A small adapter that differs from others by its name, and how many bytes it has.
fn small_adapter(folder: &Path, name: &str) -> (File, u64) {
    let poodle = Adapter::open(adapter_file("poodle")).unwrap();
    let manifest = Manifest { name: name.to_owned(), tokens: vec![], rank: 1, ..poodle.manifest().clone() };
    let rows = manifest.partition.unwrap().count(16);
    let (a, b) = (vec![0.5; 4], vec![0.5; rows]);
    let layer = Layer { name: "unet.l.x", outputs: 16, a: &a, b: &b };
    let path = folder.join(format!("{name}.safetensors"));
    AdapterBuilder::new(&manifest, Storage::F32).layer(layer).write(&path).unwrap();
    (File::open(&path).unwrap(), path.metadata().unwrap().len())
}

#[tokio::test(flavor = "multi_thread")]
async fn adapters_of_connections_are_bounded_in_bytes_and_in_files() {
    let folder = tempfile::tempdir().unwrap();
    let (first, bytes) = small_adapter(folder.path(), "a0");
    let limits = format!("[limits]\nadapter_bytes_per_client_max = {}\n", 40 * bytes);
    let mut daemon = stub::daemon(&limits);
    limit_files(&daemon, 256);
    let client = daemon.client().await;
    let path = bring(&client, &first).await.unwrap();
    let mut all = Vec::new();
    for i in 1..32 {
        all.push(small_adapter(folder.path(), &format!("a{i}")).0);
        bring(&client, &all[i - 1]).await.unwrap();
    }
    // What is there already takes no more, also for others.
    bring(&client, &first).await.unwrap();
    let other = daemon.client().await;
    bring(&other, &first).await.unwrap();
    let (more, _) = small_adapter(folder.path(), "more");
    let error = bring(&other, &more).await.unwrap_err();
    assert!(
        error.starts_with("NotSupported: 32 adapters of connections are open") && error.contains("ulimit"),
        "{error}"
    );
    // Room is made by giving one back.
    other.call::<_, ()>(&path, "Adapter", "Unregister", &(Dict::new(),)).await.unwrap();
    client.call::<_, ()>(&path, "Adapter", "Unregister", &(Dict::new(),)).await.unwrap();
    bring(&other, &more).await.unwrap();
    drop(client);
    until("the end of the brought adapters", || async { bring(&other, &first).await.is_ok() }).await;
    // With these two.
    for file in &all[..30] {
        bring(&other, file).await.unwrap();
    }
    alive(&mut daemon, &other).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn adapters_of_a_connection_have_so_many_bytes_together_and_no_more() {
    let folder = tempfile::tempdir().unwrap();
    let files: Vec<(File, u64)> = ["a", "b", "c"].map(|name| small_adapter(folder.path(), name)).into();
    let limits = format!("[limits]\nadapter_bytes_per_client_max = {}\n", files[0].1 + files[1].1);
    let daemon = stub::daemon(&limits);
    let client = daemon.client().await;
    bring(&client, &files[0].0).await.unwrap();
    bring(&client, &files[1].0).await.unwrap();
    let error = bring(&client, &files[2].0).await.unwrap_err();
    assert!(error.starts_with("NotSupported: ") && error.contains("limits.adapter_bytes_per_client_max"), "{error}");
    // Every client has as many.
    bring(&daemon.client().await, &files[2].0).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn previews_leave_files_for_the_others() {
    let mut daemon = stub::daemon("");
    let client = daemon.client().await;
    limit_files(&daemon, 256);
    let mut jobs = Vec::new();
    for _ in 0..3 {
        let mut params = stub::picture("a dog", 1, 900);
        // As many as may be kept, so that they run for long.
        params.extend(dict([("count", 60u32.into())]));
        jobs.push(client.generate("/", params, Dict::new()).await.unwrap());
    }
    let watch = |job: &String| {
        let (client, job) = (client.clone(), job.clone());
        async move { client.call::<_, zbus::OwnedFd>(&job, "Job", "OpenPreviews", &(Dict::new(),)).await }
    };
    let mut watched = Vec::new();
    for job in jobs[..2].iter().cycle().take(32) {
        watched.push(watch(job).await.unwrap());
    }
    let error = watch(&jobs[2]).await.unwrap_err();
    assert!(error.starts_with("NotSupported: 32 previews are watched"), "{error}");
    client.call::<_, ()>(&jobs[1], "Job", "Cancel", &("", Dict::new())).await.unwrap();
    watch(&jobs[2]).await.unwrap();
    // Also of a job that waits: who no longer watches takes no room.
    let waiting = client.generate("/", stub::picture("a dog", 1, 1), Dict::new()).await.unwrap();
    drop(watched);
    let mut watched = Vec::new();
    for job in [&jobs[2], &waiting].iter().cycle().take(30) {
        watched.push(watch(job).await.unwrap());
    }
    drop(watched);
    for _ in 0..16 {
        watch(&waiting).await.unwrap();
    }
    for job in [&jobs[0], &jobs[2]] {
        client.call::<_, ()>(job, "Job", "Cancel", &("", Dict::new())).await.unwrap();
    }
    alive(&mut daemon, &client).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_greets_with_an_empty_line_keeps_no_place() {
    let mut daemon = stub::daemon("[limits]\nconnections_max = 2\n");
    for _ in 0..3 {
        let mut stream = UnixStream::connect(daemon.socket()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.write_all(b"\n").unwrap();
        // It is disconnected at once, not when its time is over.
        assert!(matches!(stream.read(&mut [0; 64]), Ok(0)));
    }
    let client = daemon.client().await;
    alive(&mut daemon, &client).await;
    assert!(!daemon.log().contains("panicked"), "{}", daemon.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn who_waited_for_a_job_and_has_gone_leaves_nothing_open() {
    let mut daemon = stub::daemon("");
    let client = daemon.client().await;
    let mut params = stub::picture("a dog", 1, 900);
    params.extend(dict([("count", 1000u32.into())]));
    let job = client.generate("/", params, Dict::new()).await.unwrap();
    let open = || std::fs::read_dir(format!("/proc/{}/fd", daemon.child.id())).unwrap().count();
    until("the start", || async { client.get::<String>(&job, "Job", "State").await == "running" }).await;
    let before = open();
    for _ in 0..50 {
        let other = daemon.client().await;
        let call = zbus::Message::method_call(job.as_str(), "Wait").interface("org.blocklora.Daemon1.Job");
        other.connection.send(&call.build(&()).unwrap()).await.unwrap();
        // The call has arrived: this one comes behind it.
        other.call::<_, u64>(ROOT, "Manager", "CountLibrary", &(Dict::new(),)).await.unwrap();
        other.connection.close().await.unwrap();
    }
    until("the end of the connections", || async { open() < before + 10 }).await;
    client.call::<_, ()>(&job, "Job", "Cancel", &("", Dict::new())).await.unwrap();
    alive(&mut daemon, &client).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn compositions_are_bounded_and_a_merging_that_fails_leaves_none() {
    let mut daemon = stub::daemon("[limits]\ncompositions_per_client_max = 3\n");
    let client = daemon.client().await;
    let running = client.generate("/", stub::picture("a dog", 1, 900), Dict::new()).await.unwrap();
    for _ in 0..5 {
        let parts = ("", common::entries_of(&[]), Dict::new());
        let job: OwnedObjectPath = client.call(ROOT, "Manager", "Merge", &parts).await.unwrap();
        client.call::<_, ()>(job.as_str(), "Job", "Cancel", &("", Dict::new())).await.unwrap();
        assert!(client.wait(job.as_str()).await.unwrap_err().starts_with("Cancelled: "));
    }
    client.call::<_, ()>(&running, "Job", "Cancel", &("", Dict::new())).await.unwrap();
    let keep = || dict([("lifetime", "daemon".into())]);
    let mut sets = Vec::new();
    for _ in 0..3 {
        sets.push(client.compose_on(stub::STUB, &[], Dict::new()).await.unwrap());
        client.compose_on(stub::STUB, &[], keep()).await.unwrap();
    }
    let full = |error: String, whose: &str| {
        let expected = format!("NotSupported: 3 compositions of this {whose} are open");
        assert!(error.starts_with(&expected) && error.contains("limits.compositions_per_client_max"), "{error}");
    };
    full(client.compose_on(stub::STUB, &[], Dict::new()).await.unwrap_err(), "client");
    // Those that stay are counted by user: another connection does not help.
    let again = daemon.client().await;
    full(again.compose_on(stub::STUB, &[], keep()).await.unwrap_err(), "user");
    again.compose_on(stub::STUB, &[], Dict::new()).await.unwrap();
    client.call::<_, ()>(&sets[0], "Composition", "Close", &()).await.unwrap();
    client.compose_on(stub::STUB, &[], Dict::new()).await.unwrap();
    alive(&mut daemon, &client).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_connects_when_no_more_files_can_be_opened_is_turned_away() {
    let mut daemon = stub::daemon("");
    let client = daemon.client().await;
    let pid = Pid::from_child(&daemon.child);
    let open = std::fs::read_dir(format!("/proc/{}/fd", daemon.child.id())).unwrap().count() as u64;
    let maximum = rustix::process::getrlimit(Resource::Nofile).maximum;
    let limit = |current: Option<u64>| {
        prlimit(Some(pid), Resource::Nofile, Rlimit { current, maximum }).unwrap();
    };
    limit(Some(open + 8));
    let mut clients = Vec::new();
    let mut turned_away = 0;
    for _ in 0..40 {
        let mut stream = UnixStream::connect(daemon.socket()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        // The daemon may be faster in closing it.
        let _ = stream.write_all(b"\0AUTH EXTERNAL 30\r\n");
        match stream.read(&mut [0; 64]) {
            Ok(n) if n > 0 => clients.push(stream),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => panic!("a client is left waiting"),
            _ => turned_away += 1,
        }
    }
    assert!(turned_away > 0, "{} clients came", clients.len());
    drop(clients);
    limit(maximum);
    alive(&mut daemon, &client).await;
    let client = daemon.client().await;
    alive(&mut daemon, &client).await;
}
