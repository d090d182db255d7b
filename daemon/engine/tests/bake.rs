//! Baking: a folder with concepts built in can be loaded, drawn with, and be the base of the next one.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::path::Path;

use blocklora_engine::Error;
use blocklora_engine::bake::{bake, baked_concepts};
use blocklora_engine::model::Model;
use blocklora_engine::nn::Forward;
use blocklora_engine::text::{self, Concept, TokenVectors};
use candle_core::{DType, Device, Tensor};
use support::*;

const WIDTH: usize = 24;
const TABLE: &str = "text_model.embeddings.token_embedding.weight";

fn load(dir: &Path) -> Model {
    Model::load(dir, &Device::Cpu, DType::F32).unwrap()
}

/// A concept of two words, with a vector for each of the model's cross-attentions.
fn concept(name: &str) -> Concept {
    let token = |i: usize| {
        let name = format!("{name}-{i}");
        TokenVectors { values: values(&name, 10 * WIDTH), name, layers: 10, width: WIDTH }
    };
    Concept { name: name.into(), tokens: vec![token(1), token(2)] }
}

/// What the UNet makes of a prompt.
fn drawn(model: &Model, prompt: &str, concepts: &[Concept]) -> Tensor {
    let context = text::encode(model, &[prompt], concepts, &Forward::default()).unwrap();
    model.unet().forward(&tensor("latents", &[1, 8, 8, 8]), &[500.0], &context, &Forward::default()).unwrap()
}

/// The model in `dir` must have exactly these concepts, draw them, and have a row of the table for each of their words.
#[track_caller]
fn has(dir: &Path, base: &Model, concepts: &[Concept]) -> Model {
    let model = load(dir);
    let built_in = baked_concepts(dir).unwrap();
    assert_eq!(built_in, concepts);
    let prompt = concepts.iter().map(|c| format!("<{}>", c.name)).collect::<Vec<_>>().join(" and ");
    let diff = max_diff(&drawn(&model, &prompt, &built_in), &drawn(base, &prompt, concepts));
    assert_eq!(diff, 0.0, "it draws another picture");
    let mut ids = Vec::new();
    for concept in concepts {
        for (i, token) in concept.tokens.iter().enumerate() {
            let word = if i == 0 { format!("<{}>", concept.name) } else { format!("<{}>_{i}", concept.name) };
            let id = model.tokenizer().id(&word).unwrap();
            let row = model.text_encoder().embed(&Tensor::new(&[[id]], &Device::Cpu).unwrap()).unwrap();
            let mean = Tensor::from_slice(&token.values, (10, WIDTH), &Device::Cpu).unwrap().mean(0).unwrap();
            let diff = max_diff(&row.flatten_all().unwrap(), &mean);
            assert!(diff < 1e-3, "{word}: row {id} is {diff} from the mean of its vectors");
            ids.push(id);
        }
    }
    assert!(ids.windows(2).all(|pair| pair[1] == pair[0] + 1), "{ids:?}");
    model
}

#[test]
fn a_baked_folder_is_the_base_of_the_next() {
    let source = model_folder("starter", DType::F16);
    let out = tempfile::tempdir().unwrap();
    let base = load(source.path());
    let all = [concept("milo"), concept("zuko"), concept("rex")];
    let folder = |i: usize| out.path().join(i.to_string());
    bake(&base, &all[..1], &folder(1)).unwrap();
    let first = has(&folder(1), &base, &all[..1]);
    // The words that are built in come along, whether they are named, as the daemon does, or not.
    bake(&first, &all[..2], &folder(2)).unwrap();
    let second = has(&folder(2), &base, &all[..2]);
    bake(&second, &all[2..], &folder(3)).unwrap();
    let third = has(&folder(3), &base, &all);
    // Nothing new: nothing is lost.
    bake(&third, &[], &folder(4)).unwrap();
    has(&folder(4), &base, &all);
}

#[test]
fn words_follow_the_tokenizers_and_take_the_tables_spare_rows() {
    for spare in [1, 3, 4, 9] {
        let source = model_folder("starter", DType::F16);
        let mut weights = weights("starter", "text_encoder");
        let table = weights.iter_mut().find(|(name, ..)| name == TABLE).unwrap();
        let words = table.1[0];
        table.1[0] += spare;
        table.2.extend(vec![0.25; spare * WIDTH]);
        write_weights(&weight_path(source.path(), "text_encoder"), &weights, DType::F16);
        let path = source.path().join("text_encoder/config.json");
        let mut config: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        config["vocab_size"] = (words + spare).into();
        fs::write(&path, config.to_string()).unwrap();

        let base = load(source.path());
        let all = [concept("milo"), concept("zuko")];
        let baked = source.path().join("baked");
        bake(&base, &all, &baked).unwrap();
        let model = has(&baked, &base, &all);
        assert_eq!(model.tokenizer().id("<milo>"), Some(base.tokenizer().next_id()));
        let next = base.tokenizer().next_id() as usize;
        assert_eq!(model.text_encoder().config().vocab_size, (words + spare).max(next + 4), "{spare} spare rows");
    }
}

