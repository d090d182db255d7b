//! Many clients at once while one trains: no request is lost, every picture is the one made alone, memory stays flat.
//! On a model that is real but small, so that thousands of jobs take seconds. Few here; BLOCKLORA_LOAD_CLIENTS and
//! BLOCKLORA_LOAD_JOBS make it as many as one likes.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::{Client, Daemon, Dict, ROOT, dict, step_of, stub};
use zbus::OwnedObjectPath;

/// Jobs that a client has in the queue at once.
const AT_ONCE: usize = 2;
/// How much memory may grow once everything that is kept has been filled.
const GROWTH_MAX: u64 = 24 << 20;

fn setting(name: &str, default: usize) -> usize {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

/// The daemon's memory at tenths of the work, printed as it goes.
struct Memory(Vec<u64>);

impl Memory {
    fn note(&mut self, daemon: &Daemon, done: usize, start: Instant) {
        let bytes = daemon.memory();
        println!("{done:6} jobs, {:6.1} s: {:6.1} MB", start.elapsed().as_secs_f64(), bytes as f64 / 1e6);
        self.0.push(bytes);
    }

    /// What is kept (results, history, the allocator's pages) is full after three tenths.
    fn assert_flat(&self) {
        let settled = self.0[3];
        let most = self.0[3..].iter().max().unwrap();
        assert!(*most < settled + GROWTH_MAX, "{:?}", self.0);
    }
}

/// A request and the picture that it makes alone.
type Alone = (String, String, u64, Vec<u8>);

async fn draw_alone(client: &Client) -> Vec<Alone> {
    let (milo, zuko) = (stub::adapter(client, "milo").await, stub::adapter(client, "zuko").await);
    let keep = || dict([("lifetime", "daemon".into())]);
    let mut alone = Vec::new();
    for (entries, prompt) in [
        (vec![], "a dog"),
        (vec![(milo.as_str(), 1.0)], "a <milo>"),
        (vec![(milo.as_str(), 0.7), (zuko.as_str(), 1.0)], "a <zuko> and a <milo>"),
    ] {
        let set = client.compose_on(stub::STUB, &entries, keep()).await.unwrap();
        for seed in 0..4 {
            let picture = client.draw(&set, stub::picture(prompt, seed, 2)).await.unwrap();
            alone.push((set.clone(), prompt.to_owned(), seed, picture));
        }
    }
    let different: BTreeSet<&Vec<u8>> = alone.iter().map(|(_, _, _, picture)| picture).collect();
    assert_eq!(different.len(), alone.len(), "pictures that are alike prove nothing");
    alone
}

#[tokio::test(flavor = "multi_thread")]
async fn many_clients_beside_a_training() {
    let clients = setting("BLOCKLORA_LOAD_CLIENTS", 12);
    let each = setting("BLOCKLORA_LOAD_JOBS", 600).div_ceil(clients);
    let daemon = stub::daemon("");
    let first = daemon.client().await;
    let alone = Arc::new(draw_alone(&first).await);
    let training = stub::train(&first, "rex", 1_000_000).await;
    // One that waits lets pictures go first; one that runs takes turns with them.
    let runs = async {
        while step_of(&first, &training).await.0 == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await
        }
    };
    tokio::time::timeout(Duration::from_secs(60), runs).await.expect("the training does not start");
    let done = Arc::new(AtomicUsize::new(0));
    let start = Instant::now();
    let mut tasks = Vec::new();
    for number in 0..clients {
        let (client, alone, done) = (daemon.client().await, alone.clone(), done.clone());
        tasks.push(tokio::spawn(async move {
            let mut waiting = VecDeque::new();
            for job in 0..each + AT_ONCE {
                if job < each {
                    let wanted = (5 * number + job) % alone.len();
                    let (set, prompt, seed, _) = &alone[wanted];
                    let raw = dict([("formats", vec!["raw".to_owned()].into())]);
                    let path = client.generate(set, stub::picture(prompt, *seed, 2), raw).await.unwrap();
                    waiting.push_back((path, wanted));
                }
                if waiting.len() > AT_ONCE || job >= each {
                    let Some((path, wanted)) = waiting.pop_front() else { break };
                    client.wait(&path).await.unwrap();
                    let files = client.results(&path).await.unwrap();
                    assert_eq!(files.len(), 1, "client {number}");
                    assert!(files[0].0 == alone[wanted].3, "client {number}: another picture than the one made alone");
                    done.fetch_add(1, Ordering::Relaxed);
                }
            }
        }));
    }
    let (all, mut memory) = (clients * each, Memory(Vec::new()));
    memory.note(&daemon, 0, start);
    while !tasks.iter().all(tokio::task::JoinHandle::is_finished) {
        let now = done.load(Ordering::Relaxed);
        if now >= all * memory.0.len() / 10 {
            memory.note(&daemon, now, start);
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    for task in tasks {
        task.await.unwrap();
    }
    assert_eq!(done.load(Ordering::Relaxed), all);
    memory.note(&daemon, all, start);
    let (steps, _) = step_of(&first, &training).await;
    println!("{clients} clients, {all} pictures, {steps} training steps in between");
    // The training went on all the while, and got its turns.
    assert!(steps as usize >= all / 4, "{steps} steps beside {all} pictures");
    assert_eq!(first.get::<String>(&training, "Job", "State").await, "running");
    first.call::<_, ()>(&training, "Job", "Cancel", &("", Dict::new())).await.unwrap();
    memory.assert_flat();
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_stays_flat() {
    let jobs = setting("BLOCKLORA_LOAD_JOBS", 600);
    // Few results are kept, so that what grows would be a leak.
    let daemon = stub::daemon("[jobs]\nresults_keep_max = 8\n");
    let client = daemon.client().await;
    let milo = stub::adapter(&client, "milo").await;
    let set = client.compose_on(stub::STUB, &[(&milo, 1.0)], Dict::new()).await.unwrap();
    let empty = async || {
        let job: OwnedObjectPath = client.call(ROOT, "Manager", "EmptyJob", &(Dict::new(),)).await.unwrap();
        client.wait(job.as_str()).await.unwrap();
    };
    let (start, mut memory) = (Instant::now(), Memory(Vec::new()));
    let mut ends: HashMap<&str, usize> = HashMap::new();
    for number in 0..=jobs {
        if number == jobs * memory.0.len() / 10 {
            memory.note(&daemon, number, start);
        }
        let end = match number % 4 {
            // Nobody takes its results.
            0 | 1 => {
                let job =
                    client.generate(&set, stub::picture("a <milo>", number as u64, 1), Dict::new()).await.unwrap();
                client.wait(&job).await.map_or("failed", |_| "done")
            }
            // Without the set the concept is unknown: failed jobs must not leak either.
            2 => {
                let params = stub::picture("a <milo>", number as u64, 1);
                let job = client.generate("/", params, Dict::new()).await.unwrap();
                client.wait(&job).await.map_or("failed", |_| "done")
            }
            _ => {
                empty().await;
                "empty"
            }
        };
        *ends.entry(end).or_default() += 1;
    }
    println!("{ends:?}");
    assert!(ends["done"] >= jobs / 2 && ends["failed"] >= jobs / 4 && ends["empty"] >= jobs / 4);
    memory.assert_flat();
}

/// Two clients that always have pictures in the queue, until they are told to stop.
async fn endless_pictures(daemon: &Daemon, stop: &Arc<AtomicBool>) -> Vec<tokio::task::JoinHandle<usize>> {
    let mut tasks = Vec::new();
    for seed in 0..2 {
        let (client, stop) = (daemon.client().await, stop.clone());
        tasks.push(tokio::spawn(async move {
            let draw = async || client.generate("/", stub::picture("a dog", seed, 2), Dict::new()).await.unwrap();
            // So many that the queue is never empty, however fast a picture is drawn.
            let (mut waiting, mut drawn) = (VecDeque::new(), 0);
            for _ in 0..48 {
                waiting.push_back(draw().await);
            }
            while !stop.load(Ordering::Relaxed) {
                waiting.push_back(draw().await);
                let first = waiting.pop_front().unwrap();
                client.wait(&first).await.unwrap();
                drawn += 1;
            }
            drawn
        }));
    }
    tasks
}

#[tokio::test(flavor = "multi_thread")]
async fn a_training_that_waits_gets_its_turn_under_endless_load() {
    for (wait_max_sec, gets_it) in [(1, true), (0, false)] {
        let daemon = stub::daemon(&format!("[jobs]\nwait_max_sec = {wait_max_sec}\n"));
        let client = daemon.client().await;
        client.draw("/", stub::picture("a dog", 1, 2)).await.unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let load = endless_pictures(&daemon, &stop).await;
        tokio::time::sleep(Duration::from_millis(200)).await;
        let training = stub::train(&client, "rex", 20).await;
        let ended =
            tokio::time::timeout(Duration::from_secs(if gets_it { 120 } else { 3 }), client.wait(&training)).await;
        let state = client.get::<String>(&training, "Job", "State").await;
        assert_eq!((ended.is_ok(), state.as_str()), if gets_it { (true, "done") } else { (false, "queued") });
        stop.store(true, Ordering::Relaxed);
        for task in load {
            assert!(task.await.unwrap() > 0);
        }
    }
}
