//! A trainer: plain low-rank factors of every attention projection, and the concept's words.

use blocklora_sdk::train::{Concept, ConceptSettings, Parameters, Recipe, TrainHost, TrainPlan, Trainer, train_concept};
use blocklora_sdk::{Config, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// h = W0 x + scale B A x, with AdamW.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct MyMethod {
    /// What all methods for concepts have.
    #[serde(flatten)]
    pub settings: ConceptSettings,
}

impl Config for MyMethod {
    fn check(&self) -> Result<()> {
        self.settings.check()
    }
}

impl Trainer for MyMethod {
    fn plan(&self, concept: &Concept) -> Result<TrainPlan> {
        Ok(self.settings.plan(concept))
    }

    fn train(&self, host: &mut dyn TrainHost) -> Result<Parameters> {
        train_concept(host, &Recipe::new(&self.settings))
    }
}

blocklora_sdk::export_plugin! {
    train: MyMethod,
    id: "my-method",
    manifest: include_str!("../train-my-method.toml"),
}
