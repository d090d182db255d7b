//! A large library: importing it, listing, filtering, paging, and opening one of it, as a client sees it.
//! `cargo run -p blocklora-service --example library [ADAPTERS]`

#![allow(clippy::unwrap_used)]

#[path = "../tests/common/mod.rs"]
mod common;

use std::time::Instant;

use blocklora_spec::{Adapter, AdapterBuilder, Kind, Layer, Manifest, Partition, Scheme, Storage, Token, TokenVectors};
use common::{Client, Daemon, Dict, ROOT, adapter_file, dict};
use zbus::OwnedObjectPath;

/// Entries of one page.
const PAGE: u32 = 50;

/// A small adapter, valid and unlike the others: one layer, one token.
fn adapter(like: &Manifest, number: u32) -> Vec<u8> {
    let name = format!("concept-{number:05}");
    let token = format!("{name}-1");
    let kinds = [Kind::Subject, Kind::Person, Kind::Scene, Kind::Style];
    let manifest = Manifest {
        tokens: vec![Token { name: token.clone(), vectors: 1 }],
        kind: kinds[number as usize % 4],
        class_word: ["dog", "cat", "house"][number as usize % 3].to_owned(),
        partition: Some(Partition { scheme: Scheme::Contiguous, capacity: 16, seed: 0, slot: number % 16 }),
        rank: 1,
        name,
        ..like.clone()
    };
    let value = number as f32;
    let layer = Layer {
        name: "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
        outputs: 16,
        a: &[value; 8],
        b: &[1.0],
    };
    let token = TokenVectors { name: token, layers: 1, width: 8, values: vec![value; 8] };
    AdapterBuilder::new(&manifest, Storage::F32).layer(layer).token(&token).to_bytes("adapter").unwrap()
}

/// Milliseconds of the median and of the slowest of 50 calls of `call`.
async fn measure<T>(what: &str, mut call: impl AsyncFnMut() -> T) {
    let mut times = Vec::new();
    for _ in 0..50 {
        let start = Instant::now();
        call().await;
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    times.sort_by(f64::total_cmp);
    println!("{what:<44} median {:8.3} ms   slowest {:8.3} ms", times[times.len() / 2], times[times.len() - 1]);
}

async fn page(client: &Client, filter: Dict, offset: u32) -> Vec<Dict> {
    client.call(ROOT, "Manager", "QueryLibrary", &(filter, offset, PAGE)).await.unwrap()
}

#[tokio::main]
async fn main() {
    let count: u32 = std::env::args().nth(1).map_or(10_000, |text| text.parse().unwrap());
    let mut daemon = Daemon::start();
    let client = daemon.client().await;
    let like = Adapter::open(adapter_file("poodle")).unwrap().manifest().clone();
    let start = Instant::now();
    let mut last = String::new();
    for number in 0..count {
        let file = tempfile::tempfile().unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &adapter(&like, number), 0).unwrap();
        let body = (zbus::Fd::from(std::os::fd::AsFd::as_fd(&file)), Dict::new());
        let path: OwnedObjectPath = client.call(ROOT, "Manager", "RegisterAdapter", &body).await.unwrap();
        client.call::<_, ()>(path.as_str(), "Adapter", "Unregister", &(Dict::new(),)).await.unwrap();
        last = path.as_str().rsplit('/').next().unwrap().to_owned();
    }
    let seconds = start.elapsed().as_secs_f64();
    println!("{count} adapters imported, each flushed to the disk: {:.2} ms each", 1e3 * seconds / f64::from(count));
    measure("first page of 50", async || page(&client, Dict::new(), 0).await).await;
    measure("last page of 50", async || page(&client, Dict::new(), count.saturating_sub(PAGE)).await).await;
    let newest = || dict([("sort", "-added".to_owned().into())]);
    measure("newest 50", async || page(&client, newest(), 0).await).await;
    let text = || dict([("text", "CEPT-012".to_owned().into())]);
    measure("search in name, class word and digest", async || page(&client, text(), 0).await).await;
    let both = || dict([("kind", "person".to_owned().into()), ("class_word", "cat".to_owned().into())]);
    measure("by kind and class word", async || page(&client, both(), 0).await).await;
    let number = async || client.call::<_, u64>(ROOT, "Manager", "CountLibrary", &(both(),)).await.unwrap();
    measure("their number", number).await;
    let opened = async || {
        let body = (last.as_str(), Dict::new());
        client.call::<_, OwnedObjectPath>(ROOT, "Manager", "OpenAdapter", &body).await.unwrap()
    };
    measure("one by its digest", opened).await;
    let slots = async |offset: u32| {
        let body = (Dict::new(), offset, PAGE);
        client.call::<_, Vec<Dict>>(ROOT, "Manager", "ListSlots", &body).await.unwrap()
    };
    measure("first 50 owned slots", async || slots(0).await).await;
    measure("last 50 owned slots", async || slots(count.saturating_sub(PAGE)).await).await;
    let start = Instant::now();
    daemon.restart();
    println!("a daemon starts on it in {:.0} ms", start.elapsed().as_secs_f64() * 1e3);
    println!("memory of the daemon: {:.1} MB", daemon.memory() as f64 / 1e6);
}
