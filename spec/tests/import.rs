//! Other tools' files become adapters with the same change, or are refused by name. tests/parity/check_imports.py asks
//! the other tools' own writers.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::{Path, PathBuf};

use blocklora_spec::import::{Format, Imported, Module, Options, Target, import};
use blocklora_spec::{Adapter, Base, Delta, Error, Kind, Manifest, Storage, Token, TokenVectors, export};
use half::{bf16, f16};
use serde_json::{Value, json};
use tempfile::TempDir;

const Q: &str = "unet.down_blocks.0.attn1.to_q";
const OUT: &str = "unet.down_blocks.0.attn1.to_out.0";
const TEXT: &str = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj";
const CONV: &str = "unet.down_blocks.0.proj_in";
const TIME: &str = "unet.time_embedding.linear_1";

/// Two inputs and three outputs everywhere.
fn target() -> Target {
    let module = |name: &str, shape: &[usize], adaptable| Module { name: name.into(), shape: shape.into(), adaptable };
    Target {
        base: Base { architecture: "sd-tiny".into(), digest: "ab".repeat(32) },
        modules: vec![
            module(Q, &[3, 2], true),
            module(OUT, &[3, 2], true),
            module(TEXT, &[3, 2], true),
            module(CONV, &[3, 2, 1, 1], false),
            module(TIME, &[3, 2], false),
        ],
        token_width: 4,
    }
}

fn options() -> Options {
    Options {
        name: None,
        kind: Kind::Style,
        class_word: None,
        licence: None,
        words: vec![],
        allow_unmatched: false,
        storage: None,
    }
}

/// A file to be written.
#[derive(Clone, Default)]
struct Foreign {
    tensors: Vec<(String, &'static str, Vec<usize>, Vec<u8>)>,
    metadata: Vec<(&'static str, String)>,
}

impl Foreign {
    fn tensor(mut self, name: &str, dtype: &'static str, shape: &[usize], values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|&x| match dtype {
            "F16" => f16::from_f32(x).to_le_bytes().to_vec(),
            "BF16" => bf16::from_f32(x).to_le_bytes().to_vec(),
            "I64" => (x as i64).to_le_bytes().to_vec(),
            "F8_E4M3" => vec![0x38],
            _ => x.to_le_bytes().to_vec(),
        });
        self.tensors.push((name.into(), dtype, shape.into(), bytes.collect()));
        self
    }

    fn f32(self, name: &str, shape: &[usize], values: &[f32]) -> Self {
        self.tensor(name, "F32", shape, values)
    }

    /// Both factors of rank `rank` under `a` and `b`, whose product is that of [`product`] with this `seed`.
    fn factors(self, [a, b]: [&str; 2], rank: usize, seed: usize) -> Self {
        let (down, up) = numbers(rank, seed);
        self.f32(a, &[rank, 2], &down).f32(b, &[3, rank], &up)
    }

    fn meta(mut self, key: &'static str, value: &str) -> Self {
        self.metadata.push((key, value.into()));
        self
    }

    fn bytes(&self) -> Vec<u8> {
        let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
        if !self.metadata.is_empty() {
            let pairs = self.metadata.iter().map(|(key, value)| ((*key).to_owned(), json!(value)));
            header.insert("__metadata__".into(), Value::Object(pairs.collect()));
        }
        for (name, dtype, shape, bytes) in &self.tensors {
            let begin = data.len();
            data.extend(bytes);
            let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": [begin, data.len()]});
            header.insert(name.clone(), entry);
        }
        let text = Value::Object(header).to_string();
        // Not padded, as older writers leave it.
        [&(text.len() as u64).to_le_bytes(), text.as_bytes(), &data].concat()
    }

    fn write(&self, folder: &TempDir, name: &str) -> PathBuf {
        let path = folder.path().join(name);
        std::fs::write(&path, self.bytes()).unwrap();
        path
    }
}

/// A [rank, 2] and B [3, rank], exact in every type.
fn numbers(rank: usize, seed: usize) -> (Vec<f32>, Vec<f32>) {
    let number = |i: usize| ((7 * i + 3 * seed) % 11) as f32 / 8.0 - 0.5;
    ((0..rank * 2).map(number).collect(), (0..3 * rank).map(|i| number(i + 5)).collect())
}

/// scale B A.
fn product(a: &[f32], b: &[f32], rank: usize, scale: f64) -> Vec<f64> {
    let of = |row: usize, column: usize| -> f64 {
        (0..rank).map(|k| f64::from(b[row * rank + k]) * f64::from(a[k * 2 + column])).sum::<f64>() * scale
    };
    (0..3).flat_map(|row| (0..2).map(move |column| (row, column))).map(|(row, column)| of(row, column)).collect()
}

