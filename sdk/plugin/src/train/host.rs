//! What a trainer gets from its host. Plain data.

use std::ops::Range;
use std::sync::Arc;

use crate::error::{Code, Error, Result};
use crate::job::Job;
use crate::merge::Layer;
use crate::{Delta, Kind, Partition};

/// What is being taught.
#[derive(Clone, Debug, PartialEq)]
pub struct Concept {
    /// Its name: letters, digits, `_` and `-`. A prompt names it as `<name>`.
    pub name: String,
    /// The word for what it is, a single token of the model's vocabulary.
    pub class_word: String,
    /// Which templates fit it.
    pub kind: Kind,
}

impl Concept {
    /// The seed of what the concept starts from, as [`Stream::Init`](crate::rng::Stream::Init) draws it: the job's `seed`
    /// with a digest of the name in it (64-bit FNV-1a of its bytes, by exclusive or). So concepts that are trained with
    /// one seed start apart, and the same name and seed give the same start.
    pub fn start_seed(&self, seed: u64) -> u64 {
        let digest = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01B3);
        seed ^ self.name.bytes().fold(0xCBF2_9CE4_8422_2325, digest)
    }
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
    /// The delta formula; with it, rank and alpha the [`LayerFactors::scale`] of every layer is
    /// [`TrainPlan::scale`].
    pub delta: Delta,
    /// Which rows the adapter owns in each layer; none means all. The parameters must own exactly these.
    pub partition: Option<Partition>,
    /// The probability with which training erased an output; 0 without output erasure.
    pub erasure_lambda: f32,
    /// The names of the tokens that the parameters will have, in the order in which they stand in a prompt.
    pub tokens: Vec<String>,
}

impl TrainPlan {
    /// The factor of B A in every layer.
    pub fn scale(&self) -> f32 {
        self.delta.scale(self.alpha, self.rank)
    }
}

/// The trainable factors of one layer: h = W0 x + scale * mask * (B A x) on `rows`.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerFactors {
    /// Index into [`TrainHost::layers`]; each at most once.
    pub layer: usize,
    /// The owned output rows, ascending.
    pub rows: Arc<[u32]>,
    /// r.
    pub rank: usize,
    /// Multiplies the branch: [`TrainPlan::scale`].
    pub scale: f32,
    /// A, [rank, n], row-major.
    pub a: Vec<f32>,
    /// The owned rows of B, [rows, rank], row-major.
    pub b: Vec<f32>,
    /// A is not trained: the host need not compute its gradient, which is then zero.
    pub a_is_frozen: bool,
}

/// One of a concept's names: its trainable vectors.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenFactors {
    /// The name, as `milo-1`: letters, digits, `_` and `-`.
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

impl Placement {
    /// The middle of the picture, filling the canvas.
    pub const WHOLE: Self = Self { scale: 1.0, offset: [0.5; 2], flip: false };
}

/// One sample of a training batch.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// Index of the picture: below the number of captions one of the concept's own, from there on one of
    /// [`TrainHost::generate`].
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
    /// Whatever the optimiser carries from step to step, such as AdamW's moments: tensors of any number and length.
    pub optimiser: Vec<Vec<f32>>,
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

/// What a step's value and gradients are of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Objective {
    /// [`TrainHost::loss_and_gradients`].
    Loss,
    /// [`TrainHost::drift_and_gradients`].
    Drift,
}

impl Objective {
    /// Asks `host` for it; arguments, result and errors are those of the method.
    pub fn ask(
        self,
        host: &mut dyn TrainHost,
        parameters: &Parameters,
        masks: &ErasureMasks,
        batch: &[Sample],
        gradients: &mut Parameters,
    ) -> Result<f32> {
        match self {
            Self::Loss => host.loss_and_gradients(parameters, masks, batch, gradients),
            Self::Drift => host.drift_and_gradients(parameters, masks, batch, gradients),
        }
    }
}

