//! `demo` and `score` end to end, on adapters made for two of the bundled concepts.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;

use blocklora_engine::image::Picture;
use common::{Daemon, Make, adapter, fails, succeeds, temporary, text};

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
    // A daemon that runs draws the same pictures.
    let daemon = Daemon::start();
    let other = path.join("other.png");
    let socket = daemon.socket();
    let args = [&common[..7], &["-o", text(&other), "--json", "--daemon", text(&socket)]].concat();
    let again: serde_json::Value = serde_json::from_str(&succeeds(args)).unwrap();
    assert_eq!((&again["alone"], &again["merged"]), (&said["alone"], &said["merged"]));
    assert_eq!(std::fs::read(&other).unwrap(), std::fs::read(&sheet).unwrap());
    let table = succeeds(common);
    assert!(table.contains("2 concepts merged in") && table.contains(text(&sheet)), "{table}");
}

#[test]
fn a_demo_that_cannot_be_drawn_says_why_and_writes_nothing() {
    let folder = temporary();
    let path = folder.path();
    fails(path, 1, &["demo", "--adapters", "."], &["there is no adapter (.safetensors) in this folder"]);
    let name = adapters(path)[0].clone();
    fails(path, 1, &["demo", "--adapters", ".", "--sampler", "none"], &["there is no sampler \"none\""]);
    fails(path, 1, &["demo", "--adapters", ".", "--size", "33"], &["width = 33", "multiple of"]);
    // A concept without pictures, and two in one slot.
    let stranger = adapter(path, &Make { name: "stranger", slot: Some(7), ..Make::default() });
    fails(path, 1, &["demo", "--adapters", "."], &["concepts.json", "no concept \"stranger\""]);
    std::fs::remove_file(stranger).unwrap();
    adapter(path, &Make { name: &name, slot: Some(1), ..Make::default() });
    fails(path, 1, &["demo", "--adapters", "."], &["both own row", "--on-clash mean"]);
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
        // Two concepts of two pictures each, and the error of their mean.
        let pictures: Vec<f64> = (row["pictures"].as_object().unwrap().values())
            .flat_map(|each| each.as_array().unwrap())
            .map(|p| p["image_alignment"].as_f64().unwrap())
            .collect();
        assert_eq!(pictures.len(), 4);
        let mean = pictures.iter().sum::<f64>() / 4.0;
        let deviation = (pictures.iter().map(|p| (p - mean).powi(2)).sum::<f64>() / 3.0).sqrt();
        assert!((row["mean"]["image_alignment"].as_f64().unwrap() - mean).abs() < 1e-5, "{row}");
        let error = row["standard_error"]["image_alignment"].as_f64().unwrap();
        assert!((error - deviation / 2.0).abs() < 1e-5, "{row}");
    }
    let table = succeeds(["score", "--set", text(path), "--prompts", "1", "--sizes", "2", "--steps", "1"]);
    assert_eq!(table.lines().count(), 2, "{table}");
}

#[test]
fn score_can_leave_out_the_weights_or_a_part_of_the_model() {
    let folder = temporary();
    let path = folder.path();
    adapters(path);
    let score = |options: &[&str]| {
        let args = ["score", "--set", text(path), "--prompts", "1", "--sizes", "1,2", "--steps", "2", "--json"];
        let said: serde_json::Value = serde_json::from_str(&succeeds([&args[..], options].concat())).unwrap();
        [0, 1].map(|i| said["rows"][i]["mean"].clone())
    };
    let [alone, merged] = score(&[]);
    assert_ne!(alone, merged);
    // Only the words are left, and another concept's words change nothing.
    let [alone_words, merged_words] = score(&["--weight", "0"]);
    assert_eq!(alone_words, merged_words);
    assert_ne!(alone_words, alone);
    let [unet, _] = score(&["--layers", "unet."]);
    let [nothing, _] = score(&["--layers", "nowhere"]);
    assert_eq!(nothing, alone_words);
    assert_ne!(unet, nothing);
}

#[test]
fn cross_talk_is_what_other_rows_answer() {
    let folder = temporary();
    let path = folder.path();
    adapters(path);
    let said = succeeds(["score", "--set", text(path), "--cross-talk", "--json"]);
    let said: serde_json::Value = serde_json::from_str(&said).unwrap();
    let parts = said[0][1].as_array().unwrap();
    assert!(!parts.is_empty());
    for part in parts {
        let number = |key: &str| part[key].as_f64().unwrap();
        assert!(number("own") > 0.0 && number("another") > 0.0, "{part}");
        // There is one other concept.
        assert!((number("another") - number("all_others")).abs() < 1e-9, "{part}");
    }
    let table = succeeds(["score", "--set", text(path), "--cross-talk"]);
    assert_eq!(table.lines().count(), 1 + parts.len(), "{table}");
}
