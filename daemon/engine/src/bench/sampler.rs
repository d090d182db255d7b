//! What a sampler costs beyond the model's predictions.

use std::time::{Duration, Instant};

use serde::Serialize;

use super::merge::{check_range, median};
use crate::error::Result;
use crate::rng::{Rng, Stream};
use crate::sample::{Denoiser, NoiseSchedule, Sampler};

/// What [`sampler`] measured. Times are medians over runs, in milliseconds per step.
#[derive(Clone, Debug, Serialize)]
pub struct BenchSampler {
    /// The sampler.
    pub sampler: String,
    /// [N, C, H, W] of the latents.
    pub shape: [usize; 4],
    /// Steps of a run.
    pub steps: usize,
    /// Runs.
    pub repeats: usize,
    /// Calls of the denoiser in a step.
    pub predictions_per_step: f64,
    /// A step, all in all.
    pub step_ms: f64,
    /// The denoiser's own part of it.
    pub denoiser_ms: f64,
    /// What the sampler adds: its arithmetic, and the way to the denoiser and back.
    pub added_ms: f64,
}

/// Data of one value, whose noise is known: a denoiser that costs next to nothing, and knows how much.
struct Clocked {
    schedule: NoiseSchedule,
    shape: [usize; 4],
    predictions: usize,
    inside: Duration,
}

impl Clocked {
    fn clock<T>(&mut self, work: impl FnOnce(&mut Self) -> T) -> T {
        let start = Instant::now();
        let result = work(self);
        self.inside += start.elapsed();
        result
    }
}

impl Denoiser for Clocked {
    fn schedule(&self) -> &NoiseSchedule {
        &self.schedule
    }
    fn shape(&self) -> [usize; 4] {
        self.shape
    }
    fn seed(&self) -> u64 {
        1
    }
    fn predict(&mut self, latents: &[f32], timestep: f32, eps: &mut [f32]) -> Result<()> {
        self.predictions += 1;
        self.clock(|this| {
            let (alpha, sigma) = this.schedule.alpha_sigma_at(timestep);
            eps.iter_mut().zip(latents).for_each(|(eps, z)| *eps = (z - 0.5 * alpha) / sigma);
        });
        Ok(())
    }
    fn noise(&mut self, step: usize, out: &mut [f32]) {
        self.clock(|_| normals(step as u32 + 1, out));
    }
    fn step_done(&mut self, _step: usize, _steps: usize, _latents: &[f32]) -> Result<()> {
        Ok(())
    }
}

fn normals(step: u32, out: &mut [f32]) {
    Rng::new(1, Stream::Test, step, 0).fill_normal(out);
}

/// Runs `sampler` for `steps` steps on latents of `shape`, `repeats` times after once to warm up.
pub fn sampler(sampler: &dyn Sampler, shape: [usize; 4], steps: usize, repeats: usize) -> Result<BenchSampler> {
    check_range("repeats", repeats, 10_000)?;
    let schedule = NoiseSchedule { steps_offset: 1, ..NoiseSchedule::scaled_linear(0.00085, 0.012, 1000)? };
    let mut times = [const { Vec::new() }; 3];
    let mut predictions = 0;
    for repeat in 0..=repeats {
        let mut denoiser = Clocked { schedule: schedule.clone(), shape, predictions: 0, inside: Duration::ZERO };
        let mut latents = vec![0.0; shape.iter().product()];
        normals(0, &mut latents);
        let start = Instant::now();
        sampler.sample(&mut denoiser, &mut latents, steps)?;
        let all = start.elapsed();
        predictions = denoiser.predictions;
        if repeat > 0 {
            let turn = [all, denoiser.inside, all.saturating_sub(denoiser.inside)];
            let per_step = turn.map(|time| 1e3 * time.as_secs_f64() / steps as f64);
            times.iter_mut().zip(per_step).for_each(|(times, ms)| times.push(ms));
        }
    }
    let [step_ms, denoiser_ms, added_ms] = times.map(median);
    Ok(BenchSampler {
        sampler: sampler.id().to_owned(),
        shape,
        steps,
        repeats,
        predictions_per_step: predictions as f64 / steps as f64,
        step_ms,
        denoiser_ms,
        added_ms,
    })
}
