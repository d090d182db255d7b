//! Many clients at once while one trains: no request is lost, every picture is the one made alone, memory stays flat.
//! Small here; BLOCKLORA_LOAD_CLIENTS and BLOCKLORA_LOAD_JOBS make it as large as one likes.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use common::{Daemon, Dict, ROOT, dict, small, train};
use zbus::OwnedObjectPath;

fn setting(name: &str, default: usize) -> usize {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn many_clients_beside_a_training() {
    let clients = setting("BLOCKLORA_LOAD_CLIENTS", 12);
    let daemon = Daemon::start();
    let first = daemon.client().await;
    let (poodle, teddy) = (first.register("poodle").await, first.register("teddy").await);
    // Each made alone.
    let keep = || dict([("lifetime", "daemon".into())]);
    let sets = [
        first.compose(&[], keep()).await.unwrap(),
        first.compose(&[(&poodle, 1.0)], keep()).await.unwrap(),
        first.compose(&[(&poodle, 0.7), (&teddy, 1.0)], keep()).await.unwrap(),
    ];
    let prompts = ["a dog", "a <poodle>", "a <teddy> and a <poodle>"];
    let mut alone = BTreeMap::new();
    for (kind, (set, prompt)) in sets.iter().zip(prompts).enumerate() {
        alone.insert(kind, first.draw(set, small(prompt, 9)).await.unwrap());
    }
    let alone = Arc::new(alone);
    let training = train(&first, "rex", 100_000, Dict::new()).await.unwrap();
    let start = Instant::now();
    let mut tasks = Vec::new();
    for number in 0..clients {
        let client = daemon.client().await;
        let (kind, alone) = (number % 3, alone.clone());
        let (set, prompt) = (sets[kind].clone(), prompts[kind]);
        tasks.push(tokio::spawn(async move {
            let mut jobs = Vec::new();
            for _ in 0..2 {
                let options = dict([("formats", vec!["raw".to_owned()].into())]);
                jobs.push(client.generate(&set, small(prompt, 9), options).await.unwrap());
            }
            for job in jobs {
                client.wait(&job).await.unwrap();
                assert_eq!(client.results(&job).await.unwrap()[0].0, alone[&kind], "client {number}");
            }
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
    println!("{clients} clients, {} pictures beside a training: {:.1} s", 2 * clients, start.elapsed().as_secs_f64());
    // The training went on all the while.
    let step = first.get::<zbus::OwnedVariant>(&training, "Job", "Step").await;
    let (done, _) = <(u32, u32)>::try_from(zbus::Structure::try_from(step).unwrap()).unwrap();
    println!("{done} training steps in between");
    assert!(done as usize >= clients);
    assert_eq!(first.get::<String>(&training, "Job", "State").await, "running");
    first.call::<_, ()>(&training, "Job", "Cancel", &("", Dict::new())).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_stays_flat() {
    let jobs = setting("BLOCKLORA_LOAD_JOBS", 150);
    // Few results are kept, so that what grows would be a leak.
    let daemon = Daemon::start_with(None, "[jobs]\nresults_keep_max = 8\n", &[]);
    let client = daemon.client().await;
    let poodle = client.register("poodle").await;
    let set = client.compose(&[(&poodle, 1.0)], Dict::new()).await.unwrap();
    let one = async |number: usize| {
        if number.is_multiple_of(3) {
            let mut params = small("a <poodle>", number as u64);
            params.insert("steps".to_owned(), zbus::OwnedVariant::from(1u32));
            let job =
                client.generate(if number.is_multiple_of(2) { &set } else { "/" }, params, Dict::new()).await.unwrap();
            // Without the set the concept is unknown: failed jobs must not leak either.
            let _ = client.wait(&job).await;
        } else {
            let job: OwnedObjectPath = client.call(ROOT, "Manager", "EmptyJob", &(Dict::new(),)).await.unwrap();
            client.wait(job.as_str()).await.unwrap();
        }
    };
    let warm = jobs / 3;
    for number in 0..warm {
        one(number).await;
    }
    let before = daemon.memory();
    let start = Instant::now();
    for number in 0..jobs {
        one(number).await;
    }
    let after = daemon.memory();
    println!("{jobs} jobs in {:.1} s: {before} bytes before, {after} after", start.elapsed().as_secs_f64());
    assert!(after < before + (24 << 20), "{before} -> {after}");
}
