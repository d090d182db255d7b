//! What plugins get of the job that they work for, whatever kind of plugin, wherever its code runs: what they hand over
//! beside its result comes to the client, and a strategy that plans for long learns that the job was cancelled.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;

use common::hostile::Hostile;
use common::{Client, Dict, ROOT, dict, stub};
use zbus::OwnedObjectPath;

fn text(info: &Dict, key: &str) -> String {
    info.get(key).map(|value| String::try_from(value.try_clone().unwrap()).unwrap()).unwrap_or_default()
}

/// The files of a finished job: media types of its own, and what was handed over by name.
async fn files(client: &Client, job: &str) -> (Vec<String>, BTreeMap<String, Vec<u8>>) {
    client.wait(job).await.unwrap();
    let (mut own, mut artefacts) = (Vec::new(), BTreeMap::new());
    for (bytes, info) in client.results(job).await.unwrap() {
        match text(&info, "format").as_str() {
            "artefact" => {
                assert_eq!(text(&info, "media_type"), "application/octet-stream");
                assert_eq!(info["size"], zbus::OwnedVariant::from(bytes.len() as u64));
                assert!(artefacts.insert(text(&info, "name"), bytes).is_none());
            }
            _ => own.push(text(&info, "media_type")),
        }
    }
    (own, artefacts)
}

fn handed_over(place: &str) -> BTreeMap<String, Vec<u8>> {
    let named = [(format!("{place}.txt"), place.as_bytes().to_vec()), ("bytes.bin".to_owned(), vec![0, 255, 10])];
    named.into_iter().collect()
}

/// A job that merges this adapter by the hostile strategy.
async fn merge(client: &Client, adapter: &str) -> OwnedObjectPath {
    let parts = ("hostile", common::entries_of(&[(adapter, 1.0)]), Dict::new());
    client.call(ROOT, "Manager", "Merge", &parts).await.unwrap()
}

#[tokio::test]
async fn artefacts_come_behind_the_results_of_each_kind() {
    for isolation in ["in-process", "worker"] {
        let hostile = Hostile::install();
        let daemon = hostile.daemon(isolation);
        let client = daemon.client().await;
        let milo = stub::adapter(&client, "milo").await;
        hostile.set_mode("artefacts");

        let job = stub::train_by(&client, "hostile", "zuko", 2).await;
        let adapter = vec!["application/vnd.safetensors".to_owned()];
        assert_eq!(files(&client, &job).await, (adapter, handed_over("train")), "{isolation}");

        let mut params = stub::picture("a dog", 1, 2);
        params.extend(dict([("sampler", "hostile".into())]));
        let job = client.generate("/", params, dict([("formats", vec!["png".to_owned()].into())])).await.unwrap();
        assert_eq!(files(&client, &job).await, (vec!["image/png".to_owned()], handed_over("sample")), "{isolation}");

        let job = merge(&client, &milo).await;
        assert_eq!(files(&client, job.as_str()).await, (vec![], handed_over("plan")), "{isolation}");

        // Another job has none of them, and a name that leads elsewhere is an error of the plugin.
        hostile.set_mode("");
        let job = client.generate("/", stub::picture("a dog", 1, 2), Dict::new()).await.unwrap();
        assert!(files(&client, &job).await.1.is_empty());
        hostile.set_mode("artefact-outside");
        let job = stub::train_by(&client, "hostile", "rex", 2).await;
        let error = client.wait(&job).await.unwrap_err();
        assert!(error.contains("\"../outside\"") && error.contains("its name must be"), "{error}");
    }
}

#[tokio::test]
async fn a_plan_that_takes_long_ends_with_its_job() {
    for isolation in ["in-process", "worker"] {
        let hostile = Hostile::install();
        let daemon = hostile.daemon(isolation);
        let client = daemon.client().await;
        let milo = stub::adapter(&client, "milo").await;
        hostile.set_mode("plans-for-long");
        let job = merge(&client, &milo).await;
        tokio::time::sleep(std::time::Duration::from_millis(500)).await;
        client.call::<_, ()>(job.as_str(), "Job", "Cancel", &("", Dict::new())).await.unwrap();
        let ended = tokio::time::timeout(std::time::Duration::from_secs(60), client.wait(job.as_str())).await;
        let error = ended.expect("the plan was not told").unwrap_err();
        assert!(error.contains("Cancelled"), "{isolation}: {error}");
        // The plugin did nothing wrong, and the model is free for the next.
        hostile.set_mode("");
        let job = merge(&client, &milo).await;
        client.wait(job.as_str()).await.unwrap();
    }
}
