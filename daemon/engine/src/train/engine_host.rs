//! The engine as a trainer's host: losses and gradients on the real model.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use candle_core::{Device, Tensor, Var};

use super::checkpoint::Checkpoint;
use super::dataset::Dataset;
use super::host::{Concept, ErasureMasks, Parameters, PictureRequest, Sample, TrainHost, TrainState};
use crate::error::{Error, Result};
use crate::generate::{GenerateRequest, Step, generate};
use crate::merge::strategy::LayerInfo;
use crate::model::{Model, Prediction};
use crate::nn::{Forward, TrainingAdapter};
use crate::ops::LoraBranch;
use crate::rng::{Rng, Stream};
use crate::sample::Sampler;
use crate::text::{self, ConceptSlots, Prompt, TokenisedPrompt};

/// What a training run is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Pictures are drawn for the trainer; the steps are the sampler's, of one request's pictures together.
    Prior,
    /// Steps of the training itself.
    Training,
}

impl Stage {
    /// As clients see it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Prior => "prior",
            Self::Training => "training",
        }
    }
}

/// What a training run tells its caller between two steps.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// What the steps are of.
    pub stage: Stage,
    /// Steps done.
    pub step: usize,
    /// Steps in all.
    pub steps: usize,
    /// The step's loss, in training.
    pub loss: Option<f32>,
}

/// What draws pictures for trainers that ask for some.
pub type PriorSampler = Arc<dyn Sampler>;

/// What a step's prediction is compared with.
#[derive(Clone, Copy)]
enum Target {
    /// The noise (or velocity) that was added.
    Noise,
    /// The prediction of the model without the parameters.
    Base,
}

/// Runs training steps on a model for one concept's dataset.
pub struct EngineHost<'a> {
    model: &'a Model,
    concept: &'a Concept,
    dataset: &'a Dataset,
    /// Pictures drawn for the trainer; their indices follow those of the dataset.
    drawn: Vec<Dataset>,
    sampler: Option<PriorSampler>,
    seed: u64,
    /// Side of the training canvas in pixels.
    canvas: usize,
    latent_shape: [usize; 3],
    checkpoint: Option<(Checkpoint, usize)>,
    resume: bool,
    progress: &'a mut dyn FnMut(Progress) -> Result<()>,
    /// Whether the UNet's activations are computed again rather than kept.
    checkpointing: bool,
    /// The trainer and the steps that it planned, to be kept to.
    planned: Option<(&'a str, usize)>,
    /// The last step done; none: none here.
    done: Option<usize>,
    /// VAE posteriors (mean, log variance) of pictures that fill the canvas whole.
    posteriors: HashMap<usize, (Tensor, Tensor)>,
}

impl<'a> EngineHost<'a> {
    /// A host for `dataset` on `model`. `checkpoint`: where to save, and every how many steps; with `resume` the run
    /// continues from what is there. `progress` is called between two steps, those of pictures for the trainer, too: its
    /// error ends the run.
    pub fn new(
        model: &'a Model,
        concept: &'a Concept,
        dataset: &'a Dataset,
        seed: u64,
        checkpoint: Option<(Checkpoint, usize)>,
        resume: bool,
        progress: &'a mut dyn FnMut(Progress) -> Result<()>,
    ) -> Self {
        let (channels, height, width) = model.latent_shape();
        let latent_shape = [channels, height, width];
        let canvas = height * model.vae().downscale();
        // A small model's activations fit anywhere; the gradients are the same either way.
        const LARGE: usize = 1 << 18;
        let checkpointing = height * width * model.unet().config().block_out_channels[0] > LARGE;
        Self {
            model,
            concept,
            dataset,
            drawn: Vec::new(),
            sampler: None,
            seed,
            canvas,
            latent_shape,
            checkpoint,
            resume,
            progress,
            checkpointing,
            planned: None,
            done: None,
            posteriors: HashMap::new(),
        }
    }

    /// The same with a sampler for trainers that ask for pictures.
    pub fn with_sampler(mut self, sampler: Option<PriorSampler>) -> Self {
        self.sampler = sampler;
        self
    }

    /// The same for a trainer that must take the `steps` steps of its plan, one after the other.
    pub fn with_plan(mut self, trainer: &'a str, steps: usize) -> Self {
        self.planned = Some((trainer, steps));
        self
    }

    /// Fails on a model that cannot be trained on: pictures are placed on a square canvas.
    pub fn check_model(model: &Model) -> Result<()> {
        let (_, height, width) = model.latent_shape();
        if height != width || height == 0 {
            let reason = "training needs a model whose latents are a square of at least one pixel";
            return Err(Error::option("sample_size", format!("{height}x{width}"), reason));
        }
        Ok(())
    }

