//! The settings that concept trainers share, as people write them in TOML.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::host::{Concept, TrainPlan};
use super::prior::PriorPreservation;
use super::rates::RateSchedule;
use super::silence::Silence;
use crate::error::{Error, Result};
use crate::{Delta, Partition};

/// Learning rates by group of parameters.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LearningRates {
    /// Of the concept's token vectors.
    #[schemars(range(min = 0.0, max = 10.0))]
    pub tokens: f32,
    /// Of the text encoder's factors.
    #[schemars(range(min = 0.0, max = 10.0))]
    pub text_encoder: f32,
    /// Of the UNet's factors.
    #[schemars(range(min = 0.0, max = 10.0))]
    pub unet: f32,
}

impl Default for LearningRates {
    /// ED-LoRA's published rates.
    fn default() -> Self {
        Self { tokens: 1e-3, text_encoder: 1e-5, unet: 1e-4 }
    }
}

/// What a concept's names are made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum TokenStyle {
    /// One vector for each cross-attention layer (P+).
    #[default]
    LayerWise,
    /// One vector: what other tools can read.
    Plain,
}

/// Which Linears are adapted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum LayerChoice {
    /// The projections q, k, v and out of every attention module.
    #[default]
    Attention,
    /// Every Linear of the transformer blocks and of the text encoder.
    All,
}

/// How often an erasure mask is drawn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ErasureScope {
    /// One mask per layer and step, shared by the batch (BlockLoRA's equation 3, literally).
    #[default]
    Step,
    /// One mask per layer, step and sample; in the text encoder, which runs once per prompt and cross-attention, one
    /// per layer and step.
    Sample,
}

/// Randomized Output Erasure (BlockLoRA, section 3.2).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Erasure {
    /// The probability with which an output is erased; 0 erases nothing.
    #[schemars(range(min = 0.0, max = 0.99))]
    pub lambda: f32,
    /// How often a mask is drawn.
    pub scope: ErasureScope,
    /// Multiply what is kept by 1 / (1 - lambda), as dropout does. The paper does not.
    pub rescale: bool,
}

impl Default for Erasure {
    fn default() -> Self {
        Self { lambda: 0.3, scope: ErasureScope::Step, rescale: false }
    }
}

/// How pictures are laid on the canvas.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Augmentation {
    /// Probability with which a picture fills the canvas (randomly cropped if it is not square); else it is shrunk
    /// and placed at random, and the loss counts only where it lies.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub fill: f32,
    /// The smallest fraction of the canvas to which a picture is shrunk, by its long side; 1: as large as it fits whole.
    #[schemars(range(min = 0.1, max = 1.0))]
    pub min_scale: f32,
    /// Mirror half of the pictures. Wrong for people and for anything with a left and a right.
    pub flip: bool,
}

impl Default for Augmentation {
    fn default() -> Self {
        Self { fill: 0.5, min_scale: 0.7, flip: false }
    }
}

/// The schema of a [`Partition`] among settings: `#[schemars(with = "Option<PartitionSchema>")]`.
#[derive(JsonSchema)]
#[schemars(rename = "Partition", deny_unknown_fields)]
#[allow(dead_code)] // only its schema is used
pub struct PartitionSchema {
    /// How rows are dealt out.
    scheme: SchemeSchema,
    /// The number of slots.
    #[schemars(range(min = 1, max = 65536))]
    capacity: u32,
    /// Chooses the permutation; without meaning for the other schemes.
    seed: u64,
    /// Which slot, below the capacity.
    slot: u32,
}

#[derive(JsonSchema)]
#[schemars(rename = "Scheme", rename_all = "lowercase")]
#[allow(dead_code)]
enum SchemeSchema {
    /// Blocks of neighbouring rows, as in the paper.
    Contiguous,
    /// Every capacity-th row.
    Strided,
    /// A block of a seeded permutation of the rows.
    Permuted,
}

/// Settings that concept trainers share. The defaults are ED-LoRA's published numbers; of its training, captions shuffled
/// behind their first phrase, masks of the subject and the regularisation of attention are left out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ConceptSettings {
    /// Training steps.
    #[schemars(range(min = 1, max = 10_000_000))]
    pub steps: usize,
    /// Pictures of the concept per step.
    #[schemars(range(min = 1, max = 1024))]
    pub batch_size: usize,
    /// The rank r of the factors.
    #[schemars(range(min = 1, max = 1024))]
    pub rank: usize,
    /// Multiplies the branch: delta = alpha * B A.
    #[schemars(range(min = 1e-6, max = 1e4))]
    pub alpha: f32,
    /// Learning rates.
    pub learning_rate: LearningRates,
    /// Their course.
    pub schedule: RateSchedule,
    /// AdamW's weight decay.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub weight_decay: f32,
    /// Adds noise_offset * N(0, 1) per channel to the noise.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub noise_offset: f32,
    /// Token vectors per name.
    pub tokens: TokenStyle,
    /// Standard deviation of the first name's start value; the second starts as the class word.
    #[schemars(range(min = 0.0, max = 10.0))]
    pub token_init_std: f32,
    /// Tokens freeze once the mean norm of their vectors reaches this; 0: never. Not kept, with a warning, on a model whose
    /// words are that long to begin with.
    #[schemars(range(min = 0.0, max = 1e4))]
    pub token_norm_limit: f32,
    /// Adapt the text encoder, too.
    pub train_text_encoder: bool,
    /// Which Linears are adapted.
    pub layers: LayerChoice,
    /// Put captions into random templates ("a photo of ...").
    pub templates: bool,
    /// How pictures are laid on the canvas.
    pub augmentation: Augmentation,
    /// Prior preservation.
    pub prior: PriorPreservation,
    /// Silence for the words of other concepts.
    pub silence: Silence,
    /// Steps between two checkpoints.
    #[schemars(range(min = 1, max = 10_000_000))]
    pub checkpoint_every: usize,
}

