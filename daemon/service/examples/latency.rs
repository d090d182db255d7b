//! Latencies of the daemon over the socket and over a message bus:
//! `cargo run -p blocklora-service --example latency [ROUNDS]`

#![allow(clippy::unwrap_used)]

#[path = "../tests/common/mod.rs"]
mod common;

use std::time::Instant;

use common::{Bus, Client, Daemon, Dict, ROOT, dict, starter};
use zbus::OwnedObjectPath;

/// Milliseconds of the median and of the 95th percentile.
fn show(what: &str, mut times: Vec<f64>) {
    times.sort_by(f64::total_cmp);
    let at = |part: f64| times[((times.len() - 1) as f64 * part) as usize];
    println!("{what:<44} median {:8.3} ms   95 % {:8.3} ms   ({} rounds)", at(0.5), at(0.95), times.len());
}

async fn measure(name: &str, client: &Client, rounds: usize) {
    let mut times = Vec::new();
    for _ in 0..rounds {
        let start = Instant::now();
        let _: String = client.get(ROOT, "Manager", "Version").await;
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    show(&format!("{name}: property get"), times);

    let mut times = Vec::new();
    for _ in 0..rounds {
        let start = Instant::now();
        let job: OwnedObjectPath = client.call(ROOT, "Manager", "EmptyJob", &(Dict::new(),)).await.unwrap();
        client.wait(job.as_str()).await.unwrap();
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    show(&format!("{name}: empty job, made and waited for"), times);

    // One step: what is measured is taking the picture, not drawing it.
    let params = dict([
        ("prompt", "a dog".into()),
        ("steps", 1u32.into()),
        ("width", 512u32.into()),
        ("height", 512u32.into()),
        ("guidance_scale", 1.0f64.into()),
    ]);
    let options = dict([("formats", vec!["raw".to_owned()].into())]);
    let job = client.generate("/", params, options).await.unwrap();
    client.wait(&job).await.unwrap();
    let mut times = Vec::new();
    for _ in 0..rounds.min(200) {
        let start = Instant::now();
        let keep = dict([("keep", true.into())]);
        let files: Vec<(zbus::OwnedFd, Dict)> = client.call(&job, "Job", "TakeResults", &(keep,)).await.unwrap();
        let bytes = common::read_fd(&files[0].0);
        assert_eq!(bytes.len(), 512 * 512 * 3);
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    show(&format!("{name}: 512x512 picture by memfd, read"), times);

    let mut names: Vec<String> = std::fs::read_dir(starter().join("adapters"))
        .unwrap()
        .filter_map(|e| e.unwrap().file_name().to_str()?.strip_suffix(".safetensors").map(str::to_owned))
        .collect();
    names.sort();
    let mut adapters = Vec::new();
    for name in &names {
        adapters.push(client.register(name).await);
    }
    let set = |weight: f64| adapters.iter().map(|path| (path.as_str(), weight)).collect::<Vec<_>>();
    let sets = [set(1.0), set(0.5)];
    let (mut times, mut merges) = (Vec::new(), Vec::new());
    for round in 0..rounds.min(40) {
        let parts = ("blocklora", common::entries_of(&sets[round % 2]), Dict::new());
        let start = Instant::now();
        let job: OwnedObjectPath = client.call(ROOT, "Manager", "Merge", &parts).await.unwrap();
        let details = client.wait(job.as_str()).await.unwrap();
        times.push(start.elapsed().as_secs_f64() * 1e3);
        merges.push(u64::try_from(details["usec"].try_clone().unwrap()).unwrap() as f64 / 1e3);
    }
    show(&format!("{name}: switching sets of {} adapters", names.len()), times);
    show(&format!("{name}:   of which merging"), merges);
}

#[tokio::main]
async fn main() {
    let rounds = std::env::args().nth(1).map_or(500, |text| text.parse().unwrap());
    let bus = Bus::start();
    let daemon = Daemon::start_with(Some(&bus), "", &[]);
    measure("socket", &daemon.client().await, rounds).await;
    measure("bus", &Client::on_bus(&bus).await, rounds).await;
    println!("memory of the daemon: {:.1} MB", daemon.memory() as f64 / 1e6);
}
