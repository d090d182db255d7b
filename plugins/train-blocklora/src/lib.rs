//! BlockLoRA: W = W0 + r(lambda) * (M_i * B_i) A_i while training (equations 3 and 4), without r afterwards.

use blocklora_sdk::train::{
    Concept, ConceptSettings, Erasure, Parameters, PartitionSchema, Recipe, TrainHost, TrainPlan, Trainer,
    check_partition, rows_of, train_concept,
};
use blocklora_sdk::{Config, Partition, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Trains a concept that owns a block of rows, with Randomized Output Erasure.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Blocklora {
    /// What it shares with other methods.
    #[serde(flatten)]
    pub settings: ConceptSettings,
    /// Which rows the adapter owns; without it every row (the paper's ablation "without blocks").
    #[schemars(with = "Option<PartitionSchema>")]
    pub partition: Option<Partition>,
    /// Output erasure; lambda = 0 for none (the ablation "without erasure").
    pub erasure: Erasure,
}

impl Config for Blocklora {
    fn check(&self) -> Result<()> {
        self.settings.check()?;
        self.erasure.check()?;
        self.partition.as_ref().map_or(Ok(()), check_partition)
    }
}

impl Trainer for Blocklora {
    fn plan(&self, concept: &Concept) -> Result<TrainPlan> {
        Ok(TrainPlan { partition: self.partition, erasure_lambda: self.erasure.lambda, ..self.settings.plan(concept) })
    }

    fn train(&self, host: &mut dyn TrainHost) -> Result<Parameters> {
        let rows_of = rows_of(self.partition);
        let recipe = Recipe { rows_of: &*rows_of, erasure: Some(self.erasure), ..Recipe::new(&self.settings) };
        train_concept(host, &recipe)
    }
}

blocklora_sdk::export_plugin! {
    train: Blocklora,
    id: "blocklora",
    manifest: include_str!("../train-blocklora.toml"),
}