    /// Fails if the trainer has not taken the steps of its plan.
    pub fn check_end(&self) -> Result<()> {
        match self.planned {
            Some((trainer, steps)) if self.done != Some(steps) => {
                let done = self.done.unwrap_or(0);
                Err(Error::faulty_method(trainer, format!("it ended after step {done} of the {steps} that it planned")))
            }
            _ => Ok(()),
        }
    }

    /// A step must be the next one, of as many as were planned, and have a loss; else what is saved would be no state to
    /// go on from.
    fn check_step(&self, step: usize, steps: usize, loss: f32) -> Result<()> {
        let Some((trainer, planned)) = self.planned else { return Ok(()) };
        let expected = self.done.unwrap_or(0) + 1;
        let reason = if step != expected {
            format!("it told of step {step} where step {expected} was due")
        } else if steps != planned {
            format!("it told of {steps} steps in all, but planned {planned}")
        } else if !loss.is_finite() {
            format!("it told of a loss of {loss} at step {step}")
        } else {
            return Ok(());
        };
        Err(Error::faulty_method(trainer, reason))
    }

    /// Sets whether the UNet's activations are computed again when gradients need them, which takes a third more time
    /// and a fraction of the memory. By default they are for models of the size of Stable Diffusion.
    pub fn with_checkpointing(mut self, checkpointing: bool) -> Self {
        self.checkpointing = checkpointing;
        self
    }

    /// The dataset that has picture `index`, and its index there.
    fn picture(&self, index: usize) -> Result<(&Dataset, usize)> {
        let mut local = index;
        for dataset in std::iter::once(self.dataset).chain(&self.drawn) {
            match local.checked_sub(dataset.len()) {
                None => return Ok((dataset, local)),
                Some(rest) => local = rest,
            }
        }
        let all = index - local;
        Err(Error::option("picture", index, format!("there are {all}")))
    }

    fn device(&self) -> &Device {
        self.model.device()
    }

    /// z_0 [1, C, H, W] (scaled) of a sample, and which latent pixels count, [H * W].
    fn latents(&mut self, sample: &Sample) -> Result<(Tensor, Vec<f32>)> {
        let [channels, height, width] = self.latent_shape;
        let (dataset, local) = self.picture(sample.picture)?;
        let plain = dataset.is_plain(local, &sample.placement);
        let cached = if plain { self.posteriors.get(&sample.picture).cloned() } else { None };
        let (mean, log_variance, mask) = match cached {
            Some((mean, log_variance)) => (mean, log_variance, vec![1.0; height * width]),
            None => {
                let (pixels, covered) = dataset.place(local, &sample.placement, self.canvas, self.device())?;
                let (mean, log_variance) = self.model.vae().encode(&pixels)?;
                if plain {
                    self.posteriors.insert(sample.picture, (mean.clone(), log_variance.clone()));
                }
                (mean, log_variance, latent_mask(&covered, self.canvas, height, width))
            }
        };
        let noise = Tensor::from_slice(&sample.posterior, (1, channels, height, width), self.device())?;
        let z = (mean + ((log_variance * 0.5)?.exp()? * noise)?)?;
        Ok(((z * self.model.vae().scaling_factor())?, mask))
    }

    /// z_t and the training target (eps or v), both [1, C, H, W].
    fn noised(&self, z: &Tensor, sample: &Sample) -> Result<(Tensor, Tensor)> {
        let alphas = &self.model.schedule().alphas_cumprod;
        let alpha = *alphas.get(sample.timestep).ok_or_else(|| {
            Error::option("timestep", sample.timestep, format!("the model's schedule has {} steps", alphas.len()))
        })? as f64;
        let (signal, sigma) = (alpha.sqrt(), (1.0 - alpha).sqrt());
        let eps = Tensor::from_slice(&sample.noise, z.shape(), self.device())?;
        let z_t = ((z * signal)? + (&eps * sigma)?)?;
        let target = match self.model.prediction() {
            Prediction::Epsilon => eps,
            Prediction::VPrediction => ((eps * signal)? - (z * sigma)?)?,
        };
        Ok((z_t, target))
    }

    /// What the model as it is says of these samples, without a graph.
    fn base_prediction(
        &self,
        noised: &Tensor,
        timesteps: &[f32],
        prompts: &[TokenisedPrompt],
        vectors: &[Tensor],
    ) -> Result<Tensor> {
        let vectors: Vec<Tensor> = vectors.iter().map(Tensor::detach).collect();
        let context = text::encode_with(self.model, prompts, &vectors, &Forward::default())?;
        self.model.unet().forward(noised, timesteps, &context, &Forward::default())
    }

