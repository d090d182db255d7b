//! Multistep latent consistency sampling (Luo et al., "Latent consistency models: synthesizing high-resolution images
//! with few-step inference", 2023).

use blocklora_sdk::sample::{Denoiser, NoiseSchedule, Sampler};
use blocklora_sdk::{Config, Error, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// sigma_data of the boundary condition f(z, 0) = z, as published.
const SIGMA_DATA: f32 = 0.5;
/// Multiplies the timestep there, as published.
const TIMESTEP_SCALING: f32 = 10.0;

/// Algorithm 3 of the paper: jump to z_0 with the consistency function f = c_skip z + c_out z_0, add noise again, to the
/// next timestep's level. Step for step diffusers' LCMScheduler. For models and adapters that were distilled to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Lcm {
    /// How many evenly spaced timesteps the model was distilled on; steps visits a part of them.
    #[schemars(range(min = 1, max = 1000))]
    pub original_steps: usize,
}

impl Default for Lcm {
    fn default() -> Self {
        Self { original_steps: 50 }
    }
}

impl Config for Lcm {}

impl Sampler for Lcm {
    fn sample(&self, denoiser: &mut dyn Denoiser, z: &mut [f32], steps: usize) -> Result<()> {
        let schedule = denoiser.schedule().clone();
        let timesteps = self.timesteps(&schedule, steps)?;
        let (mut eps, mut noise) = (vec![0.0; z.len()], vec![0.0; z.len()]);

        for (step, &t) in timesteps.iter().enumerate() {
            let (alpha, sigma) = schedule.alpha_sigma(t);
            let scaled = t as f32 * TIMESTEP_SCALING;
            let c_skip = SIGMA_DATA.powi(2) / (scaled.powi(2) + SIGMA_DATA.powi(2));
            let c_out = scaled / (scaled.powi(2) + SIGMA_DATA.powi(2)).sqrt();

            denoiser.predict(z, t as f32, &mut eps)?;
            for (z, eps) in z.iter_mut().zip(&eps) {
                *z = c_skip * *z + c_out * (*z - sigma * eps) / alpha;
            }
            if let Some(&next) = timesteps.get(step + 1) {
                let (alpha, sigma) = schedule.alpha_sigma(next);
                denoiser.noise(step, &mut noise);
                for (z, noise) in z.iter_mut().zip(&noise) {
                    *z = alpha * *z + sigma * noise;
                }
            }
            denoiser.step_done(step, steps, z)?;
        }
        Ok(())
    }
}

impl Lcm {
    /// `steps` of the distilled timesteps, evenly spread from the last one down.
    fn timesteps(&self, schedule: &NoiseSchedule, steps: usize) -> Result<Vec<usize>> {
        let (original, trained) = (self.original_steps, schedule.num_train_timesteps());
        if !(1..=trained).contains(&original) {
            let allowed = format!("must be 1 to {trained}, the timesteps that the model was trained on");
            return Err(Error::config("original_steps", original, allowed));
        }
        if !(1..=original).contains(&steps) {
            return Err(Error::config("steps", steps, format!("must be 1 to {original}, the setting original_steps")));
        }
        // In floating point, as NumPy computes it: where i * original / steps is whole, it may come out below.
        let stride = original as f64 / steps as f64;
        let distilled = |i: usize| (original - (i as f64 * stride) as usize) * (trained / original) - 1;
        Ok((0..steps).map(distilled).collect())
    }
}

blocklora_sdk::export_plugin! {
    sample: Lcm,
    id: "lcm",
    manifest: include_str!("../sample-lcm.toml"),
}
