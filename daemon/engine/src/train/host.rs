//! What a trainer gets from its host, and what it must do. Plain data only.

use std::ops::Range;
use std::sync::Arc;

use blocklora_spec::{Delta, Kind, Partition};

use crate::error::Result;
use crate::merge::strategy::LayerInfo;

/// What is being taught.
#[derive(Clone, Debug, PartialEq)]
pub struct Concept {
    /// Its name: `<name>` in a prompt.
    pub name: String,
    /// The word for what it is, a single token of the model's vocabulary.
    pub class_word: String,
    /// What kind of thing it is.
    pub kind: Kind,
}

/// What an adapter file says about itself besides the trained numbers.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainPlan {
    /// Steps of the whole training.
    pub steps: usize,
    /// Steps between two checkpoints, at least 1.
    pub checkpoint_every: usize,
    /// r of every layer's factors.
    pub rank: usize,
    /// alpha in the delta formula.
    pub alpha: f32,
    /// The delta formula.
    pub delta: Delta,
    /// Which rows the adapter owns; none means all.
    pub partition: Option<Partition>,
    /// The probability with which training erases an output; 0 without output erasure.
    pub erasure_lambda: f32,
    /// The names of the concept's tokens, in the order in which they stand in a prompt.
    pub tokens: Vec<String>,
}

/// Pictures that the model is to draw for a trainer.
#[derive(Clone, Debug, PartialEq)]
pub struct PictureRequest {
    /// What to draw; a plain prompt.
    pub prompt: String,
    /// How many pictures.
    pub count: usize,
    /// Sampling steps.
    pub steps: usize,
    /// Guidance scale; 1 is no guidance.
    pub guidance_scale: f32,
}

/// The trainable factors of one layer: h = W0 x + scale * mask ⊙ (B A x) on `rows`.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerFactors {
    /// Index into [`TrainHost::layers`].
    pub layer: usize,
    /// The owned output rows R_i, ascending.
    pub rows: Arc<[u32]>,
    /// r.
    pub rank: usize,
    /// Multiplies the branch (alpha, or alpha / r).
    pub scale: f32,
    /// A, [rank, n], row-major.
    pub a: Vec<f32>,
    /// The owned rows of B, [rows, rank], row-major.
    pub b: Vec<f32>,
    /// A is not trained; its gradient is zero.
    pub a_is_frozen: bool,
}

/// One of a concept's names: its trainable vectors.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenFactors {
    /// The name, as `milo-1`.
    pub name: String,
    /// Vectors: one for each cross-attention layer, or one for all.
    pub layers: usize,
    /// [layers, d], row-major.
    pub values: Vec<f32>,
}

/// Everything that training moves, and the gradients of the same shape.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Parameters {
    /// Factors by layer.
    pub factors: Vec<LayerFactors>,
    /// The concept's names in the order in which they stand in a prompt.
    pub tokens: Vec<TokenFactors>,
}

impl Parameters {
    /// All parameter tensors in a fixed order: A and B of each layer, then each token.
    pub fn tensors_mut(&mut self) -> impl Iterator<Item = &mut Vec<f32>> {
        self.factors.iter_mut().flat_map(|f| [&mut f.a, &mut f.b]).chain(self.tokens.iter_mut().map(|t| &mut t.values))
    }

    /// As [`Self::tensors_mut`], for reading.
    pub fn tensors(&self) -> impl Iterator<Item = &Vec<f32>> {
        self.factors.iter().flat_map(|f| [&f.a, &f.b]).chain(self.tokens.iter().map(|t| &t.values))
    }
}

/// How a training picture is laid on the square canvas.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Placement {
    /// 1, or more: the picture's short side is the canvas's, and what stands out is cropped. Below 1: the whole picture is
    /// there, its long side this fraction of the canvas, and the rest of the canvas is empty.
    pub scale: f32,
    /// Where in the free (or cropped) range it lies, 0..=1 in x and y.
    pub offset: [f32; 2],
    /// Mirror it left to right.
    pub flip: bool,
}

