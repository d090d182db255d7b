//! The bundled starter model gives what transformers and diffusers compute on it (tests/parity/make_starter_golden.py).
#![allow(clippy::unwrap_used)]

mod support;

use std::path::Path;

use blocklora_engine::model::{Component, Model};
use blocklora_engine::nn::{Conditioning, Forward};
use blocklora_engine::text::{self, Prompt};
use candle_core::{DType, Device, Tensor};
use support::*;

const TOLERANCE: f32 = 1e-4;

/// A program may read either notation of the vocabulary.
#[test]
fn both_notations_of_the_vocabulary_are_one() {
    let starter = Path::new(env!("CARGO_MANIFEST_DIR")).join("../starter");
    for folder in ["model/tokenizer", "clip"] {
        let folder = starter.join(folder);
        let read = |file: &str| std::fs::read_to_string(folder.join(file)).unwrap();
        let whole: serde_json::Value = serde_json::from_str(&read("tokenizer.json")).unwrap();
        let vocab: serde_json::Value = serde_json::from_str(&read("vocab.json")).unwrap();
        assert!(whole["model"]["vocab"] == vocab, "{}", folder.display());
        let rule = |rule: &serde_json::Value| format!("{} {}", rule[0].as_str().unwrap(), rule[1].as_str().unwrap());
        let rules: Vec<String> = whole["model"]["merges"].as_array().unwrap().iter().map(rule).collect();
        assert_eq!(read("merges.txt").lines().skip(1).collect::<Vec<_>>(), rules, "{}", folder.display());
    }
}

#[test]
fn two_vocabularies_in_one_folder_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let starter = Path::new(env!("CARGO_MANIFEST_DIR")).join("../starter/model");
    copy_folder(&starter, folder.path());
    let path = folder.path().join("tokenizer/vocab.json");
    let text = std::fs::read_to_string(&path).unwrap();
    let other = text.replace("\"dog</w>\": 827", "\"dog</w>\": 1").replace("\"\\\"\": 1", "\"\\\"\": 827");
    assert_ne!(other, text);
    std::fs::write(&path, other).unwrap();
    let error = Model::load(folder.path(), &Device::Cpu, DType::F32).unwrap_err().to_string();
    assert!(error.contains("vocab.json") && error.contains("tokenizer.json"), "{error}");
}

#[test]
fn the_starter_equals_diffusers() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let model = Model::load(&root.join("daemon/starter/model"), &Device::Cpu, DType::F32).unwrap();
    let path = root.join("tests/golden/starter.safetensors");
    let missing = "run tests/parity/make_starter_golden.py";
    let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}: {missing}", path.display()));
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let metadata = header.metadata().as_ref().unwrap();
    for component in Component::ALL {
        let digest = model.weight_file(component).digest();
        let stale = "the model has been replaced: run tests/parity/make_starter_golden.py";
        assert_eq!(metadata.get(component.folder()), Some(&digest), "{}: {stale}", component.folder());
    }
    let golden = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
    let prompt = &metadata["prompt"];
    let ids: Vec<i64> = golden["ids"].get(0).unwrap().to_vec1().unwrap();
    let ours = Prompt::parse(prompt).tokenise(model.tokenizer(), &[]).unwrap().ids;
    assert_eq!(ours.into_iter().map(i64::from).collect::<Vec<_>>(), ids);

    let none = Forward::default();
    let context = text::encode(&model, &[prompt], &[], &none).unwrap();
    let latents = (tensor("latents", golden["unet"].dims()) * 1.7).unwrap();
    let unet = model.unet().forward(&latents, &[601.0], &context, &none).unwrap();
    let (mean, logvar) = model.vae().encode(&tensor("picture", golden["picture"].dims())).unwrap();
    let picture = model.vae().decode(&(&latents / model.vae().scaling_factor()).unwrap()).unwrap();
    let Conditioning::Shared(encoding) = context else { panic!("layer-wise without concepts") };
    let check = |name: &str, ours: &Tensor| {
        let diff = max_diff(ours, &golden[name]);
        println!("{name}: {diff:e}");
        assert!(diff <= TOLERANCE, "{name}: {diff}");
    };
    for (name, ours) in [("text", encoding), ("unet", unet), ("mean", mean), ("logvar", logvar), ("picture", picture)] {
        check(name, &ours);
    }
}
