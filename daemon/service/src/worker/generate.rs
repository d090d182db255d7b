//! Drawing: the set is merged, the picture sampled step by step, and handed over in sealed memory.

use std::sync::Arc;
use std::time::Instant;

use blocklora_engine::Error as EngineError;
use blocklora_engine::generate::{GenerateRequest, Step, decode, generate};
use blocklora_engine::image::{AdapterUse, Filter, GenerationParameters, MergeUse, Picture};
use blocklora_engine::model::Model;
use zbus::Variant;

use super::{Outcome, Restore, Worker, result_file, usec_of, usec_since};
use crate::dbus::value::{Dict, dict, own};
use crate::error::{Error, Kind, Result};
use crate::jobs::Job;
use crate::jobs::previews::Frame;
use crate::jobs::work::Generate;

impl Worker {
    /// Draws the pictures of a job. Each is made as if it were alone: what runs in between is put back, bit for bit.
    pub(super) fn generate(&mut self, job: &Arc<Job>, work: &Generate) -> Outcome {
        let start = Instant::now();
        job.set_stage("loading-adapters");
        let (model, concepts) = self.residents.model(&work.model, &work.set)?;
        job.set_stage("merging");
        let merged = self.residents.apply(&work.model, &work.set)?;
        let sampler = self.daemon.methods.sampler(&work.sampler, &work.sampler_config)?;
        let (_, latent_height, latent_width) = model.latent_shape();
        let multiple = model.vae().downscale();
        let width = work.width.unwrap_or(latent_width * multiple);
        let height = work.height.unwrap_or(latent_height * multiple);
        self.check_pixels(width, height, work.count)?;
        self.daemon.reserve_files(job, work.count * (usize::from(work.raw) + usize::from(work.png)))?;
        let adapters: Vec<AdapterUse> = work
            .set
            .entries
            .iter()
            .map(|entry| AdapterUse { name: entry.name.clone(), digest: entry.digest.clone(), weight: entry.weight })
            .collect();

        let set = &work.set;
        // Always: which strategy is the usual one is configured, and the picture outlives the configuration.
        let merge = (!set.entries.is_empty())
            .then(|| MergeUse { strategy: set.strategy.clone(), config: set.strategy_config.clone() });
        let mut files = Vec::new();
        let mut seeds = Vec::new();
        for image in 0..work.count {
            let request = GenerateRequest {
                prompt: &work.prompt,
                negative_prompt: &work.negative_prompt,
                concepts: &concepts,
                steps: work.steps,
                guidance_scale: work.guidance_scale,
                sampler: sampler.as_ref(),
                seed: work.seed.wrapping_add(image as u64),
                width,
                height,
                count: 1,
            };
            if image == 0 {
                job.set_stage("encoding");
            }
            let picture = self.draw(job, work, &model, &request, image)?;
            let parameters = GenerationParameters {
                merge: merge.clone(),
                // As it was asked for: another name of a sampler stands for settings.
                sampler: work.sampler.clone(),
                sampler_config: work.sampler_config.clone(),
                ..request.parameters(&model, 0, &adapters)
            };
            let text = parameters.to_text();
            let seed = request.seed;
            seeds.push(seed);
            let common = || common(&picture, image, seed, &text);
            if work.raw {
                let pixels = picture.pixels();
                let mut info = common();
                info.extend(dict([
                    ("media_type", own("image/x-raw-rgb")),
                    ("format", own("rgb8")),
                    ("stride", own(3 * picture.width() as u32)),
                ]));
                files.push(result_file("raw", "picture.rgb", pixels, info)?);
            }
            if work.png {
                let png = picture.to_png(Some(&parameters))?;
                let mut info = common();
                info.insert("media_type".to_owned(), own("image/png"));
                files.push(result_file("png", "picture.png", &png, info)?);
            }
        }
        let used: Vec<Dict> = adapters
            .iter()
            .map(|a| {
                dict([
                    ("name", own(a.name.clone())),
                    ("digest", own(a.digest.clone())),
                    ("weight", own(f64::from(a.weight))),
                ])
            })
            .collect();
        let details = dict([
            ("images", own(work.count as u32)),
            ("seeds", own(Variant::from(seeds))),
            ("merge_usec", own(usec_of(&merged))),
            ("usec", own(usec_since(start))),
            ("model_digest", own(model.digest().to_owned())),
            ("adapters", own(Variant::from(used))),
        ]);
        Ok((details, files))
    }

