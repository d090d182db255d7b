//! From a prompt to pictures: encode the prompt, sample latents under classifier-free guidance, decode them.

use candle_core::{DType, Tensor};

use crate::error::{Error, Result};
use crate::image::{AdapterUse, GenerationParameters, MAX_SIDE, Picture};
use crate::model::{Model, Prediction};
use crate::nn::{Conditioning, Forward};
use crate::rng::{Rng, Stream};
use crate::sample::{Denoiser, NoiseSchedule, Sampler};
use crate::text::{self, Concept};

/// What to generate.
#[derive(Clone, Copy)]
pub struct GenerateRequest<'a> {
    /// The prompt; `<name>` stands for a concept.
    pub prompt: &'a str,
    /// What to steer away from; empty for nothing in particular. Not used at guidance scale 1.
    pub negative_prompt: &'a str,
    /// The concepts that the prompts may name. Their adapters must have been merged into the model.
    pub concepts: &'a [Concept],
    /// Sampling steps.
    pub steps: usize,
    /// Guidance scale g of eps = eps(negative) + g (eps(prompt) - eps(negative)); 1 is no guidance.
    pub guidance_scale: f32,
    /// The sampler.
    pub sampler: &'a dyn Sampler,
    /// Picture i is made with the seed `seed` + i, so that each can be made again by itself.
    pub seed: u64,
    /// Width in pixels, a multiple of the VAE's downscaling.
    pub width: usize,
    /// Height in pixels, a multiple of the VAE's downscaling.
    pub height: usize,
    /// Number of pictures.
    pub count: usize,
}

/// A sampling step that has been done.
#[derive(Clone, Copy, Debug)]
pub struct Step<'a> {
    /// Which picture, from 0.
    pub image: usize,
    /// Number of pictures.
    pub images: usize,
    /// Which step of it, from 0.
    pub step: usize,
    /// Steps for each picture.
    pub steps: usize,
    /// The latents after it, [C, H, W], as the UNet sees them; of a batch all of them.
    pub latents: &'a [f32],
}

impl GenerateRequest<'_> {
    /// How picture `image` of this request is made, for its file; `adapters` are those merged into `model`.
    pub fn parameters(&self, model: &Model, image: usize, adapters: &[AdapterUse]) -> GenerationParameters {
        GenerationParameters {
            prompt: self.prompt.to_owned(),
            negative_prompt: self.negative_prompt.to_owned(),
            steps: self.steps,
            sampler: self.sampler.id().to_owned(),
            guidance_scale: self.guidance_scale,
            seed: self.seed_of(image),
            width: self.width,
            height: self.height,
            model_digest: model.digest().to_owned(),
            adapters: adapters.to_vec(),
            merge: None,
            precision: match model.precision() {
                DType::F16 => "f16".to_owned(),
                DType::BF16 => "bf16".to_owned(),
                _ => String::new(),
            },
            sampler_config: Default::default(),
        }
    }

    fn seed_of(&self, image: usize) -> u64 {
        self.seed.wrapping_add(image as u64)
    }

    /// What the UNet reads: without guidance one encoding for each prompt, with guidance as many of the negative prompt
    /// before them.
    fn encode(&self, model: &Model, prompts: &[&str]) -> Result<Conditioning> {
        if self.guidance_scale == 1.0 {
            return text::encode(model, prompts, self.concepts, &Forward::default());
        }
        let all = [&[self.negative_prompt], prompts].concat();
        let all = text::encode(model, &all, self.concepts, &Forward::default())?;
        let (negative, prompts_encoded) = (all.narrow(0, 1)?, all.narrow(1, prompts.len())?);
        let mut parts = vec![&negative; prompts.len()];
        parts.push(&prompts_encoded);
        Ok(Conditioning::cat(&parts)?)
    }

    fn latent_shape(&self, model: &Model) -> Result<(usize, usize, usize)> {
        let factor = model.vae().downscale();
        for (name, pixels) in [("width", self.width), ("height", self.height)] {
            if pixels == 0 || pixels % factor != 0 || pixels > MAX_SIDE {
                let reason = format!("must be a multiple of {factor} for this model, and at most {MAX_SIDE}");
                return Err(Error::option(name, pixels, reason));
            }
        }
        Ok((model.latent_shape().0, self.height / factor, self.width / factor))
    }

    fn check(&self) -> Result<()> {
        if !(0.0..=1000.0).contains(&self.guidance_scale) {
            return Err(Error::option("guidance scale", self.guidance_scale, "must be 0 to 1000; 1 is no guidance"));
        }
        if self.count == 0 {
            return Err(Error::option("count", 0, "at least one picture must be asked for"));
        }
        Ok(())
    }
}

/// Generates the pictures of `request`, one by one, calling `progress` after every step; its error ends the run and is
/// returned, [`Error::Cancelled`] being the usual one.
pub fn generate(
    model: &Model,
    request: &GenerateRequest,
    progress: &mut dyn FnMut(Step) -> Result<()>,
) -> Result<Vec<Picture>> {
    request.check()?;
    let conditioning = request.encode(model, &[request.prompt])?;
    let mut pictures = Vec::new();
    for image in 0..request.count {
        let mut progress = |step: Step| progress(Step { image, images: request.count, ..step });
        pictures.extend(sample(model, request, &conditioning, &[request.seed_of(image)], &mut progress)?);
    }
    Ok(pictures)
}

