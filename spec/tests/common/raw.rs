//! Files with faults: an adapter taken apart, changed, and put together again with digests that fit.
#![allow(dead_code, clippy::unwrap_used)]

use blocklora_spec::{AdapterBuilder, Layer, Manifest, Partition, Scheme, Storage, Token, TokenVectors};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

pub const LAYER: &str = "unet.block.to_q";

/// One entry of the header.
#[derive(Clone)]
pub struct Tensor {
    pub name: String,
    pub dtype: String,
    pub shape: Vec<u64>,
    pub offsets: [u64; 2],
}

/// A file's parts.
#[derive(Clone)]
pub struct Parts {
    pub manifest: Value,
    pub tensors: Vec<Tensor>,
    pub data: Vec<u8>,
}

pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

/// A safetensors file of this header, padded, and this data.
pub fn container(header: &str, data: &[u8]) -> Vec<u8> {
    let mut text = header.as_bytes().to_vec();
    text.resize(text.len().next_multiple_of(8), b' ');
    [&(text.len() as u64).to_le_bytes(), text.as_slice(), data].concat()
}

impl Parts {
    /// Slot 1 of 4 (contiguous) on one layer with 6 outputs, of which it owns rows 1 and 2, and 4 inputs; rank 2; one
    /// token of two vectors.
    pub fn valid() -> Self {
        let manifest = Manifest {
            partition: Some(Partition { scheme: Scheme::Contiguous, capacity: 4, seed: 0, slot: 1 }),
            tokens: vec![Token { name: "milo".into(), vectors: 2 }],
            ..super::manifest()
        };
        let numbers: Vec<f32> = (1..=8).map(|i| i as f32 / 8.0).collect();
        let bytes = AdapterBuilder::new(&manifest, Storage::F32)
            .layer(Layer { name: LAYER, outputs: 6, a: &numbers, b: &numbers[..4] })
            .token(&TokenVectors {
                name: "milo".into(),
                layers: 2,
                width: 4,
                values: numbers.iter().map(|x| -x).collect(),
            })
            .to_bytes("valid")
            .unwrap();
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let mut header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
        let metadata = header.as_object_mut().unwrap().remove("__metadata__").unwrap();
        let tensors = header.as_object().unwrap().iter().map(|(name, entry)| Tensor {
            name: name.clone(),
            dtype: entry["dtype"].as_str().unwrap().into(),
            shape: serde_json::from_value(entry["shape"].clone()).unwrap(),
            offsets: serde_json::from_value(entry["data_offsets"].clone()).unwrap(),
        });
        let manifest = serde_json::from_str(metadata["blocklora.manifest"].as_str().unwrap()).unwrap();
        Self { manifest, tensors: tensors.collect(), data: bytes[8 + length..].to_vec() }
    }

    /// The tensor whose name ends in `suffix`.
    pub fn tensor(&mut self, suffix: &str) -> &mut Tensor {
        self.tensors.iter_mut().find(|t| t.name.ends_with(suffix)).unwrap()
    }

    /// Makes the manifest's tensor digest fit the tensors, as far as their offsets lie in the data.
    pub fn sign(&mut self) {
        let mut sorted = self.tensors.clone();
        sorted.sort_by(|a, b| a.name.cmp(&b.name));
        let mut hasher = Sha256::new();
        for Tensor { name, dtype, shape, offsets: [begin, end] } in sorted {
            let shape: Vec<String> = shape.iter().map(u64::to_string).collect();
            hasher.update(format!("{name} {dtype} {}\n", shape.join(",")));
            hasher.update(self.data.get(begin as usize..end as usize).unwrap_or_default());
        }
        let digest: String = hasher.finalize().iter().map(|b| format!("{b:02x}")).collect();
        self.manifest["tensor_digest"] = digest.into();
    }

    /// The header with this text as the manifest.
    pub fn header(&self, manifest: &str) -> String {
        let mut header = serde_json::Map::new();
        header.insert(
            "__metadata__".into(),
            json!({
                "blocklora.spec": "1.0",
                "blocklora.manifest": manifest,
                "blocklora.manifest_digest": sha256(manifest.as_bytes()),
            }),
        );
        for Tensor { name, dtype, shape, offsets } in &self.tensors {
            header.insert(name.clone(), json!({"dtype": dtype, "shape": shape, "data_offsets": offsets}));
        }
        Value::Object(header).to_string()
    }

    /// The file.
    pub fn bytes(&self) -> Vec<u8> {
        container(&self.header(&self.manifest.to_string()), &self.data)
    }
}
