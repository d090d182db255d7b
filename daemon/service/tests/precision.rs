//! Every job has the precision that it asks for, whatever others have loaded: the same request gives the same bytes.

#![allow(clippy::unwrap_used)]

mod common;

use common::stub::{self, STUB, picture};
use common::{Client, Dict, ROOT, dict, entries_of, until};
use zbus::OwnedObjectPath;

/// The stub's files are f16: drawn in f32 or f16, a picture without adapters is the same.
fn in_bf16(mut params: Dict) -> Dict {
    params.extend(dict([("precision", "bf16".into())]));
    params
}

/// Loads the model; how its weights are held then.
async fn load(client: &Client, options: Dict) -> String {
    let job: OwnedObjectPath = client.call(ROOT, "Manager", "LoadModel", &(STUB, options)).await.unwrap();
    client.wait(job.as_str()).await.unwrap();
    client.get(&format!("{ROOT}/model/{STUB}"), "Model", "Precision").await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_picture_does_not_depend_on_what_another_client_loaded() {
    let daemon = stub::daemon("");
    let (client, other) = (daemon.client().await, daemon.client().await);
    let plain = client.draw("/", picture("a dog", 5, 2)).await.unwrap();
    assert_eq!(load(&other, in_bf16(Dict::new())).await, "bf16");
    assert!(client.draw("/", picture("a dog", 5, 2)).await.unwrap() == plain);
    let half = other.draw("/", in_bf16(picture("a dog", 5, 2))).await.unwrap();
    assert!(half != plain);
    assert!(client.draw("/", picture("a dog", 5, 2)).await.unwrap() == plain);
    assert!(other.draw("/", in_bf16(picture("a dog", 5, 2))).await.unwrap() == half);
    assert_eq!(load(&client, Dict::new()).await, "f32");
    // Said wrongly.
    let mut wrong = picture("a dog", 5, 2);
    wrong.extend(dict([("precision", "f64".into())]));
    let error = client.generate("/", wrong, Dict::new()).await.unwrap_err();
    assert_eq!(error, "InvalidOption: option \"precision\": \"f64\" is not f32, f16 or bf16");
    // What is configured is what is usual.
    let daemon = stub::daemon_with_precision("bf16");
    assert!(daemon.client().await.draw("/", picture("a dog", 5, 2)).await.unwrap() == half);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_set_has_no_precision_but_the_jobs_that_name_it() {
    let daemon = stub::daemon("");
    let client = daemon.client().await;
    let adapter = stub::adapter(&client, "rex").await;
    let entries = entries_of(&[(adapter.as_str(), 1.0)]);
    let set = client.compose_on(STUB, &[(&adapter, 1.0)], Dict::new()).await.unwrap();
    let plain = client.draw(&set, picture("a <rex>", 5, 2)).await.unwrap();
    let half = client.draw(&set, in_bf16(picture("a <rex>", 5, 2))).await.unwrap();
    assert!(plain != half);
    // Merged in one precision, drawn in another; and swapped while the model is in a third state.
    let job: OwnedObjectPath =
        client.call(ROOT, "Manager", "Merge", &("", &entries, in_bf16(Dict::new()))).await.unwrap();
    let details = client.wait(job.as_str()).await.unwrap();
    let merged = OwnedObjectPath::try_from(details["composition"].try_clone().unwrap()).unwrap();
    assert!(client.draw(merged.as_str(), picture("a <rex>", 5, 2)).await.unwrap() == plain);
    let swap = (&entries, 1u64, Dict::new());
    client.call::<_, u64>(&set, "Composition", "Swap", &swap).await.unwrap();
    assert_eq!(load(&client, in_bf16(Dict::new())).await, "bf16");
    assert!(client.draw(&set, picture("a <rex>", 5, 2)).await.unwrap() == plain);
    assert!(client.draw(&set, in_bf16(picture("a <rex>", 5, 2))).await.unwrap() == half);
}

/// The file of a training that is the first on its slot.
async fn trained(client: &Client) -> Vec<u8> {
    let job = stub::train(client, "rex", 3).await;
    let details = client.wait(&job).await.unwrap();
    let adapter = OwnedObjectPath::try_from(details["adapter"].try_clone().unwrap()).unwrap();
    let file = client.results(&job).await.unwrap().remove(0).0;
    let remove = (dict([("remove", true.into())]),);
    client.call::<_, ()>(adapter.as_str(), "Adapter", "Unregister", &remove).await.unwrap();
    file
}

#[tokio::test(flavor = "multi_thread")]
async fn a_training_does_not_depend_on_what_another_client_loaded() {
    let daemon = stub::daemon("");
    let (client, other) = (daemon.client().await, daemon.client().await);
    let first = trained(&client).await;
    load(&other, in_bf16(Dict::new())).await;
    assert!(trained(&client).await == first, "the same training gave another file");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_needs_another_precision_waits_for_those_at_work() {
    let daemon = stub::daemon("");
    let client = daemon.client().await;
    let half = client.draw("/", in_bf16(picture("a dog", 5, 2))).await.unwrap();
    let plain = client.draw("/", picture("a dog", 5, 2)).await.unwrap();
    let mut params = picture("a dog", 1, 50);
    params.extend(dict([("count", 1000u32.into())]));
    let long = client.generate("/", params, dict([("priority", "background".into())])).await.unwrap();
    until("the start", || async { client.get::<String>(&long, "Job", "State").await == "running" }).await;
    // Both are of a higher priority: one goes in between, the other comes when the model is free.
    let waits = client.generate("/", in_bf16(picture("a dog", 5, 2)), Dict::new()).await.unwrap();
    assert!(client.draw("/", picture("a dog", 5, 2)).await.unwrap() == plain);
    assert_eq!(client.get::<String>(&waits, "Job", "State").await, "queued");
    assert_eq!(client.get::<String>(&long, "Job", "State").await, "running");
    client.call::<_, ()>(&long, "Job", "Cancel", &("", Dict::new())).await.unwrap();
    client.wait(&waits).await.unwrap();
    assert!(client.results(&waits).await.unwrap().remove(0).0 == half);
}