fn expected(rank: usize, seed: usize, scale: f64) -> Vec<f64> {
    let (a, b) = numbers(rank, seed);
    product(&a, &b, rank, scale)
}

fn adapter(imported: &Imported) -> Adapter {
    Adapter::from_bytes("imported", imported.builder.to_bytes("imported").unwrap()).unwrap()
}

#[track_caller]
fn delta(adapter: &Adapter, layer: &str) -> Vec<f64> {
    let found = adapter.layers().iter().find(|l| l.name == layer).unwrap_or_else(|| panic!("no {layer}: {adapter:?}"));
    product(&found.a(), &found.b_scattered(), found.rank, f64::from(adapter.scale()))
}

#[track_caller]
fn close(actual: &[f64], expected: &[f64]) {
    let far = actual.iter().zip(expected).any(|(x, y)| (x - y).abs() > 1e-6 * y.abs().max(1e-3));
    assert!(actual.len() == expected.len() && !far, "{actual:?} is not {expected:?}");
}

#[track_caller]
fn imports(file: &Foreign) -> (Imported, Adapter) {
    let folder = tempfile::tempdir().unwrap();
    let imported = import(file.write(&folder, "x.safetensors"), &target(), &options()).unwrap();
    let adapter = adapter(&imported);
    (imported, adapter)
}

#[track_caller]
fn refused_with(file: &Foreign, options: &Options, needles: &[&str]) -> Error {
    let folder = tempfile::tempdir().unwrap();
    let error = import(file.write(&folder, "x.safetensors"), &target(), options).unwrap_err();
    let text = error.to_string();
    for needle in ["x.safetensors"].iter().chain(needles) {
        assert!(text.contains(needle), "{needle:?} is not in: {text}");
    }
    error
}

#[track_caller]
fn refused(file: &Foreign, needles: &[&str]) -> Error {
    refused_with(file, &options(), needles)
}

const KOHYA_Q: [&str; 2] =
    ["lora_unet_down_blocks_0_attn1_to_q.lora_down.weight", "lora_unet_down_blocks_0_attn1_to_q.lora_up.weight"];
const KOHYA_OUT: [&str; 2] = [
    "lora_unet_down_blocks_0_attn1_to_out_0.lora_down.weight",
    "lora_unet_down_blocks_0_attn1_to_out_0.lora_up.weight",
];
const KOHYA_TEXT: [&str; 2] = [
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight",
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight",
];
const ALPHA_Q: &str = "lora_unet_down_blocks_0_attn1_to_q.alpha";
const ALPHA_OUT: &str = "lora_unet_down_blocks_0_attn1_to_out_0.alpha";

fn kohya() -> Foreign {
    Foreign::default().factors(KOHYA_Q, 2, 1)
}

#[test]
fn kohya_with_one_alpha_keeps_its_bits() {
    let file = kohya().factors(KOHYA_OUT, 2, 2).f32(ALPHA_Q, &[], &[0.75]).f32(ALPHA_OUT, &[1], &[0.75]);
    let (imported, adapter) = imports(&file.meta("ss_seed", "18446744073709551615").meta("ss_steps", "900"));
    let manifest = adapter.manifest();
    assert_eq!((manifest.rank, manifest.alpha, manifest.delta), (2, 0.75, Delta::AlphaOverRank));
    assert_eq!((imported.format, imported.layers, imported.storage), (Format::Kohya, 2, Storage::F32));
    let layer = adapter.layers().iter().find(|l| l.name == Q).unwrap();
    assert_eq!((layer.a(), layer.b()), numbers(2, 1), "the factors are not those of the file");
    close(&delta(&adapter, OUT), &expected(2, 2, 0.375));
    assert_eq!(manifest.algorithm.id, "import-kohya");
    assert_eq!((manifest.training.seed, manifest.training.steps), (u64::MAX, 900));
    assert_eq!(manifest.partition, None);
    assert_eq!(manifest.algorithm.config["sources"][0]["sha256"], json!(manifest.training.data_digest));
    assert_eq!((manifest.name.as_str(), manifest.class_word.as_str()), ("x", "style"));
}

#[test]
fn a_missing_alpha_is_the_rank() {
    let file = kohya().factors(KOHYA_OUT, 1, 2).factors(KOHYA_TEXT, 3, 3).f32(ALPHA_OUT, &[], &[1.0]);
    let (_, adapter) = imports(&file);
    let manifest = adapter.manifest();
    assert_eq!((manifest.rank, manifest.alpha, manifest.delta), (3, 1.0, Delta::Alpha));
    close(&delta(&adapter, Q), &expected(2, 1, 1.0));
    close(&delta(&adapter, OUT), &expected(1, 2, 1.0));
    close(&delta(&adapter, TEXT), &expected(3, 3, 1.0));
}