/// The model and the data as a trainer sees them, and the services of its job.
///
/// Threads: the methods of this trait are called from the thread that [`Trainer::train`](super::Trainer::train) was
/// called on.
pub trait TrainHost: Job {
    /// What is taught.
    fn concept(&self) -> &Concept;
    /// The Linears that may be adapted.
    fn layers(&self) -> &[Layer];
    /// Cross-attention layers of the UNet, in forward order: the number of vectors of a layer-wise token.
    fn cross_attention_layers(&self) -> usize;
    /// [C, H, W] of one latent.
    fn latent_shape(&self) -> [usize; 3];
    /// Timesteps of the training schedule.
    fn num_train_timesteps(&self) -> usize;
    /// The captions of the concept's own pictures, of which there is at least one; `{}` stands for the concept. None:
    /// only templates.
    fn captions(&self) -> &[Option<String>];
    /// The embedding `[d]` of `word`, which must be a single token of the model's vocabulary.
    fn embedding(&self, word: &str) -> Result<Vec<f32>>;
    /// Whether `prompt` (in which `{}` stands for a concept of `tokens` tokens) fits the model; an error that says why
    /// not. Better asked of every prompt before step 0 than found out at step 700.
    fn check_prompt(&self, prompt: &str, tokens: usize) -> Result<()>;
    /// Draws pictures with the model as it is, nothing merged and nothing trained, and puts them behind those that
    /// there are; returns their indices. The job's seed and the request decide every pixel, so that a resumed run asks
    /// again and gets the same pictures. Fails with [`Code::NotSupported`](crate::Code::NotSupported) where the host
    /// has no sampler, and with [`Error::cancelled`](crate::Error::cancelled) within a sampling step if the caller has
    /// cancelled.
    fn generate(&mut self, request: &PictureRequest) -> Result<Range<usize>>;
    /// The loss of the batch, `1/N sum_i weight_i error_i` with error_i the mean squared error where the picture covers
    /// the canvas, and its gradients, written into `gradients` (made to the shape of `parameters` if they have another).
    /// Base weights never get gradients. This is where the time goes.
    fn loss_and_gradients(
        &mut self,
        parameters: &Parameters,
        masks: &ErasureMasks,
        batch: &[Sample],
        gradients: &mut Parameters,
    ) -> Result<f32>;
    /// How far `parameters` move the model's prediction: the loss with the prediction of the model as it is, for the
    /// same prompts and the same words, in the place of the noise; and its gradients, as
    /// [`Self::loss_and_gradients`]. Since ABI 1.1; fails with [`Code::NotSupported`] in a host of 1.0.
    fn drift_and_gradients(
        &mut self,
        parameters: &Parameters,
        masks: &ErasureMasks,
        batch: &[Sample],
        gradients: &mut Parameters,
    ) -> Result<f32> {
        let _ = (parameters, masks, batch, gradients);
        Err(Error::new(Code::NotSupported, "this host cannot compare with the model as it is (ABI 1.1)"))
    }
    /// The state to continue from, if the job is resumed; to be asked for once, before the first step.
    fn resume(&mut self) -> Result<Option<TrainState>>;
    /// To be called after every step with the state after it and the step's loss: reports progress and saves the state
    /// when that is due. Returns [`Error::cancelled`](crate::Error::cancelled), after saving, if the caller has
    /// cancelled.
    fn step_done(&mut self, state: &TrainState, steps: usize, loss: f32) -> Result<()>;

    /// The same for hosts that would rather not copy a state that they do not save: `state` makes it.
    #[doc(hidden)]
    fn step_done_with(&mut self, step: usize, state: &dyn Fn() -> TrainState, steps: usize, loss: f32) -> Result<()> {
        let _ = step;
        self.step_done(&state(), steps, loss)
    }
}

/// Checks the masks and samples of a training step: what hosts do before they use what a plugin gave them.
pub fn check_step(
    latent_shape: [usize; 3],
    parameters: &Parameters,
    masks: &ErasureMasks,
    batch: &[Sample],
) -> Result<()> {
    let latent = latent_shape.iter().product::<usize>();
    if batch.is_empty() {
        return Err(Error::contract("a training step has no sample"));
    }
    if let Some(s) = batch.iter().find(|s| s.noise.len() != latent || s.posterior.len() != latent) {
        let (noise, posterior) = (s.noise.len(), s.posterior.len());
        return Err(Error::contract(format!("a sample has {noise} and {posterior} random numbers, not {latent}")));
    }
    if !masks.is_empty() && masks.len() != parameters.factors.len() {
        return Err(Error::contract(format!("{} masks for {} factors", masks.len(), parameters.factors.len())));
    }
    for (mask, f) in masks.iter().zip(&parameters.factors) {
        if mask.len() != f.rows.len() && mask.len() != batch.len() * f.rows.len() {
            return Err(Error::contract(format!("a mask of {} for {} rows", mask.len(), f.rows.len())));
        }
    }
    Ok(())
}

/// Checks that `parameters` fit `layers`: what hosts do before they use what a plugin gave them.
pub fn check_parameters(layers: &[Layer], parameters: &Parameters) -> Result<()> {
    let mut seen = vec![false; layers.len()];
    for f in &parameters.factors {
        let Some(layer) = layers.get(f.layer) else {
            return Err(Error::contract(format!(
                "factors of layer {}, but there are {} layers",
                f.layer,
                layers.len()
            )));
        };
        let wrong = |reason: String| Err(Error::contract(format!("factors of {}: {reason}", layer.name)));
        if std::mem::replace(&mut seen[f.layer], true) {
            return wrong("they are there twice".into());
        }
        if !f.rows.is_sorted_by(|p, q| p < q) || f.rows.last().is_some_and(|&row| row as usize >= layer.rows) {
            return wrong(format!("their rows are not ascending and below {}", layer.rows));
        }
        if f.rank == 0 || f.rank.checked_mul(layer.columns) != Some(f.a.len()) {
            return wrong(format!("A has {} numbers, not {} x {}", f.a.len(), f.rank, layer.columns));
        }
        if f.rank.checked_mul(f.rows.len()) != Some(f.b.len()) {
            return wrong(format!("B has {} numbers, not {} x {}", f.b.len(), f.rows.len(), f.rank));
        }
        if !f.scale.is_finite() {
            return wrong(format!("their scale is {}", f.scale));
        }
    }
    for t in &parameters.tokens {
        if t.layers == 0 || t.values.is_empty() || !t.values.len().is_multiple_of(t.layers) {
            let reason = format!("{} numbers for {} vectors", t.values.len(), t.layers);
            return Err(Error::contract(format!("token {:?}: {reason}", t.name)));
        }
    }
    match parameters.tensors().flatten().find(|x| !x.is_finite()) {
        Some(value) => Err(Error::new(Code::NotFinite, format!("a trained number is not finite ({value})"))),
        None => Ok(()),
    }
}
