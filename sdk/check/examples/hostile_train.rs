//! A trainer that breaks its contract in the way that BLOCKLORA_HOSTILE names, and trains plain factors otherwise.
#![allow(missing_docs)]

use blocklora_sdk::train::{
    Concept, ConceptSettings, Parameters, Recipe, TrainHost, TrainPlan, Trainer, train_concept,
};
use blocklora_sdk::{Config, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

include!("hostile/mode.rs");

/// Plain factors of all rows.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Hostile {
    /// What it shares with other methods.
    #[serde(flatten)]
    pub settings: ConceptSettings,
}

impl Config for Hostile {
    fn check(&self) -> Result<()> {
        self.settings.check()
    }
}

impl Trainer for Hostile {
    fn plan(&self, concept: &Concept) -> Result<TrainPlan> {
        misbehave("plan");
        let plan = self.settings.plan(concept);
        Ok(TrainPlan { steps: plan.steps + usize::from(mode("plans-more")), ..plan })
    }

    fn train(&self, host: &mut dyn TrainHost) -> Result<Parameters> {
        misbehave("train");
        hand_over(host, "train")?;
        let mut parameters = train_concept(host, &Recipe::new(&self.settings))?;
        for f in &mut parameters.factors {
            match () {
                () if mode("wrong-shape") => drop(f.b.pop()),
                () if mode("rows-outside") => f.rows = f.rows.iter().map(|row| row + 1).collect(),
                () if mode("nan") => f.b[0] = f32::NAN,
                () => {}
            }
        }
        Ok(parameters)
    }
}

blocklora_sdk::export_plugin! {
    train: Hostile,
    id: "hostile",
    manifest: include_str!("hostile/train-hostile.toml"),
}
