//! DDIM (Song et al., "Denoising diffusion implicit models", ICLR 2021).

use blocklora_sdk::sample::{Denoiser, Sampler};
use blocklora_sdk::{Config, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Equation 12 of the paper; step for step diffusers' DDIMScheduler.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Ddim {
    /// Scales the noise that each step adds (equation 16): 0 is deterministic DDIM, 1 is DDPM.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub eta: f32,
}

impl Config for Ddim {}

impl Sampler for Ddim {
    fn sample(&self, denoiser: &mut dyn Denoiser, z: &mut [f32], steps: usize) -> Result<()> {
        let schedule = denoiser.schedule().clone();
        let timesteps = schedule.timesteps(steps)?;
        let stride = schedule.num_train_timesteps() / steps;
        let (mut eps, mut noise) = (vec![0.0; z.len()], vec![0.0; z.len()]);

        for (step, &t) in timesteps.iter().enumerate() {
            let (alpha, sigma) = schedule.alpha_sigma(t);
            let (alpha_prev, sigma_prev) = match t.checked_sub(stride) {
                Some(prev) => schedule.alpha_sigma(prev),
                None => schedule.final_alpha_sigma(),
            };
            let std_dev = self.eta * (sigma_prev / sigma) * (1.0 - (alpha / alpha_prev).powi(2)).max(0.0).sqrt();
            let direction = (sigma_prev * sigma_prev - std_dev * std_dev).max(0.0).sqrt();

            denoiser.predict(z, t as f32, &mut eps)?;
            if std_dev > 0.0 {
                denoiser.noise(step, &mut noise);
            }
            for ((z, eps), noise) in z.iter_mut().zip(&eps).zip(&noise) {
                let z_0 = (*z - sigma * eps) / alpha;
                *z = alpha_prev * z_0 + direction * eps + std_dev * noise;
            }
            denoiser.step_done(step, steps, z)?;
        }
        Ok(())
    }
}

blocklora_sdk::export_plugin! {
    sample: Ddim,
    id: "ddim",
    manifest: include_str!("../sample-ddim.toml"),
}