    /// The loss against `target` and its gradients.
    fn step(
        &mut self,
        target: Target,
        parameters: &Parameters,
        masks: &ErasureMasks,
        batch: &[Sample],
        gradients: &mut Parameters,
    ) -> Result<f32> {
        let (mut noised, mut targets, mut weights, mut timesteps, mut prompts) =
            (Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let [channels, height, width] = self.latent_shape;
        for sample in batch {
            let (z, mask) = self.latents(sample)?;
            let (z_t, target) = self.noised(&z, sample)?;
            // Each sample's error is averaged over the latent pixels that its picture covers.
            let counted = mask.iter().sum::<f32>().max(1.0) * channels as f32;
            let mask: Vec<f32> = mask.iter().map(|m| sample.weight * (m / counted)).collect();
            weights.push(Tensor::from_vec(mask, (1, 1, height, width), self.device())?);
            noised.push(z_t);
            targets.push(target);
            timesteps.push(sample.timestep as f32);
            prompts.push(tokenise(self.model, &sample.prompt, parameters.tokens.len())?);
        }
        let variables = Variables::new(parameters, masks, self.model.layers(), self.device())?;
        let vectors: Vec<Tensor> = variables.tokens.iter().map(|t| t.as_tensor().clone()).collect();
        let with = Forward { adapters: &variables.adapters, recorder: None };
        let context = text::encode_with(self.model, &prompts, &vectors, &with)?;
        let noised = Tensor::cat(&noised, 0)?;
        let targets = match target {
            Target::Noise => Tensor::cat(&targets, 0)?,
            Target::Base => self.base_prediction(&noised, &timesteps, &prompts, &vectors)?,
        };
        let weights = Tensor::cat(&weights, 0)?;
        let loss_of = |predicted: &Tensor, samples: Range<usize>| {
            let part = |all: &Tensor| all.narrow(0, samples.start, samples.len());
            let error = (predicted - part(&targets)?)?.sqr()?;
            Ok((error.broadcast_mul(&part(&weights)?)?.sum_all()? / batch.len() as f64)?)
        };
        let (loss, mut found) =
            self.model.unet().loss_and_gradients(&noised, &timesteps, &context, &with, &loss_of, self.checkpointing)?;
        found.follow(&context, variables.all().map(Var::as_tensor))?;
        gradients.clone_from(parameters);
        for (out, variable) in gradients.tensors_mut().zip(variables.all()) {
            match found.get(variable) {
                Some(gradient) => *out = gradient.flatten_all()?.to_vec1()?,
                None => out.fill(0.0),
            }
        }
        Ok(loss)
    }
}

/// Tokenises a training prompt, in which `{}` stands for a concept of `tokens` tokens.
pub(super) fn tokenise(model: &Model, prompt: &str, tokens: usize) -> Result<TokenisedPrompt> {
    // Not a name that the caption has by itself: it means nothing here, and says so.
    let mut name = "concept".to_owned();
    while prompt.contains(&format!("<{name}>")) {
        name.push('x');
    }
    let named = prompt.replace("{}", &format!("<{name}>"));
    Prompt::parse(&named).tokenise(model.tokenizer(), &[ConceptSlots { name: &name, tokens }])
}

/// A latent pixel counts if the picture covers the middle of its pixels.
fn latent_mask(covered: &[bool], canvas: usize, height: usize, width: usize) -> Vec<f32> {
    let (step_y, step_x) = (canvas / height, canvas / width);
    let middle = |y: usize, x: usize| covered[(y * step_y + step_y / 2) * canvas + x * step_x + step_x / 2];
    (0..height * width).map(|i| f32::from(middle(i / width, i % width))).collect()
}

/// The parameters as variables, and the training adapters made of them.
struct Variables {
    factors: Vec<(Var, Var)>,
    tokens: Vec<Var>,
    adapters: Vec<Option<TrainingAdapter>>,
}

impl Variables {
    fn new(parameters: &Parameters, masks: &ErasureMasks, layers: &[LayerInfo], device: &Device) -> Result<Self> {
        let mut factors = Vec::with_capacity(parameters.factors.len());
        let mut adapters = vec![None; layers.len()];
        for (i, f) in parameters.factors.iter().enumerate() {
            let layer = layers
                .get(f.layer)
                .ok_or_else(|| Error::option("layer", f.layer, format!("the model has {} layers", layers.len())))?;
            let a = Var::from_slice(&f.a, (f.rank, layer.columns), device)?;
            let b = Var::from_slice(&f.b, (f.rows.len(), f.rank), device)?;
            // A tensor that is no variable gets no gradient.
            let a_used = if f.a_is_frozen { a.as_detached_tensor() } else { a.as_tensor().clone() };
            let mask = match masks.get(i) {
                None => None,
                Some(mask) if mask.len() == f.rows.len() => Some(Tensor::from_slice(mask, f.rows.len(), device)?),
                Some(mask) => Some(Tensor::from_slice(mask, (mask.len() / f.rows.len(), f.rows.len()), device)?),
            };
            let branch = LoraBranch { rows: f.rows.clone(), mask, scale: f.scale as f64 };
            adapters[f.layer] = Some(TrainingAdapter { a: a_used, b: b.as_tensor().clone(), branch });
            factors.push((a, b));
        }
        let tokens = parameters
            .tokens
            .iter()
            .map(|t| Var::from_slice(&t.values, (t.layers, t.values.len() / t.layers), device))
            .collect::<candle_core::Result<Vec<_>>>()?;
        Ok(Self { factors, tokens, adapters })
    }

