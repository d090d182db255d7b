//! Each form of file, and ranks, scales and types.

use std::path::Path;

use blocklora_spec::Format;
use blocklora_spec::import::{Module, Options, Target, import};
use blocklora_spec::{Adapter, Delta, Manifest, Storage, Token, export};
use serde_json::{Value, json};

use crate::common;
use crate::foreign::*;

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
    let (_, adapter) = imports(&kohya().f32(ALPHA_Q, &[], &[-1.0]));
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
    let adapter = to_adapter(&imported);
    close(&delta(&adapter, Q), &expected(2, 1, 1.5));
    close(&delta(&adapter, TEXT), &expected(2, 3, 4.0 / 2f64.sqrt()));
    assert_eq!((adapter.manifest().name.as_str(), imported.origins.len()), ("both", 2));
    // One part alone, as its folder and as its file.
    for path in [both.join("unet"), both.join("unet/adapter_model.safetensors")] {
        let alone = import(path, &target(), &options()).unwrap();
        close(&delta(&to_adapter(&alone), Q), &expected(2, 1, 1.5));
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
            let back = to_adapter(&import(at(name), &target, &with).unwrap());
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
