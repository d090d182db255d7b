//! ED-LoRA: layer-wise concepts of two tokens, low-rank changes of every attention projection.

use blocklora_sdk::train::{
    Concept, ConceptSettings, Parameters, Recipe, TrainHost, TrainPlan, Trainer, train_concept,
};
use blocklora_sdk::{Config, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Trains a concept that owns every row (Gu et al., "Mix-of-Show", NeurIPS 2023): what BlockLoRA adds its
/// blocks and its erasure to. Three parts of the published training are left out: captions are not shuffled behind their
/// first phrase, the loss counts wherever the picture lies instead of in a mask of the subject, and the attention of the
/// two words is not regularised.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct EdLora {
    /// What it shares with other methods; their defaults are its published numbers.
    #[serde(flatten)]
    pub settings: ConceptSettings,
}

impl Config for EdLora {
    fn check(&self) -> Result<()> {
        self.settings.check()
    }
}

impl Trainer for EdLora {
    fn plan(&self, concept: &Concept) -> Result<TrainPlan> {
        Ok(self.settings.plan(concept))
    }

    fn train(&self, host: &mut dyn TrainHost) -> Result<Parameters> {
        train_concept(host, &Recipe::new(&self.settings))
    }
}

blocklora_sdk::export_plugin! {
    train: EdLora,
    id: "ed-lora",
    manifest: include_str!("../train-ed-lora.toml"),
}