    /// All variables in the order of [`Parameters::tensors`].
    fn all(&self) -> impl Iterator<Item = &Var> {
        self.factors.iter().flat_map(|(a, b)| [a, b]).chain(&self.tokens)
    }
}

impl TrainHost for EngineHost<'_> {
    fn concept(&self) -> &Concept {
        self.concept
    }

    fn seed(&self) -> u64 {
        self.seed
    }

    fn layers(&self) -> &[LayerInfo] {
        self.model.layers()
    }

    fn cross_attention_layers(&self) -> usize {
        self.model.cross_attention_layers()
    }

    fn embedding(&self, word: &str) -> Result<Vec<f32>> {
        // A trainer may ask for other words, too, and knows which of its settings has one.
        let name = if word == self.concept.class_word { "class" } else { "word" };
        let refuse = |reason: &str| Err(Error::option(name, word, reason));
        match self.model.tokenizer().ids(word)?[..] {
            [] => refuse("it must be a word, such as dog, person or style"),
            [id] => {
                let ids = Tensor::from_slice(&[id], (1, 1), self.device())?;
                Ok(self.model.text_encoder().embed(&ids)?.flatten_all()?.to_vec1()?)
            }
            _ => refuse("it must be one token of this model's vocabulary; choose a more common word"),
        }
    }

    fn captions(&self) -> &[Option<String>] {
        self.dataset.captions()
    }

    fn latent_shape(&self) -> [usize; 3] {
        self.latent_shape
    }

    fn num_train_timesteps(&self) -> usize {
        self.model.schedule().alphas_cumprod.len()
    }

    fn loss_and_gradients(
        &mut self,
        parameters: &Parameters,
        masks: &ErasureMasks,
        batch: &[Sample],
        gradients: &mut Parameters,
    ) -> Result<f32> {
        self.step(Target::Noise, parameters, masks, batch, gradients)
    }

    fn drift_and_gradients(
        &mut self,
        parameters: &Parameters,
        masks: &ErasureMasks,
        batch: &[Sample],
        gradients: &mut Parameters,
    ) -> Result<f32> {
        self.step(Target::Base, parameters, masks, batch, gradients)
    }

    fn check_prompt(&self, prompt: &str, tokens: usize) -> Result<()> {
        tokenise(self.model, prompt, tokens).map(drop)
    }

    fn generate(&mut self, request: &PictureRequest) -> Result<Range<usize>> {
        let start = self.dataset.len() + self.drawn.iter().map(Dataset::len).sum::<usize>();
        let Some(sampler) = &self.sampler else {
            return Err(Error::option("prior", request.count, "no sampler is at hand to draw pictures of the class"));
        };
        let seed = Rng::new(self.seed, Stream::Prior, self.drawn.len() as u32, 0).next_u32();
        let request = GenerateRequest {
            prompt: &request.prompt,
            negative_prompt: "",
            concepts: &[],
            steps: request.steps,
            guidance_scale: request.guidance_scale,
            sampler: sampler.as_ref(),
            seed: seed as u64,
            width: self.canvas,
            height: self.canvas,
            count: request.count,
        };
        let progress = &mut self.progress;
        let mut between = |step: Step| {
            let (done, steps) = (step.image * step.steps + step.step + 1, step.images * step.steps);
            progress(Progress { stage: Stage::Prior, step: done, steps, loss: None })
        };
        let pictures = generate(self.model, &request, &mut between)?;
        self.drawn.push(Dataset::from_pictures(pictures.into_iter().map(|picture| (picture, None)).collect())?);
        Ok(start..start + request.count)
    }

    fn resume(&mut self) -> Result<Option<TrainState>> {
        match &self.checkpoint {
            Some((checkpoint, _)) if self.resume => {
                let state = checkpoint.load()?;
                self.done = state.as_ref().map(|state| state.step);
                Ok(state)
            }
            _ => Ok(None),
        }
    }

    fn step_done(&mut self, step: usize, state: &dyn Fn() -> TrainState, steps: usize, loss: f32) -> Result<()> {
        self.check_step(step, steps, loss)?;
        self.done = Some(step);
        let answer = (self.progress)(Progress { stage: Stage::Training, step, steps, loss: Some(loss) });
        if let Some((checkpoint, every)) = &self.checkpoint
            && (answer.is_err() || step.is_multiple_of(*every))
        {
            checkpoint.save(&state())?;
        }
        answer
    }
}
