//! Drawing many pictures with one merged model, several at a time.

use std::path::Path;
use std::sync::Arc;

use blocklora_engine::Error;
use blocklora_engine::generate::{GenerateRequest, Step, generate_batch};
use blocklora_engine::image::Picture;
use blocklora_engine::model::{Defaults, Model};
use blocklora_engine::sample::Sampler;
use blocklora_engine::text::Concept;
use indicatif::ProgressBar;
use rayon::prelude::*;

use crate::args::SamplingArgs;
use crate::session::Session;
use crate::{interrupt, methods};

/// How pictures are drawn.
pub struct Settings {
    /// Sampling steps.
    pub steps: usize,
    guidance_scale: f32,
    sampler: Arc<dyn Sampler>,
    width: usize,
    height: usize,
}

/// One picture to draw.
#[derive(Clone, Debug)]
pub struct Job {
    /// The prompt; `<name>` stands for a concept.
    pub prompt: String,
    /// What to steer away from.
    pub negative: String,
    /// Its seed.
    pub seed: u64,
}

/// `images` pictures for each of `prompts`, with the seeds `seed`, `seed` + 1, ... for every prompt.
pub fn jobs(prompts: impl IntoIterator<Item = String>, images: u16, seed: u64) -> Vec<Job> {
    let of_prompt = |prompt: String| {
        let job = move |i: u16| Job {
            prompt: prompt.clone(),
            negative: String::new(),
            seed: seed.wrapping_add(u64::from(i)),
        };
        (0..images).map(job)
    };
    prompts.into_iter().flat_map(of_prompt).collect()
}

/// The guidance that `args` ask for, or the model folder's own.
pub fn guidance(args: &SamplingArgs, model: &Path) -> anyhow::Result<f32> {
    Ok(args.guidance.map_or_else(|| Defaults::of(model).map(|defaults| defaults.guidance_scale), Ok)?)
}

impl Settings {
    /// The settings that `args` ask for; size and guidance are the model's own if none is given.
    pub fn new(args: &SamplingArgs, model: &Model) -> anyhow::Result<Self> {
        let (_, height, width) = model.latent_shape();
        let factor = model.vae().downscale();
        let (width, height) =
            args.size.map_or((width * factor, height * factor), |s| (s.width as usize, s.height as usize));
        Ok(Self {
            steps: usize::from(args.steps),
            guidance_scale: guidance(args, model.dir())?,
            sampler: methods::sampler(&args.sampler)?,
            width,
            height,
        })
    }

    /// The request for `job`.
    pub fn request<'a>(&'a self, job: &'a Job, concepts: &'a [Concept]) -> GenerateRequest<'a> {
        GenerateRequest {
            prompt: &job.prompt,
            negative_prompt: &job.negative,
            concepts,
            steps: self.steps,
            guidance_scale: self.guidance_scale,
            sampler: self.sampler.as_ref(),
            seed: job.seed,
            width: self.width,
            height: self.height,
            count: 1,
        }
    }
}

/// Draws `jobs` with what is merged now, in their order, `batch` at a time on each thread; a picture of a larger batch
/// may differ from the same one drawn alone by rounding. All jobs of a call have one negative prompt. `bar` counts
/// steps, `settings.steps` for each picture.
pub fn draw(
    session: &Session,
    jobs: &[Job],
    settings: &Settings,
    batch: usize,
    bar: &ProgressBar,
) -> anyhow::Result<Vec<Picture>> {
    let draw_some = |jobs: &[Job]| -> blocklora_engine::Result<Vec<Picture>> {
        let Some(first) = jobs.first() else { return Ok(Vec::new()) };
        let prompts_and_seeds: Vec<(&str, u64)> = jobs.iter().map(|j| (j.prompt.as_str(), j.seed)).collect();
        let mut step_done = |_: Step| {
            bar.inc(jobs.len() as u64);
            interrupt::check()
        };
        let request = settings.request(first, &session.concepts);
        generate_batch(&session.model, &request, &prompts_and_seeds, &mut step_done)
    };
    // Few pictures are shared out among the threads rather than left to one.
    let batch = batch.min(jobs.len().div_ceil(rayon::current_num_threads())).max(1);
    let pictures = jobs.par_chunks(batch).map(draw_some).collect::<Result<Vec<_>, _>>();
    pictures.map(|p| p.into_iter().flatten().collect()).map_err(|e| match e {
        Error::NotFinite { .. } => anyhow::Error::new(e).context("lower the concepts' weights or --guidance"),
        e => e.into(),
    })
}

impl Settings {
    /// How many pictures to draw at a time where many are wanted: small ones leave the processor idle one by one.
    pub fn batch(&self) -> usize {
        (64 * 64 / (self.width * self.height).max(1)).clamp(1, 4) * 2
    }
}