#[test]
fn differing_scales_go_into_b() {
    let file = kohya().factors(KOHYA_OUT, 3, 2).f32(ALPHA_Q, &[], &[0.3]).tensor(ALPHA_OUT, "I64", &[], &[7.0]);
    let (imported, adapter) = imports(&file);
    assert_eq!(
        (adapter.manifest().alpha, adapter.manifest().delta, imported.storage),
        (1.0, Delta::Alpha, Storage::F32)
    );
    close(&delta(&adapter, Q), &expected(2, 1, f64::from(0.3f32) / 2.0));
    close(&delta(&adapter, OUT), &expected(3, 2, 7.0 / 3.0));
    // A negative alpha is a scale like any other.
    let (_, adapter) = self::imports(&kohya().f32(ALPHA_Q, &[], &[-1.0]));
    close(&delta(&adapter, Q), &expected(2, 1, -0.5));
}

#[test]
fn numbers_stay_in_the_type_that_holds_them() {
    let of = |dtype: &'static str, other: &'static str| {
        let (a, b) = numbers(2, 1);
        Foreign::default().tensor(KOHYA_Q[0], dtype, &[2, 2], &a).tensor(KOHYA_Q[1], other, &[3, 2], &b)
    };
    for (dtype, other, storage) in [
        ("F16", "F16", Storage::F16),
        ("BF16", "BF16", Storage::BF16),
        ("F16", "BF16", Storage::F32),
        ("F32", "F16", Storage::F32),
    ] {
        let (imported, adapter) = imports(&of(dtype, other));
        assert_eq!(imported.storage, storage, "{dtype} {other}");
        close(&delta(&adapter, Q), &expected(2, 1, 1.0));
    }
    refused(&of("F8_E4M3", "F16"), &[KOHYA_Q[0], "F8_E4M3", "F16, BF16 or F32"]);
    refused(&of("F16", "I64"), &[KOHYA_Q[1], "I64"]);
    let large = Foreign::default().f32(KOHYA_Q[0], &[1, 2], &[1e6, 1.0]).f32(KOHYA_Q[1], &[3, 1], &[1.0; 3]);
    let half = Options { storage: Some(Storage::F16), ..options() };
    refused_with(&large, &half, &["1000000", "too large for f16"]);
}

#[test]
fn diffusers_files_of_both_forms() {
    let current = Foreign::default()
        .factors(
            ["unet.down_blocks.0.attn1.to_q.lora.down.weight", "unet.down_blocks.0.attn1.to_q.lora.up.weight"],
            2,
            1,
        )
        .factors(
            [
                "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight",
                "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight",
            ],
            2,
            3,
        );
    let (imported, adapter) = imports(&current);
    assert_eq!((imported.format, adapter.scale()), (Format::Diffusers, 1.0));
    close(&delta(&adapter, Q), &expected(2, 1, 1.0));
    close(&delta(&adapter, TEXT), &expected(2, 3, 1.0));
    for prefix in ["unet.", ""] {
        let key = |name: &str, end: &str| format!("{prefix}down_blocks.0.attn1.processor.{name}_lora.{end}.weight");
        let old = Foreign::default()
            .factors([&key("to_q", "down"), &key("to_q", "up")], 2, 1)
            .factors([&key("to_out", "down"), &key("to_out", "up")], 2, 2)
            .factors(
                [
                    "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.down.weight",
                    "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.up.weight",
                ],
                2,
                3,
            );
        let (_, adapter) = imports(&old);
        for (layer, seed) in [(Q, 1), (OUT, 2), (TEXT, 3)] {
            close(&delta(&adapter, layer), &expected(2, seed, 1.0));
        }
    }
}

const PEFT_Q: [&str; 2] =
    ["unet.down_blocks.0.attn1.to_q.lora_A.weight", "unet.down_blocks.0.attn1.to_q.lora_B.weight"];

