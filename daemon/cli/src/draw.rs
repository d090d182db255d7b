//! Drawing many pictures with one merged model, several at a time.

use blocklora_engine::Error;
use blocklora_engine::generate::{GenerateRequest, generate};
use blocklora_engine::image::Picture;
use blocklora_engine::model::Model;
use blocklora_engine::sample::{self, Sampler};
use blocklora_engine::text::Concept;
use indicatif::ProgressBar;
use rayon::prelude::*;

use crate::args::SamplingArgs;
use crate::interrupt;
use crate::session::Session;

/// How pictures are drawn.
pub struct Settings {
    /// Sampling steps.
    pub steps: usize,
    guidance_scale: f32,
    sampler: Box<dyn Sampler>,
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

impl Settings {
    /// The settings that `args` ask for; the size is the model's own if none is given.
    pub fn new(args: &SamplingArgs, model: &Model) -> anyhow::Result<Self> {
        let (_, height, width) = model.latent_shape();
        let factor = model.vae().downscale();
        let (width, height) = args.size.map_or((width * factor, height * factor), |s| (s.width, s.height));
        Ok(Self {
            steps: usize::from(args.steps),
            guidance_scale: args.guidance,
            sampler: sample::by_id(&args.sampler)?,
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

/// Draws `jobs` with what is merged now, in their order. `bar` counts steps, `settings.steps` for each picture.
pub fn draw(session: &Session, jobs: &[Job], settings: &Settings, bar: &ProgressBar) -> anyhow::Result<Vec<Picture>> {
    let one = |job: &Job| -> blocklora_engine::Result<Picture> {
        let mut step_done = |_: blocklora_engine::generate::Step| {
            bar.inc(1);
            interrupt::check()
        };
        let mut pictures = generate(&session.model, &settings.request(job, &session.concepts), &mut step_done)?;
        // Asked for one, and `generate` gives as many as it was asked for.
        pictures.pop().ok_or(Error::Cancelled)
    };
    let pictures = jobs.par_iter().map(one).collect::<Result<Vec<_>, _>>();
    bar.finish_and_clear();
    pictures.map_err(|e| match e {
        Error::NotFinite { .. } => anyhow::Error::new(e).context("lower the concepts' weights or --guidance"),
        e => e.into(),
    })
}