/// Generates one picture for each (prompt, seed) as one batch, which is faster than one by one; of `request` the prompt,
/// the seed and the count are not used. A picture may differ from the same one made alone by the rounding of f32.
/// `progress` gets the latents of the whole batch, [N, C, H, W].
pub fn generate_batch(
    model: &Model,
    request: &GenerateRequest,
    prompts_and_seeds: &[(&str, u64)],
    progress: &mut dyn FnMut(Step) -> Result<()>,
) -> Result<Vec<Picture>> {
    request.check()?;
    if prompts_and_seeds.is_empty() {
        return Ok(Vec::new());
    }
    let (prompts, seeds): (Vec<&str>, Vec<u64>) = prompts_and_seeds.iter().copied().unzip();
    sample(model, request, &request.encode(model, &prompts)?, &seeds, progress)
}

/// Samples one picture for each seed under `conditioning`: the negative prompts first if guided, then the prompts.
fn sample(
    model: &Model,
    request: &GenerateRequest,
    conditioning: &Conditioning,
    seeds: &[u64],
    progress: &mut dyn FnMut(Step) -> Result<()>,
) -> Result<Vec<Picture>> {
    let (channels, height, width) = request.latent_shape(model)?;
    let shape = (seeds.len(), channels, height, width);
    let size = channels * height * width;
    let start = |seed: &u64| Rng::new(*seed, Stream::Latents, 0, 0).normals(size);
    let mut latents: Vec<f32> = seeds.iter().flat_map(start).collect();
    let guidance_scale = request.guidance_scale;
    let mut denoiser = GuidedUNet { model, guidance_scale, conditioning, seeds, shape, progress };
    // The whole batch in one slice; `Denoiser::shape` says how it is cut.
    request.sampler.sample(&mut denoiser, &mut latents, request.steps)?;
    latents.chunks(size).map(|latents| decode(model, latents, (channels, height, width))).collect()
}

/// The picture of `latents` [C, H, W], scaled as the UNet sees them.
pub fn decode(model: &Model, latents: &[f32], (channels, height, width): (usize, usize, usize)) -> Result<Picture> {
    let latents = Tensor::from_slice(latents, (1, channels, height, width), model.device())?;
    let decoded = model.vae().decode(&(latents / model.vae().scaling_factor())?)?;
    let (_, _, height, width) = decoded.dims4()?;
    Picture::from_chw(&decoded.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?, width, height)
}

/// A UNet under classifier-free guidance (Ho and Salimans, 2022), as samplers see it.
struct GuidedUNet<'a> {
    model: &'a Model,
    guidance_scale: f32,
    conditioning: &'a Conditioning,
    seeds: &'a [u64],
    /// [N, C, H, W].
    shape: (usize, usize, usize, usize),
    progress: &'a mut dyn FnMut(Step) -> Result<()>,
}

impl Denoiser for GuidedUNet<'_> {
    fn schedule(&self) -> &NoiseSchedule {
        self.model.schedule()
    }

    fn shape(&self) -> [usize; 4] {
        let (pictures, channels, height, width) = self.shape;
        [pictures, channels, height, width]
    }

    fn seed(&self) -> u64 {
        self.seeds.first().copied().unwrap_or(0)
    }

    fn predict(&mut self, latents: &[f32], timestep: f32, eps: &mut [f32]) -> Result<()> {
        let guided = self.guidance_scale != 1.0;
        let z = Tensor::from_slice(latents, self.shape, self.model.device())?;
        let z = if guided { Tensor::cat(&[&z, &z], 0)? } else { z };
        let timesteps = vec![timestep; z.dim(0)?];
        let output = self.model.unet().forward(&z, &timesteps, self.conditioning, &Forward::default())?;
        let output = output.flatten_all()?.to_vec1::<f32>()?;
        if guided {
            let (negative, positive) = output.split_at(latents.len());
            for ((eps, negative), positive) in eps.iter_mut().zip(negative).zip(positive) {
                *eps = negative + self.guidance_scale * (positive - negative);
            }
        } else {
            eps.copy_from_slice(&output);
        }
        if self.model.prediction() == Prediction::VPrediction {
            let (alpha, sigma) = self.schedule().alpha_sigma_at(timestep);
            for (eps, z) in eps.iter_mut().zip(latents) {
                *eps = alpha * *eps + sigma * z; // v = alpha eps - sigma z_0
            }
        }
        Ok(())
    }

    fn noise(&mut self, step: usize, out: &mut [f32]) {
        let size = out.len() / self.seeds.len();
        for (out, &seed) in out.chunks_mut(size).zip(self.seeds) {
            Rng::new(seed, Stream::Sampler, step as u32, 0).fill_normal(out);
        }
    }

    fn step_done(&mut self, step: usize, steps: usize, latents: &[f32]) -> Result<()> {
        if let Some(&value) = latents.iter().find(|value| !value.is_finite()) {
            return Err(Error::NotFinite { what: "a latent of the picture".into(), value, step });
        }
        (self.progress)(Step { image: 0, images: self.seeds.len(), step, steps, latents })
    }
}