#[test]
fn peft_in_one_file() {
    // Without text_model., as newer versions of transformers name it.
    let text = [
        "text_encoder.encoder.layers.0.self_attn.q_proj.lora_A.default.weight",
        "text_encoder.encoder.layers.0.self_attn.q_proj.lora_B.default.weight",
    ];
    let file = Foreign::default().factors(PEFT_Q, 2, 1).factors(text, 3, 3);
    let (imported, adapter) = imports(&file);
    assert_eq!((imported.format, adapter.scale()), (Format::Peft, 1.0));
    close(&delta(&adapter, TEXT), &expected(3, 3, 1.0));
    let config = json!({
        "unet.r": 4, "unet.lora_alpha": 3, "unet.rank_pattern": {"to_q": 2}, "unet.alpha_pattern": {"attn1.to_q": 5},
        "text_encoder.r": 3, "text_encoder.lora_alpha": 6, "text_encoder.use_rslora": true
    });
    let (_, adapter) = imports(&file.clone().meta("lora_adapter_metadata", &config.to_string()));
    close(&delta(&adapter, Q), &expected(2, 1, 2.5));
    close(&delta(&adapter, TEXT), &expected(3, 3, 6.0 / 3f64.sqrt()));
    refused(&file.clone().meta("lora_adapter_metadata", "[1]"), &["configuration"]);
    refused(&file.clone().meta("lora_adapter_metadata", r#"{"unet.r": 1, "unet.r": 2}"#), &["\"unet.r\" occurs twice"]);
    refused(&file.meta("lora_adapter_metadata", r#"{"unet.r": 4, "unet.lora_alpha": 3}"#), &["rank 4", "rank 2"]);
}

#[test]
fn peft_folders() {
    let folder = tempfile::tempdir().unwrap();
    let raw = |path: &str| ["A", "B"].map(|f| format!("base_model.model.{path}.lora_{f}.weight"));
    let write = |at: &Path, path: &str, seed, config: Value| {
        std::fs::create_dir_all(at).unwrap();
        let [a, b] = raw(path);
        std::fs::write(at.join("adapter_model.safetensors"), Foreign::default().factors([&a, &b], 2, seed).bytes())
            .unwrap();
        std::fs::write(at.join("adapter_config.json"), config.to_string()).unwrap();
    };
    let both = folder.path().join("both");
    write(&both.join("unet"), "down_blocks.0.attn1.to_q", 1, json!({"r": 2, "lora_alpha": 3}));
    let text = json!({"r": 2, "lora_alpha": 4, "use_rslora": true, "peft_type": "LORA"});
    write(&both.join("text_encoder"), "text_model.encoder.layers.0.self_attn.q_proj", 3, text);
    let imported = import(&both, &target(), &options()).unwrap();
    let adapter = adapter(&imported);
    close(&delta(&adapter, Q), &expected(2, 1, 1.5));
    close(&delta(&adapter, TEXT), &expected(2, 3, 4.0 / 2f64.sqrt()));
    assert_eq!((adapter.manifest().name.as_str(), imported.origins.len()), ("both", 2));
    // One part alone, as its folder and as its file.
    for path in [both.join("unet"), both.join("unet/adapter_model.safetensors")] {
        let alone = import(path, &target(), &options()).unwrap();
        close(&delta(&self::adapter(&alone), Q), &expected(2, 1, 1.5));
    }
    let fails = |path: &Path, needle: &str| {
        let error = import(path, &target(), &options()).unwrap_err().to_string();
        assert!(error.contains(needle), "{error}");
    };
    std::fs::remove_file(both.join("unet/adapter_config.json")).unwrap();
    fails(&both.join("unet/adapter_model.safetensors"), "adapter_config.json");
    fails(&both.join("unet"), "no adapter_config.json");
    let dora = folder.path().join("dora");
    write(&dora, "down_blocks.0.attn1.to_q", 1, json!({"r": 2, "lora_alpha": 3, "use_dora": true}));
    fails(&dora, "DoRA");
    std::fs::write(dora.join("adapter_config.json"), "{").unwrap();
    fails(&dora, "adapter_config.json: configuration: not valid JSON");
    std::fs::remove_file(dora.join("adapter_model.safetensors")).unwrap();
    std::fs::write(dora.join("adapter_model.bin"), b"PK\x03\x04").unwrap();
    fails(&dora, "pickle");
}

#[test]
fn linears_written_as_convolutions_of_one_pixel_are_linears() {
    let (a, b) = numbers(2, 1);
    let file = Foreign::default().f32(KOHYA_Q[0], &[2, 2, 1, 1], &a).f32(KOHYA_Q[1], &[3, 2, 1, 1], &b);
    close(&delta(&imports(&file).1, Q), &expected(2, 1, 1.0));
    let wide = Foreign::default().f32(KOHYA_Q[0], &[1, 2, 1, 3], &[0.0; 6]).f32(KOHYA_Q[1], &[3, 1], &[0.0; 3]);
    refused(&wide, &[KOHYA_Q[0], "[1, 2, 1, 3]", "is a Linear"]);
}

#[test]
fn every_key_is_applied_or_named() {
    let conv = ["lora_unet_down_blocks_0_proj_in.lora_down.weight", "lora_unet_down_blocks_0_proj_in.lora_up.weight"];
    let time = "lora_unet_time_embedding_linear_1.alpha";
    let file = kohya().factors(conv, 1, 4).f32(time, &[], &[1.0]).f32("what.is.this", &[1], &[0.0]).f32(
        KOHYA_OUT[0],
        &[1, 2],
        &[0.0; 2],
    );
    let error = refused(&file, &["5 of its keys", conv[0], "and 1 more", "a convolution", "--allow-unmatched"]);
    assert!(matches!(&error, Error::Unmatched { keys, .. } if keys.len() == 5), "{error:?}");
    let folder = tempfile::tempdir().unwrap();
    let lenient = Options { allow_unmatched: true, ..options() };
    let imported = import(file.write(&folder, "x.safetensors"), &target(), &lenient).unwrap();
    close(&delta(&adapter(&imported), Q), &expected(2, 1, 1.0));
    let reason = |key: &str| &imported.unmatched.iter().find(|u| u.key == key).unwrap().reason;
    assert_eq!((imported.layers, imported.unmatched.len()), (1, 5));
    assert!(reason(conv[1]).contains("a convolution"), "{}", reason(conv[1]));
    assert!(reason(time).contains("not one of the Linears"), "{}", reason(time));
    assert!(reason(KOHYA_OUT[0]).contains("B (up) beside it is missing"), "{}", reason(KOHYA_OUT[0]));
    assert!(reason("what.is.this").contains("not a key of"), "{}", reason("what.is.this"));
    // Nothing is left.
    refused_with(&Foreign::default().factors(conv, 1, 4), &lenient, &["none of its keys", "a convolution"]);
    refused_with(&Foreign::default(), &lenient, &["no tensors"]);
}

#[test]
fn other_methods_are_named() {
    let with = |key: &str| kohya().f32(key, &[1, 1], &[1.0]);
    for (key, needle) in [
        ("lora_unet_down_blocks_0_attn1_to_k.hada_w1_a", "LoHa"),
        ("lora_unet_down_blocks_0_attn1_to_k.lokr_w1", "LoKr"),
        ("lora_unet_down_blocks_0_attn1_to_k.oft_blocks", "OFT"),
        ("lora_unet_down_blocks_0_attn1_to_k.on_input", "IA3"),
        ("lora_unet_down_blocks_0_attn1_to_k.b2.weight", "GLoRA"),
        ("lora_unet_down_blocks_0_proj_in.lora_mid.weight", "Tucker"),
        ("lora_unet_down_blocks_0_attn1_to_k.diff", "full difference"),
        ("lora_te2_text_model_encoder_layers_0_self_attn_q_proj.alpha", "SDXL"),
        ("lora_unet_input_blocks_4_1_proj_in.lora_up.weight", "SDXL"),
        ("text_encoder_2.text_model.x.lora_A.weight", "SDXL"),
        ("transformer.x.lora_A.weight", "Flux"),
        ("model.diffusion_model.x.weight", "whole model"),
    ] {
        let error = refused(&with(key), &[key, needle]);
        assert!(matches!(error, Error::Unmatched { .. }), "{error:?}");
    }
    // Without its magnitudes DoRA's A and B are another change.
    let lenient = Options { allow_unmatched: true, ..options() };
    refused_with(&with("lora_unet_down_blocks_0_attn1_to_q.dora_scale"), &lenient, &["dora_scale", "DoRA"]);
    refused_with(&with("unet.down_blocks.0.attn1.to_q.lora_magnitude_vector"), &lenient, &["DoRA"]);
}

#[test]
fn factors_that_do_not_fit_are_refused() {
    let pair = |a: &[usize], b: &[usize]| {
        let zeros = |shape: &[usize]| vec![0.0; shape.iter().product()];
        Foreign::default().f32(KOHYA_Q[0], a, &zeros(a)).f32(KOHYA_Q[1], b, &zeros(b))
    };
    refused(&pair(&[2, 2], &[3, 1]), &["rank 2", "has 1"]);
    refused(&pair(&[1, 5], &[3, 1]), &[Q, "3 outputs of 5 inputs", "3 of 2", "base model"]);
    refused(&pair(&[0, 2], &[3, 0]), &["rank 0"]);
    refused(&pair(&[1025, 2], &[3, 1025]), &["rank 1025", "1 to 1024"]);
    refused(&pair(&[2], &[3, 1]), &[KOHYA_Q[0], "two dimensions"]);
    let not_finite = |at: usize, value: f32| {
        let mut up = [1.0; 3];
        up[at] = value;
        Foreign::default().f32(KOHYA_Q[0], &[1, 2], &[1.0; 2]).f32(KOHYA_Q[1], &[3, 1], &up)
    };
    refused(&not_finite(2, f32::NAN), &[KOHYA_Q[1], "element 2", "NaN"]);
    refused(&not_finite(0, f32::INFINITY), &[KOHYA_Q[1], "element 0", "inf"]);
    refused(&kohya().f32(ALPHA_Q, &[], &[f32::NAN]), &[ALPHA_Q, "NaN"]);
    refused(&kohya().f32(ALPHA_Q, &[], &[0.0]), &[ALPHA_Q, "alpha of 0"]);
    refused(&kohya().f32(ALPHA_Q, &[2], &[1.0, 1.0]), &[ALPHA_Q, "1 numbers"]);
    // Two names of one layer.
    refused(&kohya().factors(PEFT_Q, 2, 1), &[KOHYA_Q[0], PEFT_Q[0], "leave one out"]);
}

/// Two of the base's modules may have one name with underscores; none is guessed at.
#[test]
fn a_name_of_two_modules_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = kohya().write(&folder, "x.safetensors");
    let mut target = target();
    let twin = Module { name: "unet.down_blocks.0.attn1_to_q".into(), shape: vec![3, 2], adaptable: true };
    target.modules.push(twin.clone());
    let error = import(&path, &target, &options()).unwrap_err().to_string();
    assert!(error.contains(Q) && error.contains(&twin.name), "{error}");
}

fn vectors(count: usize) -> Vec<f32> {
    (0..count * 4).map(|i| i as f32 / 4.0).collect()
}

#[test]
fn words_become_tokens() {
    let word =
        |key: &str, shape: &[usize]| Foreign::default().f32(key, shape, &vectors(shape.iter().product::<usize>() / 4));
    for (file, name) in
        [(word("<my cat>", &[2, 4]), "my_cat"), (word("emb_params", &[2, 4]), "x"), (word("clip_l", &[2, 4]), "x")]
    {
        let (imported, adapter) = imports(&file);
        assert_eq!(
            (imported.format, imported.layers, adapter.manifest().name.as_str()),
            (Format::TextualInversion, 0, name)
        );
        let expected: Vec<TokenVectors> = [1, 2]
            .map(|i| TokenVectors {
                name: format!("{name}-{i}"),
                layers: 1,
                width: 4,
                values: vectors(2)[4 * (i - 1)..4 * i].into(),
            })
            .into();
        assert_eq!(adapter.tokens(), expected);
    }
    assert_eq!(imports(&word("<milo>", &[4])).1.tokens().len(), 1);
    refused(&word("<milo>", &[1, 8]), &["<milo>", "8 elements", "have 4", "another base model"]);
    refused(&word("<milo>", &[17, 4]), &["17 vectors", "at most 16"]);
    refused(&word("clip_l", &[1, 4]).f32("clip_g", &[1, 8], &[0.0; 8]), &["clip_g", "SDXL"]);
    refused(&Foreign::default().f32("emb_params", &[1, 4], &[f32::NAN; 4]), &["emb_params", "NaN"]);
}

#[test]
fn words_come_along_with_a_lora() {
    let folder = tempfile::tempdir().unwrap();
    let bundled = kohya().f32("bundle_emb.cat.string_to_param.*", &[1, 4], &vectors(1));
    let (imported, adapter) = imports(&bundled);
    assert_eq!((imported.format, imported.words[0].name.as_str(), adapter.tokens().len()), (Format::Kohya, "cat", 1));
    close(&delta(&adapter, Q), &expected(2, 1, 1.0));
    refused(&bundled.f32("bundle_emb.cat.clip_g", &[1, 4], &vectors(1)), &["bundle_emb.cat.clip_g", "SDXL"]);
    let words = [("one", 1), ("two", 2)].map(|(name, count)| {
        Foreign::default().f32(name, &[count, 4], &vectors(count)).write(&folder, &format!("{name}.safetensors"))
    });
    let with = Options { words: words.into(), ..options() };
    let imported = import(kohya().write(&folder, "x.safetensors"), &target(), &with).unwrap();
    let adapter = self::adapter(&imported);
    let values: Vec<f32> = adapter.tokens().iter().flat_map(|t| t.values.clone()).collect();
    assert_eq!(values, [vectors(1), vectors(2)].concat());
    let named: Vec<(&str, usize)> = imported.words.iter().map(|w| (w.name.as_str(), w.vectors)).collect();
    assert_eq!((named, imported.origins.len()), (vec![("one", 1), ("two", 2)], 3));
    // A LoRA is not a file of words.
    let wrong = Options { words: vec![kohya().write(&folder, "y.safetensors")], ..options() };
    refused_with(&kohya(), &wrong, &[KOHYA_Q[0], "textual inversion"]);
}

#[test]
fn what_the_user_says_counts_more_than_the_file() {
    let file = kohya()
        .meta("modelspec.title", "A Cat!")
        .meta("ss_output_name", "other")
        .meta("modelspec.license", "CC0-1.0")
        .meta("modelspec.trigger_phrase", "sks cat")
        .meta("ss_tag_frequency", &"x".repeat(1000));
    let (imported, adapter) = imports(&file);
    let manifest = adapter.manifest();
    assert_eq!((manifest.name.as_str(), manifest.licence.as_deref()), ("A_Cat", Some("CC0-1.0")));
    assert_eq!(imported.trigger_phrase.as_deref(), Some("sks cat"));
    let kept = &manifest.algorithm.config["metadata"];
    assert_eq!((&kept["ss_output_name"], &kept["ss_tag_frequency"]), (&json!("other"), &Value::Null));
    let folder = tempfile::tempdir().unwrap();
    let path = file.write(&folder, "x.safetensors");
    let say = |name: &str| Options {
        name: Some(name.into()),
        class_word: Some("cat".into()),
        licence: Some("MIT".into()),
        storage: Some(Storage::F16),
        ..options()
    };
    let imported = import(&path, &target(), &say("tom")).unwrap();
    let manifest = self::adapter(&imported).manifest().clone();
    let Manifest { name, class_word, licence, .. } = manifest;
    assert_eq!((name.as_str(), class_word.as_str(), licence.as_deref()), ("tom", "cat", Some("MIT")));
    assert_eq!(imported.storage, Storage::F16);
    let error = import(&path, &target(), &say("no name")).unwrap_err().to_string();
    assert!(error.contains("\"no name\" must be"), "{error}");
    assert_eq!(
        imported.builder.to_bytes("a").unwrap(),
        import(&path, &target(), &say("tom")).unwrap().builder.to_bytes("a").unwrap()
    );
}

#[test]
fn what_is_no_safetensors_file_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let fails = |name: &str, bytes: &[u8], needles: &[&str]| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        let error = import(&path, &target(), &options()).unwrap_err().to_string();
        for needle in [name].iter().chain(needles) {
            assert!(error.contains(needle), "{needle:?} is not in: {error}");
        }
    };
    fails("a.pt", b"PK\x03\x04\x00\x00\x08\x08\x00\x00", &["pickle", "save_file(torch.load("]);
    fails("b.safetensors", b"PK\x03\x04\x00\x00\x08\x08\x00\x00", &["pickle"]);
    fails("c.ckpt", b"\x80\x02}q\x00(X\x0a\x00", &["pickle"]);
    fails("d.safetensors", b"", &["truncated"]);
    fails("e.safetensors", b"not a safetensors file at all", &["header"]);
    let tensor = |offsets: [u64; 2], second: [u64; 2]| {
        let entry = |offsets| json!({"dtype": "F32", "shape": [1], "data_offsets": offsets});
        common::raw::container(&json!({"a": entry(offsets), "b": entry(second)}).to_string(), &[0; 8])
    };
    fails("f.safetensors", &tensor([0, 12], [4, 8]), &["\"a\"", "truncated"]);
    fails("g.safetensors", &tensor([8, 4], [4, 8]), &["\"a\"", "8 to 4"]);
    fails("h.safetensors", &tensor([0, 8], [0, 8]), &["\"b\"", "overlaps"]);
    fails("i.safetensors", &tensor([0, u64::MAX], [4, 8]), &["\"a\""]);
    // A safetensors file whatever it is called.
    std::fs::write(folder.path().join("j.bin"), kohya().bytes()).unwrap();
    assert!(import(folder.path().join("j.bin"), &target(), &options()).is_ok());
    // A shape that is not that of its bytes.
    let mut short = kohya();
    short.tensors[0].2 = vec![1 << 40, 2];
    fails("k.safetensors", &short.bytes(), &["rank 1099511627776"]);
}

/// One byte after the other is changed: whatever that makes of the file, it is read or refused.
#[test]
fn damaged_files_are_no_reason_to_panic() {
    let folder = tempfile::tempdir().unwrap();
    let config = json!({"unet.r": 2, "unet.lora_alpha": 3, "unet.alpha_pattern": {"to_q": 5}}).to_string();
    let file = Foreign::default().factors(PEFT_Q, 2, 1).factors(KOHYA_OUT, 1, 2).f32(ALPHA_OUT, &[], &[1.0]);
    let bytes = file.f32("bundle_emb.cat.clip_l", &[1, 4], &vectors(1)).meta("lora_adapter_metadata", &config).bytes();
    let lenient = Options { allow_unmatched: true, ..options() };
    let (mut read, mut refused) = (0, 0);
    for at in 0..bytes.len() {
        for byte in [bytes[at] ^ 1, bytes[at] ^ 0x10, 0xff] {
            let mut damaged = bytes.clone();
            damaged[at] = byte;
            let path = folder.path().join(format!("{at}-{byte}.safetensors"));
            std::fs::write(&path, damaged).unwrap();
            match import(&path, &target(), &lenient) {
                Ok(imported) => {
                    imported.builder.to_bytes("x").unwrap();
                    read += 1;
                }
                Err(error) => {
                    assert!(error.to_string().contains(&format!("{at}-{byte}.safetensors")), "{error}");
                    refused += 1;
                }
            }
            std::fs::remove_file(path).unwrap();
        }
    }
    assert!(read > 0 && refused > 0);
}

/// Ranks that would be filled up to more than an adapter may have are found before that is done.
#[test]
fn filling_up_is_bounded() {
    let folder = tempfile::tempdir().unwrap();
    let mut target = target();
    let mut file = Foreign::default().factors(KOHYA_Q, 1024, 1);
    for i in 0..20 {
        target.modules.push(Module { name: format!("unet.wide.{i}"), shape: vec![1, 1 << 16], adaptable: true });
        let keys = ["down", "up"].map(|f| format!("lora_unet_wide_{i}.lora_{f}.weight"));
        file = file.f32(&keys[0], &[1, 1 << 16], &[0.0; 1 << 16]).f32(&keys[1], &[1, 1], &[0.0]);
    }
    let error = import(file.write(&folder, "x.safetensors"), &target, &options()).unwrap_err().to_string();
    assert!(error.contains("rank 1024 in all 21 layers"), "{error}");
}

/// What this project exports comes back as it was.
#[test]
fn exports_come_back() {
    let folder = tempfile::tempdir().unwrap();
    let tokens = ["milo_1", "milo_2"].map(|name| Token { name: name.into(), vectors: 1 });
    let modules =
        common::LAYERS.iter().map(|(name, m, n)| Module { name: (*name).into(), shape: vec![*m, *n], adaptable: true });
    let target = Target { modules: modules.collect(), token_width: 5, ..target() };
    for (delta, storage) in [(Delta::Alpha, Storage::F32), (Delta::AlphaOverRank, Storage::F16)] {
        let manifest = Manifest { tokens: tokens.to_vec(), delta, ..common::manifest() };
        let bytes = common::builder(&manifest, storage).to_bytes("milo").unwrap();
        let original = Adapter::from_bytes("milo", bytes).unwrap();
        let at = |name: &str| folder.path().join(name);
        export::kohya(&original, at("k.safetensors")).unwrap();
        export::diffusers(&original, at("d.safetensors")).unwrap();
        export::peft(&original, at("p")).unwrap();
        export::textual_inversion(&original, at("words.safetensors")).unwrap();
        for name in ["k.safetensors", "d.safetensors", "p"] {
            let with = Options { words: vec![at("words.safetensors")], ..options() };
            let back = adapter(&import(at(name), &target, &with).unwrap());
            assert_eq!(back.layers().len(), original.layers().len(), "{name}");
            for (one, other) in original.layers().iter().zip(back.layers()) {
                assert_eq!(one.name, other.name);
                assert_eq!(one.a(), other.a(), "{name}: {}", one.name);
                let scaled = |l: &blocklora_spec::LayerFactors, scale: f32| -> Vec<f32> {
                    l.b_scattered().iter().map(|x| x * scale).collect()
                };
                let pairs = scaled(one, original.scale()).into_iter().zip(scaled(other, back.scale()));
                pairs.for_each(|(x, y)| assert!((x - y).abs() <= 2e-7 * x.abs(), "{name}: {x} {y}"));
                if name != "d.safetensors" {
                    assert_eq!(one.b_scattered(), other.b_scattered(), "{name}: B's bits");
                }
            }
            let values = |a: &Adapter| a.tokens().iter().map(|t| t.values.clone()).collect::<Vec<_>>();
            assert_eq!(values(&back), values(&original), "{name}");
        }
        std::fs::remove_dir_all(at("p")).unwrap();
    }
}
