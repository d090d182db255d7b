//! BlockLoRA: W = W0 + r(lambda) ⊙ (M_i ⊙ B_i) A_i while training (equations 3 and 4), without r afterwards.

use super::concept::{Concept, rows_of, train_concept};
use super::config::TrainConfig;
use super::host::{Parameters, TrainHost, Trainer};
use crate::error::Result;

/// Trains a concept that owns a block of rows, with Randomized Output Erasure.
#[derive(Clone, Debug)]
pub struct BlockLora {
    /// What is taught.
    pub concept: Concept,
    /// How. Without a partition every row is owned (the paper's ablation "without blocks"); without erasure the
    /// default lambda is used, with `lambda = 0` none (the ablation "without erasure").
    pub config: TrainConfig,
}

impl Trainer for BlockLora {
    fn id(&self) -> &'static str {
        "blocklora"
    }

    fn train(&self, host: &mut dyn TrainHost) -> Result<Parameters> {
        let erasure = self.config.erasure.unwrap_or_default();
        train_concept(host, &self.concept, &self.config, Some(erasure), rows_of(self.config.partition).as_ref())
    }
}
