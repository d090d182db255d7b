//! BlockLoRA's training, erasure and all, against PyTorch.
#![allow(clippy::unwrap_used)]

use std::path::Path;

use blocklora_sdk::testing::{Quadratic, TrainGolden, check_trainer};
use blocklora_sdk::train::{ConceptSettings, Erasure, LearningRates, RateSchedule, TokenStyle};
use blocklora_sdk::{Partition, Scheme};
use train_blocklora::Blocklora;

#[test]
fn equals_pytorch() {
    let settings = ConceptSettings {
        steps: 40,
        batch_size: 2,
        rank: 2,
        learning_rate: LearningRates { tokens: 0.05, text_encoder: 0.01, unet: 0.02 },
        schedule: RateSchedule::Cosine,
        tokens: TokenStyle::Plain,
        token_norm_limit: 0.0,
        ..ConceptSettings::default()
    };
    let partition = Some(Partition { scheme: Scheme::Strided, capacity: 4, seed: 0, slot: 1 });
    let trainer = Blocklora { settings, partition, erasure: Erasure { lambda: 0.3, ..Erasure::default() } };
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/train.json");
    let mut host = Quadratic::new();
    check_trainer(&TrainGolden::open(&path).unwrap(), "blocklora", &trainer, &mut host).unwrap();
    assert!(host.seen_masks.contains(&0.0));
}
