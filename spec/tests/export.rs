//! Exported files hold the same factors. tests/parity/check_exports.py asks the other tools' own readers.
#![allow(clippy::unwrap_used)]

mod common;

use blocklora_spec::{
    Adapter, AdapterBuilder, Base, Delta, Error, Layer, Manifest, Partition, Scheme, Storage, Token, TokenVectors,
};
use blocklora_spec::{Format, export};
use safetensors::{Dtype, SafeTensors};

fn adapter(manifest: &Manifest, storage: Storage) -> Adapter {
    Adapter::from_bytes("milo", common::builder(manifest, storage).to_bytes("milo").unwrap()).unwrap()
}

fn plain() -> Manifest {
    let tokens = ["milo_1", "milo_2"].map(|name| Token { name: name.into(), vectors: 1 });
    Manifest { tokens: tokens.into(), ..common::manifest() }
}

fn numbers(file: &SafeTensors<'_>, name: &str) -> (Vec<usize>, Vec<f32>) {
    let tensor = file.tensor(name).unwrap();
    let data = tensor.data();
    let values = match tensor.dtype() {
        Dtype::F32 => data.chunks(4).map(|c| f32::from_le_bytes(c.try_into().unwrap())).collect(),
        Dtype::F16 => data.chunks(2).map(|c| half::f16::from_le_bytes(c.try_into().unwrap()).to_f32()).collect(),
        other => panic!("{name} is {other:?}"),
    };
    (tensor.shape().to_vec(), values)
}

#[test]
fn kohya_has_alpha_times_rank() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("k.safetensors");
    for (delta, alpha) in [(Delta::Alpha, 1.4), (Delta::AlphaOverRank, 0.7)] {
        let adapter = adapter(&Manifest { delta, ..common::manifest() }, Storage::F16);
        export::kohya(&adapter, &path).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(file.len(), 6, "two layers of three tensors");
        let name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q";
        let layer = &adapter.layers()[1];
        assert_eq!(numbers(&file, &format!("{name}.lora_down.weight")), (vec![2, 8], layer.a()));
        assert_eq!(numbers(&file, &format!("{name}.lora_up.weight")), (vec![16, 2], layer.b_scattered()));
        assert_eq!(numbers(&file, &format!("{name}.alpha")), (vec![], vec![alpha]));
        assert!(file.tensor("lora_te_text_model_encoder_layers_0_self_attn_q_proj.alpha").is_ok());
        let again = folder.path().join("again.safetensors");
        export::kohya(&adapter, &again).unwrap();
        assert_eq!(std::fs::read(again).unwrap(), bytes, "the same adapter gives the same bytes");
        let error = Adapter::open(&path).unwrap_err().to_string();
        assert!(error.contains("a kohya LoRA") && error.contains("`blocklora import`"), "{error}");
    }
}

#[test]
fn kohya_tells_two_text_encoders_apart() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("k.safetensors");
    let manifest = Manifest { tokens: vec![], partition: None, ..common::manifest() };
    let with = |names: &[&str]| {
        let builder = names.iter().fold(AdapterBuilder::new(&manifest, Storage::F32), |b, name| {
            b.layer(Layer { name, outputs: 3, a: &[1.0; 4], b: &[1.0; 6] })
        });
        Adapter::from_bytes("two", builder.to_bytes("two").unwrap()).unwrap()
    };
    export::kohya(&with(&["text_encoder.x.q_proj", "text_encoder_2.x.q_proj"]), &path).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    assert!(file.tensor("lora_te1_x_q_proj.alpha").is_ok() && file.tensor("lora_te2_x_q_proj.alpha").is_ok());
    let error = export::kohya(&with(&["unet.a.b_c", "unet.a_b.c"]), &path).unwrap_err().to_string();
    assert!(error.contains("unet.a.b_c") && error.contains("unet.a_b.c"), "{error}");
}

#[test]
fn diffusers_folds_the_scale() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("d.safetensors");
    let adapter = adapter(&common::manifest(), Storage::F16);
    export::diffusers(&adapter, &path).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.len(), 4);
    let layer = &adapter.layers()[0];
    let name = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer";
    assert_eq!(numbers(&file, &format!("{name}.down.weight")), (vec![2, 4], layer.a()));
    let scaled = layer.b_scattered().iter().map(|x| x * 0.7).collect();
    assert_eq!(numbers(&file, &format!("{name}.up.weight")), (vec![6, 2], scaled));
}