    /// What the request could not know before the model was loaded.
    fn check_pixels(&self, width: usize, height: usize, count: usize) -> Result<()> {
        let config = self.daemon.config();
        let pixels = (width as u64).saturating_mul(height as u64);
        let most = config.limits.picture_pixels_max;
        if pixels > most {
            let message = format!("{width} x {height} pixels are more than limits.picture_pixels_max = {most}");
            return Err(Error::new(Kind::NotSupported, message));
        }
        let bytes = pixels.saturating_mul(6).saturating_mul(count as u64);
        if bytes > config.jobs.results_keep_bytes {
            let most = config.jobs.results_keep_bytes;
            let message =
                format!("{count} pictures take {bytes} bytes, jobs.results_keep_bytes is {most}; ask for fewer");
            return Err(Error::new(Kind::NotSupported, message));
        }
        Ok(())
    }

    fn draw(
        &mut self,
        job: &Arc<Job>,
        work: &Generate,
        model: &Model,
        request: &GenerateRequest,
        image: usize,
    ) -> Result<Picture> {
        let multiple = model.vae().downscale();
        let shape = (model.latent_shape().0, request.height / multiple, request.width / multiple);
        let restore = Restore { model: &work.model, set: &work.set };
        let mut failure = None;
        let mut progress = |step: Step| {
            let done = image * step.steps + step.step + 1;
            let last = step.step + 1 == step.steps;
            job.set_stage(if last { "decoding" } else { "sampling" });
            job.set_step(done as u32, (work.count * step.steps) as u32, None);
            if let Some(side) = job.previews.due().filter(|_| !last) {
                preview(job, model, &step, image, shape, side)?;
            }
            self.pause(job, &restore).map_err(|error| {
                failure = Some(error);
                EngineError::Cancelled
            })
        };
        let pictures = generate(model, request, &mut progress);
        match (pictures, failure) {
            (_, Some(error)) => Err(error),
            (Err(error), None) => Err(named(error)),
            (Ok(pictures), None) => {
                pictures.into_iter().next().ok_or_else(|| Error::failed("the engine gave no picture"))
            }
        }
    }
}

/// The engine's error with what to do about it.
fn named(error: EngineError) -> Error {
    let advice = match error {
        EngineError::NotFinite { .. } => "; lower the concepts' weights or guidance_scale",
        _ => "",
    };
    let error = Error::from(error);
    Error { message: error.message + advice, ..error }
}

fn common(picture: &Picture, index: usize, seed: u64, parameters: &str) -> Dict {
    dict([
        ("width", own(picture.width() as u32)),
        ("height", own(picture.height() as u32)),
        ("index", own(index as u32)),
        ("seed", own(seed)),
        ("parameters", own(parameters.to_owned())),
    ])
}

/// Decodes the latents of a step for those who watch.
fn preview(
    job: &Job,
    model: &Model,
    step: &Step,
    image: usize,
    shape: (usize, usize, usize),
    side: u32,
) -> blocklora_engine::Result<()> {
    let picture = decode(model, step.latents, shape)?;
    let longest = picture.width().max(picture.height());
    let picture = if longest > side as usize {
        let scaled = |length: usize| (length * side as usize / longest).max(1);
        picture.resized(scaled(picture.width()), scaled(picture.height()), Filter::Bicubic)?
    } else {
        picture
    };
    let frame = Frame { index: image as u32, step: step.step as u32 + 1, steps: step.steps as u32 };
    job.previews.show(frame, picture.width() as u32, picture.height() as u32, &picture.to_png(None)?);
    Ok(())
}