impl Default for ConceptSettings {
    fn default() -> Self {
        Self {
            steps: 1000,
            batch_size: 4,
            rank: 4,
            alpha: 1.0,
            learning_rate: LearningRates::default(),
            schedule: RateSchedule::Linear,
            weight_decay: 0.01,
            noise_offset: 0.01,
            tokens: TokenStyle::LayerWise,
            token_init_std: 0.013,
            token_norm_limit: 0.55,
            train_text_encoder: true,
            layers: LayerChoice::Attention,
            templates: true,
            augmentation: Augmentation::default(),
            prior: PriorPreservation::default(),
            silence: Silence::default(),
            checkpoint_every: 50,
        }
    }
}

impl ConceptSettings {
    /// Checks every range; the error names the key and what is allowed. The host has checked them against the schema,
    /// but a trainer may be used without a host.
    pub fn check(&self) -> Result<()> {
        let positive = |name: &str, value: usize, most: usize| match value {
            v if (1..=most).contains(&v) => Ok(()),
            v => Err(Error::config(name, v, format!("must be 1 to {most}"))),
        };
        positive("steps", self.steps, 10_000_000)?;
        positive("batch_size", self.batch_size, 1024)?;
        positive("rank", self.rank, 1024)?;
        positive("checkpoint_every", self.checkpoint_every, 10_000_000)?;
        check_range("alpha", self.alpha, 1e-6, 1e4)?;
        check_range("learning_rate.tokens", self.learning_rate.tokens, 0.0, 10.0)?;
        check_range("learning_rate.text_encoder", self.learning_rate.text_encoder, 0.0, 10.0)?;
        check_range("learning_rate.unet", self.learning_rate.unet, 0.0, 10.0)?;
        check_range("weight_decay", self.weight_decay, 0.0, 1.0)?;
        check_range("noise_offset", self.noise_offset, 0.0, 1.0)?;
        check_range("token_init_std", self.token_init_std, 0.0, 10.0)?;
        check_range("token_norm_limit", self.token_norm_limit, 0.0, 1e4)?;
        check_range("augmentation.fill", self.augmentation.fill, 0.0, 1.0)?;
        check_range("augmentation.min_scale", self.augmentation.min_scale, 0.1, 1.0)?;
        self.prior.check()?;
        self.silence.check()
    }

    /// The plan of a method with these settings that names a concept by two tokens, owns every row and erases nothing;
    /// change what is different.
    pub fn plan(&self, concept: &Concept) -> TrainPlan {
        TrainPlan {
            steps: self.steps,
            checkpoint_every: self.checkpoint_every,
            rank: self.rank,
            alpha: self.alpha,
            delta: Delta::Alpha,
            partition: None,
            erasure_lambda: 0.0,
            tokens: (1..=super::concept::CONCEPT_TOKENS).map(|i| format!("{}-{i}", concept.name)).collect(),
        }
    }

    /// The learning rate at `step` (from 0) of the group whose rate is `group`.
    pub fn rate(&self, group: f32, step: usize) -> f32 {
        self.schedule.rate(group, step, self.steps)
    }
}

impl Erasure {
    /// Checks its range.
    pub fn check(&self) -> Result<()> {
        check_range("erasure.lambda", self.lambda, 0.0, 0.99)
    }
}

/// Checks what a partition's schema cannot say.
pub fn check_partition(partition: &Partition) -> Result<()> {
    if !(1..=1 << 16).contains(&partition.capacity) {
        return Err(Error::config("partition.capacity", partition.capacity, "must be 1 to 65536"));
    }
    if partition.slot >= partition.capacity {
        let reason = format!("must be 0 to {}", partition.capacity - 1);
        return Err(Error::config("partition.slot", partition.slot, reason));
    }
    Ok(())
}

/// `Ok` if `value` lies in `low..=high`; else an error that names the key.
pub fn check_range(key: &str, value: f32, low: f32, high: f32) -> Result<()> {
    if (low..=high).contains(&value) {
        Ok(())
    } else {
        Err(Error::config(key, value, format!("must be {low} to {high}")))
    }
}
