//! Ancestral sampling with Euler steps (k-diffusion's `sample_euler_ancestral`; Karras et al., NeurIPS 2022, for the
//! variance-exploding form of the ordinary differential equation).

use blocklora_sdk::sample::{Denoiser, Sampler, noise_levels};
use blocklora_sdk::{Config, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// An Euler step down to less noise than wanted, then fresh noise up to what is wanted; step for step diffusers'
/// EulerAncestralDiscreteScheduler. Works on x = z / alpha = z_0 + sigma eps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct EulerAncestral {}

impl Config for EulerAncestral {}

impl Sampler for EulerAncestral {
    fn sample(&self, denoiser: &mut dyn Denoiser, z: &mut [f32], steps: usize) -> Result<()> {
        let levels = noise_levels(denoiser.schedule(), steps, false)?;
        let scale = |sigma: f32| (sigma * sigma + 1.0).sqrt(); // 1 / alpha
        let mut x: Vec<f32> = z.iter().map(|z| z * scale(levels[0].sigma as f32)).collect();
        let (mut eps, mut noise) = (vec![0.0; z.len()], vec![0.0; z.len()]);

        for (step, level) in levels.iter().enumerate() {
            let sigma = level.sigma as f32;
            let sigma_next = levels.get(step + 1).map_or(0.0, |next| next.sigma as f32);
            let sigma_up = sigma_next * (1.0 - (sigma_next / sigma).powi(2)).max(0.0).sqrt();
            let sigma_down = (sigma_next * sigma_next - sigma_up * sigma_up).max(0.0).sqrt();

            denoiser.predict(z, level.timestep, &mut eps)?; // eps is the derivative dx / dsigma
            denoiser.noise(step, &mut noise);
            for ((x, eps), noise) in x.iter_mut().zip(&eps).zip(&noise) {
                *x += eps * (sigma_down - sigma) + noise * sigma_up;
            }
            for (z, x) in z.iter_mut().zip(&x) {
                *z = x / scale(sigma_next);
            }
            denoiser.step_done(step, steps, z)?;
        }
        Ok(())
    }
}

blocklora_sdk::export_plugin! {
    sample: EulerAncestral,
    id: "euler-a",
    manifest: include_str!("../sample-euler-a.toml"),
}