#[test]
fn a_word_that_the_tokenizer_has_is_refused_before_anything_is_written() {
    let source = model_folder("starter", DType::F16);
    let out = tempfile::tempdir().unwrap();
    let (first, second) = (out.path().join("1"), out.path().join("2"));
    bake(&load(source.path()), &[concept("milo")], &first).unwrap();
    // As another tool leaves it: the word is there, but nobody knows whose it is.
    fs::remove_file(first.join(blocklora_engine::bake::TOKENS_FILE)).unwrap();
    let error = bake(&load(&first), &[concept("milo")], &second).unwrap_err();
    assert!(matches!(&error, Error::Incompatible { adapter, .. } if adapter == "milo"), "{error}");
    assert!(error.to_string().contains("\"<milo>\" already; train it again under another name"), "{error}");
    assert!(!second.exists());
}

/// Baking `concept` must fail with all of `needles` in the error, and write nothing.
#[track_caller]
fn refused(base: &Model, concept: Concept, needles: &[&str]) {
    let out = tempfile::tempdir().unwrap();
    let error = bake(base, &[concept], &out.path().join("baked")).unwrap_err();
    assert!(matches!(&error, Error::Incompatible { .. }), "{error}");
    needles.iter().for_each(|needle| assert!(error.to_string().contains(needle), "{error} does not say {needle:?}"));
    assert_eq!(fs::read_dir(out.path()).unwrap().count(), 0, "something was written");
}

#[test]
fn words_that_overflow_the_tables_type_are_refused() {
    let source = model_folder("starter", DType::F16);
    let base = load(source.path());
    let plain = |value: f32| {
        let token = TokenVectors { name: "milo-2".into(), layers: 1, width: WIDTH, values: vec![value; WIDTH] };
        Concept { name: "milo".into(), tokens: vec![token] }
    };
    refused(&base, plain(70_000.0), &["milo", "\"milo-2\" is inf in F16", "learning rate"]);
    bake(&base, &[plain(60_000.0)], &source.path().join("baked")).unwrap();
    // The mean of vectors may overflow where none of them does.
    let token = TokenVectors { name: "milo-1".into(), layers: 10, width: WIDTH, values: vec![1e38; 10 * WIDTH] };
    refused(&base, Concept { name: "milo".into(), tokens: vec![token] }, &["\"milo-1\" is inf"]);
}

#[test]
fn tokens_that_the_model_cannot_draw_are_refused() {
    let source = model_folder("starter", DType::F16);
    let base = load(source.path());
    let sized = |layers: usize, width: usize| {
        let token = TokenVectors { name: "milo-1".into(), layers, width, values: vec![0.5; layers * width] };
        Concept { name: "milo".into(), tokens: vec![token] }
    };
    refused(&base, sized(9, WIDTH), &["milo", "9 vectors", "10 cross-attentions"]);
    refused(&base, sized(10, WIDTH + 1), &["milo", "width 25", "24"]);
    refused(&base, sized(1, WIDTH - 1), &["milo", "width 23", "24"]);
    let mut short = sized(10, WIDTH);
    short.tokens[0].values.pop();
    refused(&base, short, &["239 values for 10 vectors"]);
}

#[test]
fn the_list_of_a_folders_concepts_is_checked() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(blocklora_engine::bake::TOKENS_FILE);
    let write = |listed: &str, value: f32| {
        let bytes = value.to_le_bytes();
        let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![1, 1], &bytes).unwrap();
        let metadata = std::collections::HashMap::from([("blocklora.concepts".to_owned(), listed.to_owned())]);
        let names = ["milo.t", "\u{1b}[31m.t", "milo.\u{202e}"];
        let tensors = names.map(|name| (name, view.clone()));
        safetensors::serialize_to_file(tensors, Some(metadata), &path).unwrap();
    };
    let milo = r#"{"name": "milo", "tokens": ["t"]}"#;
    write(&format!("[{milo}]"), 1.5);
    assert_eq!(baked_concepts(folder.path()).unwrap().len(), 1);
    let many = format!(r#"[{{"name": "milo", "tokens": {}}}]"#, serde_json::json!(vec!["t"; 17]));
    for (listed, value, needles) in [
        (
            r#"[{"name": "\u001b[31m", "tokens": ["t"]}]"#.to_owned(),
            1.5,
            ["[0].name: \"\\u{1b}[31m\"", "must be 1 to 64"],
        ),
        (
            r#"[{"name": "milo", "tokens": ["\u202e"]}]"#.to_owned(),
            1.5,
            ["[0].tokens[0]: \"\\u{202e}\"", "must be 1 to 64"],
        ),
        (r#"[{"name": "../milo", "tokens": []}]"#.to_owned(), 1.5, ["[0].name", "must be 1 to 64"]),
        (format!("[{milo}, {milo}]"), 1.5, ["blocklora.concepts[1].name", "\"milo\" occurs twice"]),
        (r#"[{"name": "milo", "tokens": ["t", "t"]}]"#.to_owned(), 1.5, ["[0].tokens[1]", "\"t\" occurs twice"]),
        (many, 1.5, ["[0].tokens", "17 tokens, at most 16"]),
        (format!("[{milo}]"), f32::NAN, ["\"milo.t\"", "holds NaN"]),
    ] {
        write(&listed, value);
        let error = baked_concepts(folder.path()).unwrap_err().to_string();
        assert!(error.contains(&*path.to_string_lossy()), "{error}");
        needles.iter().for_each(|needle| assert!(error.contains(needle), "{error} does not say {needle:?}"));
        assert!(!error.contains(|c: char| c.is_control() || c == '\u{202e}'), "{error:?} would harm a terminal");
    }
}
