//! `demo` and `score` end to end, on adapters made for two of the bundled concepts.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;

use blocklora_engine::image::Picture;
use common::{Make, adapter, succeeds, temporary, text};

/// Random adapters for the first two bundled concepts.
fn adapters(folder: &Path) -> [String; 2] {
    let concepts = Path::new(env!("CARGO_MANIFEST_DIR")).join("../starter/concepts/concepts.json");
    let concepts: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(concepts).unwrap()).unwrap();
    [0, 1].map(|i| {
        let name = concepts[i]["name"].as_str().unwrap();
        adapter(folder, &Make { name, slot: Some(i as u32), ..Make::default() });
        name.to_owned()
    })
}

#[test]
fn demo_draws_a_sheet_and_prints_what_it_measured() {
    let folder = temporary();
    let path = folder.path();
    let names = adapters(path);
    let sheet = path.join("sheet.png");
    let common = ["demo", "--adapters", text(path), "--images", "1", "--steps", "2", "-o", text(&sheet)];
    let said: serde_json::Value = serde_json::from_str(&succeeds([&common[..], &["--json"]].concat())).unwrap();
    let listed: Vec<&str> = said["concepts"].as_array().unwrap().iter().map(|c| c["name"].as_str().unwrap()).collect();
    assert_eq!(listed.len(), 2);
    assert!(names.iter().all(|n| listed.contains(&n.as_str())));
    assert!(said["merge_ms"].as_f64().unwrap() > 0.0);
    assert!(said["alone"]["image_alignment"].as_f64().unwrap() > 0.0);
    // Two columns, four rows of pictures.
    let picture = Picture::load(&sheet).unwrap();
    assert!(picture.width() > 2 * 96 && picture.height() > 4 * 96, "{} x {}", picture.width(), picture.height());
    let table = succeeds(common);
    assert!(table.contains("2 concepts merged in") && table.contains(text(&sheet)), "{table}");
}

#[test]
fn score_compares_strategies_and_sizes() {
    let folder = temporary();
    let path = folder.path();
    adapters(path);
    let set = format!("{}=blocklora,blocklora-sum1,average", path.display());
    let args = ["score", "--set", &set, "--prompts", "2", "--sizes", "1,2", "--steps", "2", "--json"];
    let said: serde_json::Value = serde_json::from_str(&succeeds(args)).unwrap();
    let rows = said["rows"].as_array().unwrap();
    let of = |strategy: &str, merged: u64| {
        rows.iter()
            .find(|r| r["strategy"] == strategy && r["merged"].as_u64() == Some(merged))
            .map(|r| r["mean"].clone())
    };
    assert_eq!(rows.len(), 4);
    assert!(of("blocklora", 1).is_some());
    // With rows of their own, a sum whose weights are 1/2 each is the average, and not the sum itself.
    assert_eq!(of("blocklora-sum1", 2), of("average", 2));
    assert_ne!(of("blocklora", 2), of("average", 2));
    for row in rows {
        let mean = &row["mean"];
        for (score, largest) in [("image_alignment", 1.0), ("text_alignment", 2.5), ("identity", 1.0)] {
            let score = mean[score].as_f64().unwrap();
            assert!((0.0..=largest).contains(&score), "{row}");
        }
    }
    let table = succeeds(["score", "--set", text(path), "--prompts", "1", "--sizes", "2", "--steps", "1"]);
    assert_eq!(table.lines().count(), 2, "{table}");
}
