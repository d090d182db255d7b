//! The settings of a training run, as people write them in TOML.

use blocklora_spec::Partition;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Learning rates by group of parameters.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LearningRates {
    /// Of the concept's token vectors.
    pub tokens: f32,
    /// Of the text encoder's factors.
    pub text_encoder: f32,
    /// Of the UNet's factors.
    pub unet: f32,
}

impl Default for LearningRates {
    /// ED-LoRA's published rates.
    fn default() -> Self {
        Self { tokens: 1e-3, text_encoder: 1e-5, unet: 1e-4 }
    }
}

/// How the learning rates run over the steps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RateSchedule {
    /// From the rate to zero in a straight line (ED-LoRA).
    #[default]
    Linear,
    /// Always the rate.
    Constant,
}

/// What a concept's names are made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TokenStyle {
    /// One vector for each cross-attention layer (P+).
    #[default]
    LayerWise,
    /// One vector: what other tools can read.
    Plain,
}

/// Which Linears are adapted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LayerChoice {
    /// The projections q, k, v and out of every attention module.
    #[default]
    Attention,
    /// Every Linear of the transformer blocks and of the text encoder.
    All,
}

/// How often an erasure mask is drawn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ErasureScope {
    /// One mask per layer and step, shared by the batch (equation 3, literally).
    #[default]
    Step,
    /// One mask per layer, step and sample; in the text encoder, which runs once per prompt and cross-attention, one
    /// per layer and step.
    Sample,
}

/// Randomized Output Erasure (BlockLoRA, section 3.2).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Erasure {
    /// The probability with which an output is erased.
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
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Augmentation {
    /// Probability with which a picture fills the canvas (randomly cropped if it is not square); else it is shrunk
    /// and placed at random, and the loss counts only where it lies.
    pub fill: f32,
    /// The smallest fraction of the canvas to which a picture is shrunk.
    pub min_scale: f32,
    /// Mirror half of the pictures. Wrong for people and for anything with a left and a right.
    pub flip: bool,
}

impl Default for Augmentation {
    fn default() -> Self {
        Self { fill: 0.5, min_scale: 0.7, flip: false }
    }
}

/// Settings shared by the concept trainers. The defaults are ED-LoRA's published ones.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainConfig {
    /// Training steps.
    pub steps: usize,
    /// Pictures per step.
    pub batch_size: usize,
    /// r.
    pub rank: usize,
    /// Multiplies the branch: delta = alpha * B A.
    pub alpha: f32,
    /// Learning rates.
    pub learning_rate: LearningRates,
    /// Their course.
    pub schedule: RateSchedule,
    /// AdamW's weight decay.
    pub weight_decay: f32,
    /// Adds noise_offset * N(0, 1) per channel to the noise.
    pub noise_offset: f32,
    /// Token vectors per name.
    pub tokens: TokenStyle,
    /// Standard deviation of the first name's start value; the second starts as the class word.
    pub token_init_std: f32,
    /// Tokens freeze once the mean norm of their vectors reaches this; 0: never.
    pub token_norm_limit: f32,
    /// Adapt the text encoder, too.
    pub train_text_encoder: bool,
    /// Which Linears are adapted.
    pub layers: LayerChoice,
    /// Put captions into random templates ("a photo of ...").
    pub templates: bool,
    /// How pictures are laid on the canvas.
    pub augmentation: Augmentation,
    /// Steps between two checkpoints.
    pub checkpoint_every: usize,
    /// blocklora only: which rows the adapter owns.
    pub partition: Option<Partition>,
    /// blocklora only: output erasure.
    pub erasure: Option<Erasure>,
}

impl Default for TrainConfig {
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
            checkpoint_every: 50,
            partition: None,
            erasure: None,
        }
    }
}

impl TrainConfig {
    /// Checks every range; the error names the key and what is allowed.
    pub fn validate(&self) -> Result<()> {
        let positive = |name: &str, value: usize, most: usize| match value {
            v if (1..=most).contains(&v) => Ok(()),
            v => Err(Error::option(name, v, format!("must be 1 to {most}"))),
        };
        let range = |name: &str, value: f32, low: f32, high: f32| match value {
            v if (low..=high).contains(&v) => Ok(()),
            v => Err(Error::option(name, v, format!("must be {low} to {high}"))),
        };
        positive("steps", self.steps, 10_000_000)?;
        positive("batch_size", self.batch_size, 1024)?;
        positive("rank", self.rank, 1024)?;
        positive("checkpoint_every", self.checkpoint_every, 10_000_000)?;
        range("alpha", self.alpha, 0.0, 1e4)?;
        range("learning_rate.tokens", self.learning_rate.tokens, 0.0, 10.0)?;
        range("learning_rate.text_encoder", self.learning_rate.text_encoder, 0.0, 10.0)?;
        range("learning_rate.unet", self.learning_rate.unet, 0.0, 10.0)?;
        range("weight_decay", self.weight_decay, 0.0, 1.0)?;
        range("noise_offset", self.noise_offset, 0.0, 1.0)?;
        range("token_init_std", self.token_init_std, 0.0, 10.0)?;
        range("token_norm_limit", self.token_norm_limit, 0.0, 1e4)?;
        range("augmentation.fill", self.augmentation.fill, 0.0, 1.0)?;
        range("augmentation.min_scale", self.augmentation.min_scale, 0.1, 1.0)?;
        if let Some(erasure) = &self.erasure {
            range("erasure.lambda", erasure.lambda, 0.0, 0.99)?;
        }
        if let Some(p) = &self.partition {
            positive("partition.capacity", p.capacity as usize, 1 << 16)?;
            if p.slot >= p.capacity {
                return Err(Error::option("partition.slot", p.slot, format!("must be 0 to {}", p.capacity - 1)));
            }
        }
        Ok(())
    }

    /// The learning rate at `step` (from 0) for the group's rate.
    pub fn rate(&self, group: f32, step: usize) -> f32 {
        match self.schedule {
            RateSchedule::Constant => group,
            RateSchedule::Linear => group * (1.0 - step as f32 / self.steps as f32),
        }
    }
}
