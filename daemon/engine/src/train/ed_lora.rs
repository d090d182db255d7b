//! ED-LoRA (Gu et al., "Mix-of-Show", NeurIPS 2023): layer-wise two-token concepts, LoRA on every attention projection.

use super::concept::{Concept, all_rows, train_concept};
use super::config::TrainConfig;
use super::host::{Parameters, TrainHost, Trainer};
use crate::error::{Error, Result};

/// Trains a concept that owns every row.
#[derive(Clone, Debug)]
pub struct EdLora {
    /// What is taught.
    pub concept: Concept,
    /// How.
    pub config: TrainConfig,
}

impl Trainer for EdLora {
    fn id(&self) -> &'static str {
        "ed-lora"
    }

    fn train(&self, host: &mut dyn TrainHost) -> Result<Parameters> {
        if self.config.partition.is_some() {
            return Err(Error::option("partition", "", "ed-lora owns every row; use the method blocklora"));
        }
        if self.config.erasure.is_some() {
            return Err(Error::option("erasure", "", "ed-lora erases nothing; use the method blocklora"));
        }
        train_concept(host, &self.concept, &self.config, None, &all_rows)
    }
}