/// One sample of a training batch.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// Index of the picture: in the dataset, and behind it those of [`TrainHost::generate`].
    pub picture: usize,
    /// How it is laid on the canvas; where the canvas stays empty, the loss does not count.
    pub placement: Placement,
    /// The prompt; `{}` stands for the concept's names. Without `{}` it is a plain prompt (prior preservation).
    pub prompt: String,
    /// t, 0..num_train_timesteps.
    pub timestep: usize,
    /// eps, of C * H * W numbers ([`TrainHost::latent_shape`]).
    pub noise: Vec<f32>,
    /// Standard normals for the VAE's posterior, of C * H * W numbers ([`TrainHost::latent_shape`]).
    pub posterior: Vec<f32>,
    /// Multiplies this sample's error; 1 for an ordinary one.
    pub weight: f32,
}

/// Erasure masks r(lambda) of a step, by position in [`Parameters::factors`]: `[rows]` shared by the whole batch, or
/// [batch, rows]; an empty list erases nothing.
pub type ErasureMasks = Vec<Vec<f32>>;

/// What a trainer can save in the middle of its work and continue from, bit for bit.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TrainState {
    /// Steps done.
    pub step: usize,
    /// The parameters after them.
    pub parameters: Parameters,
    /// Whatever the optimiser carries from step to step: tensors of any number and length.
    pub optimiser: Vec<Vec<f32>>,
}

/// The model and the data as a trainer sees them, and the services of its job.
pub trait TrainHost {
    /// What is taught.
    fn concept(&self) -> &Concept;
    /// The job's seed.
    fn seed(&self) -> u64;
    /// The Linears that may be adapted.
    fn layers(&self) -> &[LayerInfo];
    /// Cross-attention layers of the UNet, in forward order: the number of vectors of a layer-wise token.
    fn cross_attention_layers(&self) -> usize;
    /// The embedding of `word`, which must be a single token of the model's vocabulary.
    fn embedding(&self, word: &str) -> Result<Vec<f32>>;
    /// The pictures' captions; `{}` stands for the concept. None: only templates.
    fn captions(&self) -> &[Option<String>];
    /// [C, H, W] of one latent.
    fn latent_shape(&self) -> [usize; 3];
    /// Timesteps of the training schedule.
    fn num_train_timesteps(&self) -> usize;
    /// Whether `prompt`, in which `{}` stands for a concept of `tokens` tokens, fits the model; an error if not.
    fn check_prompt(&self, prompt: &str, tokens: usize) -> Result<()>;
    /// Draws pictures with the model as it is and puts them behind those that there are; returns their indices. The
    /// job's seed and the request decide every pixel. [`crate::Error::Cancelled`] within a sampling step if the caller
    /// has cancelled.
    fn generate(&mut self, request: &PictureRequest) -> Result<Range<usize>>;
    /// 1/N sum of weight * error over the batch, with the mean squared errors (only where pictures cover the canvas),
    /// and its gradients, written into `gradients` (same shape as `parameters`; resized if needed). Base weights never
    /// get gradients.
    fn loss_and_gradients(
        &mut self,
        parameters: &Parameters,
        masks: &ErasureMasks,
        batch: &[Sample],
        gradients: &mut Parameters,
    ) -> Result<f32>;
    /// How far `parameters` move the prediction: the same with the prediction of the model as it is, for the same
    /// prompts and token vectors, in the place of the noise.
    fn drift_and_gradients(
        &mut self,
        parameters: &Parameters,
        masks: &ErasureMasks,
        batch: &[Sample],
        gradients: &mut Parameters,
    ) -> Result<f32>;
    /// The state to continue from, if the job is resumed.
    fn resume(&mut self) -> Result<Option<TrainState>>;
    /// Called after every step (`step` are done) with the loss; makes and saves the state when that is due.
    /// [`crate::Error::Cancelled`], after saving, if the caller has cancelled.
    fn step_done(&mut self, step: usize, state: &dyn Fn() -> TrainState, steps: usize, loss: f32) -> Result<()>;
}

/// A trainer: turns pictures of a concept into parameters.
pub trait Trainer: Send + Sync {
    /// What trained the adapter, as its file will say: id, version, digest and the whole configuration.
    fn algorithm(&self) -> &blocklora_spec::Algorithm;
    /// What else the file will say.
    fn plan(&self, concept: &Concept) -> Result<TrainPlan>;
    /// Runs the whole training on `host`.
    fn train(&self, host: &mut dyn TrainHost) -> Result<Parameters>;
}
