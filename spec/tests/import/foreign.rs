//! Files as other tools write them, and what must become of them.

use std::path::PathBuf;

use blocklora_spec::import::{Imported, Module, Options, Target, import};
use blocklora_spec::{Adapter, Base, Error, Kind};
use half::{bf16, f16};
use serde_json::{Value, json};
use tempfile::TempDir;

pub const Q: &str = "unet.down_blocks.0.attn1.to_q";
pub const OUT: &str = "unet.down_blocks.0.attn1.to_out.0";
pub const TEXT: &str = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj";
pub const CONV: &str = "unet.down_blocks.0.proj_in";
pub const TIME: &str = "unet.time_embedding.linear_1";

/// Two inputs and three outputs everywhere.
pub fn target() -> Target {
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

pub fn options() -> Options {
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
pub struct Foreign {
    pub tensors: Vec<(String, &'static str, Vec<usize>, Vec<u8>)>,
    metadata: Vec<(&'static str, String)>,
}

impl Foreign {
    pub fn tensor(mut self, name: &str, dtype: &'static str, shape: &[usize], values: &[f32]) -> Self {
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

    pub fn f32(self, name: &str, shape: &[usize], values: &[f32]) -> Self {
        self.tensor(name, "F32", shape, values)
    }

    /// Both factors of rank `rank` under `a` and `b`, whose product is that of [`product`] with this `seed`.
    pub fn factors(self, [a, b]: [&str; 2], rank: usize, seed: usize) -> Self {
        let (down, up) = numbers(rank, seed);
        self.f32(a, &[rank, 2], &down).f32(b, &[3, rank], &up)
    }

    pub fn meta(mut self, key: &'static str, value: &str) -> Self {
        self.metadata.push((key, value.into()));
        self
    }

    pub fn bytes(&self) -> Vec<u8> {
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

    pub fn write(&self, folder: &TempDir, name: &str) -> PathBuf {
        let path = folder.path().join(name);
        std::fs::write(&path, self.bytes()).unwrap();
        path
    }
}

/// A [rank, 2] and B [3, rank], exact in every type.
pub fn numbers(rank: usize, seed: usize) -> (Vec<f32>, Vec<f32>) {
    let number = |i: usize| ((7 * i + 3 * seed) % 11) as f32 / 8.0 - 0.5;
    ((0..rank * 2).map(number).collect(), (0..3 * rank).map(|i| number(i + 5)).collect())
}

/// scale B A.
pub fn product(a: &[f32], b: &[f32], rank: usize, scale: f64) -> Vec<f64> {
    let of = |row: usize, column: usize| -> f64 {
        (0..rank).map(|k| f64::from(b[row * rank + k]) * f64::from(a[k * 2 + column])).sum::<f64>() * scale
    };
    (0..3).flat_map(|row| (0..2).map(move |column| (row, column))).map(|(row, column)| of(row, column)).collect()
}

pub fn expected(rank: usize, seed: usize, scale: f64) -> Vec<f64> {
    let (a, b) = numbers(rank, seed);
    product(&a, &b, rank, scale)
}

pub fn to_adapter(imported: &Imported) -> Adapter {
    Adapter::from_bytes("imported", imported.builder.to_bytes("imported").unwrap()).unwrap()
}

#[track_caller]
pub fn delta(adapter: &Adapter, layer: &str) -> Vec<f64> {
    let found = adapter.layers().iter().find(|l| l.name == layer).unwrap_or_else(|| panic!("no {layer}: {adapter:?}"));
    product(&found.a(), &found.b_scattered(), found.rank, f64::from(adapter.scale()))
}

#[track_caller]
pub fn close(actual: &[f64], expected: &[f64]) {
    let far = actual.iter().zip(expected).any(|(x, y)| (x - y).abs() > 1e-6 * y.abs().max(1e-3));
    assert!(actual.len() == expected.len() && !far, "{actual:?} is not {expected:?}");
}

#[track_caller]
pub fn imports(file: &Foreign) -> (Imported, Adapter) {
    let folder = tempfile::tempdir().unwrap();
    let imported = import(file.write(&folder, "x.safetensors"), &target(), &options()).unwrap();
    let adapter = to_adapter(&imported);
    (imported, adapter)
}

#[track_caller]
pub fn refused_with(file: &Foreign, options: &Options, needles: &[&str]) -> Error {
    let folder = tempfile::tempdir().unwrap();
    let error = import(file.write(&folder, "x.safetensors"), &target(), options).unwrap_err();
    let text = error.to_string();
    for needle in ["x.safetensors"].iter().chain(needles) {
        assert!(text.contains(needle), "{needle:?} is not in: {text}");
    }
    error
}

#[track_caller]
pub fn refused(file: &Foreign, needles: &[&str]) -> Error {
    refused_with(file, &options(), needles)
}

pub const KOHYA_Q: [&str; 2] =
    ["lora_unet_down_blocks_0_attn1_to_q.lora_down.weight", "lora_unet_down_blocks_0_attn1_to_q.lora_up.weight"];
pub const KOHYA_OUT: [&str; 2] = [
    "lora_unet_down_blocks_0_attn1_to_out_0.lora_down.weight",
    "lora_unet_down_blocks_0_attn1_to_out_0.lora_up.weight",
];
pub const KOHYA_TEXT: [&str; 2] = [
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight",
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight",
];
pub const ALPHA_Q: &str = "lora_unet_down_blocks_0_attn1_to_q.alpha";
pub const ALPHA_OUT: &str = "lora_unet_down_blocks_0_attn1_to_out_0.alpha";

pub fn kohya() -> Foreign {
    Foreign::default().factors(KOHYA_Q, 2, 1)
}

pub const PEFT_Q: [&str; 2] =
    ["unet.down_blocks.0.attn1.to_q.lora_A.weight", "unet.down_blocks.0.attn1.to_q.lora_B.weight"];

pub fn vectors(count: usize) -> Vec<f32> {
    (0..count * 4).map(|i| i as f32 / 4.0).collect()
}
