//! Training adapters: trainers, which come from outside, drive their own loop on a [`TrainHost`]; the engine's host runs
//! it on the model.

mod bench;
mod checkpoint;
mod dataset;
mod engine_host;
mod host;
mod run;

pub use bench::{BenchStep, bench_step};
pub use checkpoint::Checkpoint;
pub use dataset::Dataset;
pub use engine_host::{EngineHost, PriorSampler, Progress, Stage};
pub use host::{
    Concept, ErasureMasks, LayerFactors, Parameters, PictureRequest, Placement, Sample, TokenFactors, TrainHost,
    TrainPlan, TrainState, Trainer,
};
pub use run::{TrainReport, TrainRequest, check, train};
