//! Trainers: a trainer drives its own loop on a [`TrainHost`], which computes losses and gradients on the model.
//!
//! Most methods are one [`Recipe`] for the loop in [`train_concept`]; a trainer may as well write its own.

mod adamw;
mod concept;
mod host;
mod prior;
mod rates;
mod settings;
mod silence;
pub mod templates;

pub use adamw::AdamW;
pub use concept::{FrozenA, Recipe, StartA, Words, all_rows, draw_masks, rows_of, train_concept};
pub use host::{
    Concept, ErasureMasks, LayerFactors, Objective, Parameters, PictureRequest, Placement, Sample, TokenFactors,
    TrainHost, TrainPlan, TrainState, check_parameters, check_step,
};
pub use prior::{Prior, PriorPreservation};
pub use rates::RateSchedule;
pub use settings::{
    Augmentation, ConceptSettings, Erasure, ErasureScope, LayerChoice, LearningRates, PartitionSchema, TokenStyle,
    check_partition, check_range,
};
pub use silence::Silence;

use crate::config::Config;
use crate::error::Result;

/// A trainer, which turns pictures of a concept into an adapter's parameters; the struct that implements it holds its
/// settings.
///
/// The same settings, pictures, model and seed must give the same parameters, bit for bit, also when a run was
/// interrupted and resumed: random numbers come from [`Job::rng`](crate::Job::rng) keyed by the step, and everything
/// that carries over from step to step is in [`TrainState`].
pub trait Trainer: Config + Send + Sync {
    /// What the adapter file will say about itself; called before anything costly, and maybe more than once, with the same
    /// answer. The training takes as many steps as it says.
    fn plan(&self, concept: &Concept) -> Result<TrainPlan>;

    /// Runs the whole training on `host`. Calls [`TrainHost::step_done`] after every step, and passes on at once
    /// whatever error the host returns.
    fn train(&self, host: &mut dyn TrainHost) -> Result<Parameters>;
}

/// A [`Trainer`] whatever its settings: what hosts work with.
pub trait AnyTrainer: Send + Sync {
    /// [`Trainer::plan`].
    fn plan(&self, concept: &Concept) -> Result<TrainPlan>;
    /// [`Trainer::train`].
    fn train(&self, host: &mut dyn TrainHost) -> Result<Parameters>;
}

impl<T: Trainer> AnyTrainer for T {
    fn plan(&self, concept: &Concept) -> Result<TrainPlan> {
        Trainer::plan(self, concept)
    }
    fn train(&self, host: &mut dyn TrainHost) -> Result<Parameters> {
        Trainer::train(self, host)
    }
}
