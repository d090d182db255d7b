//! BlockLoRA's training, erasure and all, against PyTorch.
#![allow(clippy::unwrap_used)]

use std::path::Path;

use blocklora_sdk::testing::{Quadratic, TrainGolden, check_trainer};
use blocklora_sdk::train::{ConceptSettings, Erasure, LearningRates, RateSchedule, Silence, TokenStyle};
use blocklora_sdk::{Partition, Scheme};
use train_blocklora::Blocklora;

/// Trains as the golden run `name`, with this weight of silence.
fn check(name: &str, silence: f32) -> Quadratic {
    let settings = ConceptSettings {
        steps: 40,
        batch_size: 2,
        rank: 2,
        learning_rate: LearningRates { tokens: 0.05, text_encoder: 0.01, unet: 0.02 },
        schedule: RateSchedule::Cosine,
        tokens: TokenStyle::Plain,
        token_norm_limit: 0.0,
        silence: Silence { weight: silence, ..Silence::default() },
        ..ConceptSettings::default()
    };
    let partition = Some(Partition { scheme: Scheme::Strided, capacity: 4, seed: 0, slot: 1 });
    let trainer = Blocklora { settings, partition, erasure: Erasure { lambda: 0.3, ..Erasure::default() } };
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/train.json");
    let mut host = Quadratic::new();
    check_trainer(&TrainGolden::open(&path).unwrap(), name, &trainer, &mut host).unwrap();
    host
}

#[test]
fn equals_pytorch() {
    assert!(check("blocklora", 0.0).seen_masks.contains(&0.0));
}

#[test]
fn equals_pytorch_with_silence() {
    check("blocklora silence=0.5", 0.5);
}
