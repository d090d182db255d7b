//! Adapters for tests.
#![allow(dead_code, clippy::unwrap_used)]

pub mod raw;

use std::collections::BTreeMap;

use blocklora_spec::rng::{Rng, Stream};
use blocklora_spec::{
    AdapterBuilder, Algorithm, Base, Delta, Kind, Layer, Manifest, Partition, Scheme, Storage, Token, TokenVectors,
    Training,
};
use serde_json::json;

pub const SLOT: Partition = Partition { scheme: Scheme::Permuted, capacity: 4, seed: 7, slot: 1 };

/// A manifest that is valid as it stands (its tensors decide `outputs` and `tensor_digest`).
pub fn manifest() -> Manifest {
    Manifest {
        name: "milo".into(),
        kind: Kind::Subject,
        class_word: "dog".into(),
        tokens: vec![Token { name: "milo_1".into(), vectors: 3 }, Token { name: "milo_2".into(), vectors: 3 }],
        base: Base { architecture: "sd-tiny".into(), digest: "ab".repeat(32) },
        algorithm: Algorithm {
            id: "blocklora".into(),
            version: "0.1.0".into(),
            digest: None,
            config: json!({"steps": 500, "learning_rate": 0.5, "nested": {"list": [1, "two", null]}}),
        },
        partition: Some(SLOT),
        rank: 2,
        alpha: 0.7,
        delta: Delta::Alpha,
        outputs: BTreeMap::new(),
        erasure_lambda: 0.3,
        training: Training { steps: 500, seed: u64::MAX, data_digest: "cd".repeat(32) },
        licence: Some("CC0-1.0".into()),
        created: Some("2026-11-23T07:00:00Z".into()),
        tensor_digest: String::new(),
    }
}

/// The layers of [`builder`]: name, outputs, inputs. The last is so narrow that slot 1 of 4 owns none of its rows.
pub const LAYERS: [(&str, usize, usize); 3] = [
    ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", 6, 4),
    ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", 16, 8),
    ("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0", 1, 8),
];

/// An adapter with random numbers on [`LAYERS`] and on the manifest's tokens.
pub fn builder(manifest: &Manifest, storage: Storage) -> AdapterBuilder {
    let mut rng = Rng::new(1, Stream::Test, 0, 0);
    let mut builder = AdapterBuilder::new(manifest, storage);
    for (name, outputs, inputs) in LAYERS {
        let (a, b) = (rng.normals(manifest.rank * inputs), rng.normals(manifest.rows(outputs).len() * manifest.rank));
        builder = builder.layer(Layer { name, outputs, a: &a, b: &b });
    }
    for token in &manifest.tokens {
        let values = rng.normals(token.vectors * 5);
        builder = builder.token(&TokenVectors { name: token.name.clone(), layers: token.vectors, width: 5, values });
    }
    builder
}

/// The bytes of a valid adapter file.
pub fn bytes() -> Vec<u8> {
    builder(&manifest(), Storage::F32).to_bytes("valid").unwrap()
}
