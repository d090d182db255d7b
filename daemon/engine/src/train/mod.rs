//! Training adapters: trainers drive their own loop on a [`TrainHost`]; the engine's host runs it on the model.

mod adamw;
mod bench;
mod blocklora;
mod checkpoint;
mod concept;
mod config;
mod dataset;
mod ed_lora;
mod engine_host;
mod host;
mod run;
mod templates;
#[cfg(test)]
mod tests;

pub use adamw::AdamW;
pub use bench::{BenchStep, bench_step};
pub use blocklora::BlockLora;
pub use checkpoint::Checkpoint;
pub use concept::Concept;
pub use config::{
    Augmentation, Erasure, ErasureScope, LayerChoice, LearningRates, RateSchedule, TokenStyle, TrainConfig,
};
pub use dataset::Dataset;
pub use ed_lora::EdLora;
pub use engine_host::{EngineHost, Progress};
pub use host::{
    ErasureMasks, LayerFactors, Parameters, Placement, Sample, TokenFactors, TrainHost, TrainState, Trainer,
};
pub use run::{TrainReport, TrainRequest, train};
