//! The exact denoiser of Gaussian data, for which the probability-flow ODE has a solution in closed form.

use super::job::{TestJob, delegate_job};
use crate::error::{Error, Result};
use crate::rng::{Rng, Stream};
use crate::sample::{Denoiser, NoiseSchedule};

/// z_0 ~ N(mean, deviation^2) in every number: E[eps | z_t] is linear in z_t, so that predictions are exact.
#[derive(Debug)]
pub struct Gaussian {
    /// The services of its job.
    pub job: TestJob,
    /// The training schedule; Stable Diffusion's by default.
    pub schedule: NoiseSchedule,
    /// [N, C, H, W].
    pub shape: [usize; 4],
    /// Mean of each number of z_0.
    pub mean: Vec<f64>,
    /// Standard deviation of each.
    pub deviation: Vec<f64>,
    /// The noise of each index; beyond it comes from the seed.
    pub noise: Vec<Vec<f32>>,
    /// The latents after each step.
    pub latents: Vec<Vec<f32>>,
    /// How many predictions were asked for.
    pub predictions: usize,
    /// The timestep of each.
    pub timesteps: Vec<f32>,
    /// Which prediction (from 0) is NaN, if any.
    pub nan_at: Option<usize>,
    /// After which step (from 0) the caller cancels.
    pub cancel_after: Option<usize>,
}

delegate_job!(Gaussian);

impl Gaussian {
    /// Data with these means and deviations, as one row of pixels.
    pub fn new(mean: Vec<f64>, deviation: Vec<f64>) -> Result<Self> {
        let schedule = NoiseSchedule {
            steps_offset: 1,
            set_alpha_to_one: false,
            ..NoiseSchedule::scaled_linear(0.00085, 0.012, 1000)?
        };
        Ok(Self {
            job: TestJob::new(0),
            schedule,
            shape: [1, 1, 1, mean.len()],
            mean,
            deviation,
            noise: Vec::new(),
            latents: Vec::new(),
            predictions: 0,
            timesteps: Vec::new(),
            nan_at: None,
            cancel_after: None,
        })
    }

    /// Where the ODE takes `start` (at the last timestep of the schedule): the quantile of z_0 that the start is of z_T.
    pub fn solution(&self, start: &[f32]) -> Vec<f64> {
        let (alpha, sigma) = self.schedule.alpha_sigma(self.schedule.num_train_timesteps() - 1);
        let (alpha, sigma) = (alpha as f64, sigma as f64);
        let solve = |((&z, mean), deviation): ((&f32, &f64), &f64)| {
            let deviation_t = (alpha * alpha * deviation * deviation + sigma * sigma).sqrt();
            mean + deviation * (z as f64 - alpha * mean) / deviation_t
        };
        start.iter().zip(&self.mean).zip(&self.deviation).map(solve).collect()
    }
}

impl Denoiser for Gaussian {
    fn schedule(&self) -> &NoiseSchedule {
        &self.schedule
    }
    fn shape(&self) -> [usize; 4] {
        self.shape
    }
    fn predict(&mut self, latents: &[f32], timestep: f32, eps: &mut [f32]) -> Result<()> {
        self.predictions += 1;
        self.timesteps.push(timestep);
        let (alpha, sigma) = alpha_sigma(&self.schedule, timestep);
        let data = self.mean.iter().zip(&self.deviation);
        for ((eps, z), (mean, deviation)) in eps.iter_mut().zip(latents).zip(data) {
            let variance = alpha * alpha * deviation * deviation + sigma * sigma;
            *eps = (sigma * (*z as f64 - alpha * mean) / variance) as f32;
        }
        if self.nan_at == Some(self.predictions - 1) {
            eps.fill(f32::NAN);
        }
        Ok(())
    }
    fn noise(&mut self, index: usize, out: &mut [f32]) {
        match self.noise.get(index) {
            Some(noise) => out.copy_from_slice(noise),
            None => Rng::new(self.job.seed, Stream::Sampler, index as u32, 0).fill_normal(out),
        }
    }
    fn step_done(&mut self, step: usize, steps: usize, latents: &[f32]) -> Result<()> {
        if step != self.latents.len() {
            return Err(Error::contract(format!("step {step} was reported after step {}", self.latents.len())));
        }
        if let Some(&value) = latents.iter().find(|value| !value.is_finite()) {
            return Err(Error::not_finite("a latent", value, step));
        }
        crate::job::Job::progress(self, step as u64 + 1, steps as u64);
        self.latents.push(latents.to_vec());
        if self.cancel_after == Some(step) { Err(Error::cancelled()) } else { Ok(()) }
    }
}

/// In f64 at whole timesteps, so that nothing but the sampler rounds.
fn alpha_sigma(schedule: &NoiseSchedule, timestep: f32) -> (f64, f64) {
    if timestep.fract() == 0.0
        && let Some(&alpha_cumprod) = schedule.alphas_cumprod.get(timestep as usize)
    {
        return ((alpha_cumprod as f64).sqrt(), (1.0 - alpha_cumprod as f64).sqrt());
    }
    let (alpha, sigma) = schedule.alpha_sigma_at(timestep);
    (alpha as f64, sigma as f64)
}