#[test]
fn peft_has_a_folder_for_each_part() {
    let folder = tempfile::tempdir().unwrap();
    let adapter = adapter(&common::manifest(), Storage::F32);
    let folders = export::peft(&adapter, folder.path()).unwrap();
    assert_eq!(folders, ["text_encoder", "unet"].map(|part| folder.path().join(part)));
    let config = std::fs::read_to_string(folders[0].join("adapter_config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_str(&config).unwrap();
    assert_eq!((config["r"].as_u64(), config["lora_alpha"].as_f64().map(|x| x as f32)), (Some(2), Some(1.4)));
    assert_eq!(config["target_modules"], serde_json::json!(["encoder.layers.0.self_attn.q_proj"]));
    let bytes = std::fs::read(folders[1].join("adapter_model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let name = "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.weight";
    assert_eq!(numbers(&file, name), (vec![16, 2], adapter.layers()[1].b_scattered()));
    assert_eq!(file.len(), 2);
    // Older and newer transformers call the text encoder's modules differently.
    let bytes = std::fs::read(folders[0].join("adapter_model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.len(), 4);
    for module in ["text_model.encoder.layers.0.self_attn.q_proj", "encoder.layers.0.self_attn.q_proj"] {
        let factor = |name| numbers(&file, &format!("base_model.model.{module}.{name}.weight"));
        assert_eq!(factor("lora_A"), (vec![2, 4], adapter.layers()[0].a()));
        assert_eq!(factor("lora_B"), (vec![6, 2], adapter.layers()[0].b_scattered()));
    }
}

/// The metadata that a kohya file has beyond what all of them have.
fn metadata(manifest: &Manifest) -> Vec<(String, String)> {
    let adapter = adapter(manifest, Storage::F32);
    let mut bytes = Vec::new();
    export::files(&adapter, Format::Kohya).unwrap()[0].write_to(&mut bytes).unwrap();
    let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    let more = |key: &str| key.starts_with("modelspec.") || key == "ss_base_model_version";
    let mut found: Vec<_> = metadata.metadata().clone().unwrap().into_iter().filter(|(key, _)| more(key)).collect();
    found.sort();
    found
}

#[test]
fn kohya_says_of_the_model_what_is_known() {
    assert_eq!(metadata(&common::manifest()), [], "sd-tiny has no name in ModelSpec");
    let sd_1 = "stable-diffusion/unet-320-640-1280-1280x2-2-2-2-attn16-ctx768/clip-768x12";
    let base = Base { architecture: sd_1.into(), ..common::manifest().base };
    let layer_wise = Manifest { base: base.clone(), licence: None, created: None, ..common::manifest() };
    let mut expected = vec![
        ("modelspec.architecture", "stable-diffusion-v1/lora"),
        ("modelspec.implementation", "diffusers"),
        ("modelspec.sai_model_spec", "1.0.1"),
        ("modelspec.title", "milo"),
        ("ss_base_model_version", "sd_v1"),
    ];
    let owned = |pairs: &[(&str, &str)]| -> Vec<(String, String)> {
        pairs.iter().map(|&(key, value)| (key.into(), value.into())).collect()
    };
    assert_eq!(metadata(&layer_wise), owned(&expected));
    expected.extend([
        ("modelspec.date", "2026-11-23T07:00:00Z"),
        ("modelspec.license", "CC0-1.0"),
        ("modelspec.trigger_phrase", "<milo>"),
    ]);
    expected.sort();
    assert_eq!(metadata(&Manifest { base, ..plain() }), owned(&expected));
}

#[test]
fn a_scale_that_overflows_is_refused() {
    let huge = |delta| Manifest { alpha: 2e38, delta, ..common::manifest() };
    let refused = |delta, format, reason: &str| {
        let adapter = adapter(&huge(delta), Storage::F32);
        let error = export::files(&adapter, format).err().unwrap();
        assert!(matches!(&error, Error::Export { .. }) && error.to_string().contains(reason), "{format:?}: {error}");
    };
    for format in [Format::Kohya, Format::Peft] {
        refused(Delta::Alpha, format, "alpha 2e38 times rank 2 is not a finite number");
        assert!(export::files(&adapter(&huge(Delta::AlphaOverRank), Storage::F32), format).is_ok(), "{format:?}");
    }
    refused(Delta::Alpha, Format::Diffusers, "B of the layer \"unet.down");
    refused(Delta::Alpha, Format::Diffusers, "is inf; train it again with a smaller alpha");
}

/// Counts what is written and what of it is not zero.
#[derive(Default)]
struct Count {
    bytes: u64,
    others: u64,
}

impl std::io::Write for Count {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.bytes += bytes.len() as u64;
        self.others += bytes.iter().filter(|b| **b != 0).count() as u64;
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// An adapter that owns a row of 65,536 in each of `layers` layers.
fn few_rows(layers: usize) -> Adapter {
    let partition = Partition { scheme: Scheme::Contiguous, capacity: 1 << 16, seed: 0, slot: 5 };
    let manifest = Manifest { partition: Some(partition), tokens: vec![], rank: 1024, ..common::manifest() };
    let numbers = vec![1.5; 1024];
    let builder = (0..layers).fold(AdapterBuilder::new(&manifest, Storage::F32), |b, i| {
        b.layer(Layer { name: &format!("unet.l{i}.x"), outputs: 1 << 16, a: &numbers, b: &numbers })
    });
    Adapter::from_bytes("small", builder.to_bytes("small").unwrap()).unwrap()
}

#[test]
fn an_export_is_no_larger_than_an_adapter_may_be() {
    let error = export::files(&few_rows(16), Format::Kohya).err().unwrap();
    let reason = "more than an adapter's file may have";
    assert!(matches!(&error, Error::Export { .. }) && error.to_string().ends_with(reason), "{error}");
    assert!(export::files(&few_rows(15), Format::Kohya).is_ok());
}

/// A file of 35 KiB that owns a row of 65,536 becomes one of 1 GiB, in no more memory than it takes itself.
#[cfg(target_os = "linux")]
#[test]
fn what_is_scattered_is_never_held() {
    let peak_kib = || -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find(|l| l.starts_with("VmHWM:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    let adapter = few_rows(4);
    let before = peak_kib();
    for format in [Format::Kohya, Format::Diffusers, Format::Peft] {
        for file in export::files(&adapter, format).unwrap() {
            let mut count = Count::default();
            file.write_to(&mut count).unwrap();
            assert_eq!(count.bytes, file.size(), "{format:?}");
            assert!(file.name().ends_with(".json") || (count.bytes > 1 << 30 && count.others < 1 << 16), "{format:?}");
        }
    }
    let grown = peak_kib() - before;
    assert!(grown < 64 << 10, "{grown} KiB");
}

#[test]
fn plain_tokens_become_a_textual_inversion() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("t.safetensors");
    let plain = adapter(&plain(), Storage::F16);
    export::textual_inversion(&plain, &path).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let values = plain.tokens().iter().flat_map(|t| t.values.clone()).collect();
    assert_eq!((file.names(), numbers(&file, "<milo>")), (vec!["<milo>"], (vec![2, 5], values)));
}

#[test]
fn what_has_no_counterpart_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("none");
    let layer_wise = adapter(&common::manifest(), Storage::F32);
    let refused = |result: blocklora_spec::Result<()>, reason: &str| {
        assert!(matches!(&result, Err(e @ Error::Export { .. }) if e.to_string().contains(reason)), "{result:?}");
        assert!(!path.exists());
    };
    refused(export::textual_inversion(&layer_wise, &path), "layer-wise (3 vectors)");
    let token = Token { name: "t".into(), vectors: 1 };
    let builder = AdapterBuilder::new(&Manifest { tokens: vec![token], ..common::manifest() }, Storage::F32)
        .token(&TokenVectors { name: "t".into(), layers: 1, width: 2, values: vec![1.0, 2.0] });
    let tokens_only = Adapter::from_bytes("t", builder.to_bytes("t").unwrap()).unwrap();
    refused(export::kohya(&tokens_only, &path), "changes no layer");
    refused(export::diffusers(&tokens_only, &path), "changes no layer");
    refused(export::peft(&tokens_only, &path).map(drop), "changes no layer");
    assert!(export::textual_inversion(&tokens_only, &path).is_ok());
}
