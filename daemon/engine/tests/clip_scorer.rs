//! The CLIP scorer equals transformers on a tiny random CLIP (tests/parity/make_clip_golden.py).
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use blocklora_engine::image::Picture;
use blocklora_engine::score::{ClipScorer, IdentityClassifier, cosine, image_alignment, text_alignment};

#[derive(serde::Deserialize)]
struct Golden {
    pictures: Vec<GoldenPicture>,
    prompts: Vec<GoldenPrompt>,
}

#[derive(serde::Deserialize)]
struct GoldenPicture {
    width: usize,
    height: usize,
    pixels: String,
    features: Vec<f32>,
}

#[derive(serde::Deserialize)]
struct GoldenPrompt {
    prompt: String,
    features: Vec<f32>,
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/clip")
}

fn golden() -> Golden {
    serde_json::from_str(&std::fs::read_to_string(folder().join("features.json")).unwrap()).unwrap()
}

fn pictures(golden: &Golden) -> Vec<Picture> {
    let byte = |digits: &[u8]| u8::from_str_radix(std::str::from_utf8(digits).unwrap(), 16).unwrap();
    let picture =
        |p: &GoldenPicture| Picture::new(p.width, p.height, p.pixels.as_bytes().chunks(2).map(byte).collect()).unwrap();
    golden.pictures.iter().map(picture).collect()
}

/// A copy of the folder with `change` applied to one of its files.
fn changed(name: &str, change: impl Fn(&str) -> String) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(folder()).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, copy.path().join(path.file_name().unwrap())).unwrap();
    }
    let path = copy.path().join(name);
    let (before, after) = (std::fs::read_to_string(&path).unwrap(), change(&std::fs::read_to_string(&path).unwrap()));
    assert_ne!(before, after, "the change to {name} does nothing");
    std::fs::write(&path, after).unwrap();
    copy
}

fn close(ours: &[Vec<f32>], theirs: &[&Vec<f32>]) {
    assert_eq!(ours.len(), theirs.len());
    for (i, (a, b)) in ours.iter().zip(theirs).enumerate() {
        assert_eq!(a.len(), b.len());
        let worst = a.iter().zip(b.iter()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 1e-5, "feature {i} is off by {worst}");
    }
}

#[test]
fn image_features_equal_transformers() {
    let golden = golden();
    let scorer = ClipScorer::load(&folder()).unwrap();
    close(
        &scorer.image_features(&pictures(&golden)).unwrap(),
        &golden.pictures.iter().map(|p| &p.features).collect::<Vec<_>>(),
    );
}

#[test]
fn text_features_equal_transformers() {
    let golden = golden();
    let prompts: Vec<&str> = golden.prompts.iter().map(|p| p.prompt.as_str()).collect();
    let expected: Vec<&Vec<f32>> = golden.prompts.iter().map(|p| &p.features).collect();
    close(&ClipScorer::load(&folder()).unwrap().text_features(&prompts).unwrap(), &expected);

    let old = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors", "preprocessor_config.json", "vocab.json", "merges.txt"] {
        std::fs::copy(folder().join(name), old.path().join(name)).unwrap();
    }
    close(&ClipScorer::load(old.path()).unwrap().text_features(&prompts).unwrap(), &expected);
}

#[test]
fn a_batch_gives_each_the_same_as_alone() {
    let scorer = ClipScorer::load(&folder()).unwrap();
    let prompts: Vec<String> = (0..40).map(|i| "dog ".repeat(i % 12)).collect();
    let together = scorer.text_features(&prompts).unwrap();
    assert_eq!(together.len(), 40);
    for (prompt, feature) in prompts.iter().zip(&together) {
        assert!(cosine(&scorer.text_features(&[prompt]).unwrap()[0], feature) > 0.999_999, "{prompt:?}");
    }
    assert!(scorer.image_features(&[]).unwrap().is_empty());
}

#[test]
fn scores_of_real_features() {
    let golden = golden();
    let scorer = ClipScorer::load(&folder()).unwrap();
    let images = scorer.image_features(&pictures(&golden)).unwrap();
    assert!((image_alignment(&images[..1], &images[..1]).unwrap() - 1.0).abs() < 1e-5);
    let texts = scorer.text_features(&["dog", "cat", "photo"]).unwrap();
    let expected = texts.iter().zip(&images).map(|(t, i)| 2.5 * cosine(t, i).max(0.0)).sum::<f32>() / 3.0;
    assert!((text_alignment(&texts, &images).unwrap() - expected).abs() < 1e-6);
    let classifier = IdentityClassifier::new(images.iter().map(|f| ("a", vec![f.clone()]))).unwrap();
    assert_eq!([0, 1, 2].map(|i| classifier.nearest(&images[i])), [0, 1, 2]);
}

#[test]
fn broken_folders_are_errors_that_name_file_and_field() {
    let message = |folder: &Path| match ClipScorer::load(folder) {
        Ok(scorer) => scorer.image_features(&pictures(&golden())).unwrap_err().to_string(),
        Err(error) => error.to_string(),
    };
    let check = |name: &str, from: &str, to: &str, expected: &str| {
        let folder = changed(name, |text| text.replacen(from, to, 1));
        let message = message(folder.path());
        assert!(message.contains(expected), "{name} with {to:?}: {message}");
    };
    check("config.json", "\"vision_config\"", "\"sight_config\"", "vision_config is missing");
    check("config.json", "\"patch_size\": 4", "\"patch_size\": 5", "do not tile");
    check("config.json", "\"patch_size\": 4", "\"patch_size\": 6", "patch_embedding");
    check("config.json", "\"num_attention_heads\": 4", "\"num_attention_heads\": 0", "text_config: 2 layers of 0");
    check("config.json", "\"vocab_size\": 62", "\"vocab_size\": 63", "token_embedding");
    check("config.json", "quick_gelu", "relu", "text_config.hidden_act = relu");
    check("preprocessor_config.json", "\"resample\": 3", "\"resample\": 0", "resample = 0");
    check("preprocessor_config.json", "\"shortest_edge\": 12", "\"shortest_edge\": 11", "preprocessor_config.json");
    check("preprocessor_config.json", "0.27", "0.0", "image_std");
    assert!(message(Path::new("/nowhere")).contains("config.json"));
    let empty = tempfile::tempdir().unwrap();
    std::fs::copy(folder().join("config.json"), empty.path().join("config.json")).unwrap();
    assert!(message(empty.path()).contains("model.safetensors"));
}
