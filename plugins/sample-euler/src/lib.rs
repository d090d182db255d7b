//! Euler's method on the probability-flow ODE (Karras et al., "Elucidating the design space of diffusion-based
//! generative models", NeurIPS 2022).

use blocklora_sdk::sample::{Denoiser, Sampler, noise_levels};
use blocklora_sdk::{Config, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Algorithm 1 of the paper without its correction (k-diffusion's `sample_euler` without churn): a step along
/// dx / dsigma = eps with x = z / alpha = z_0 + sigma eps. Step for step diffusers' EulerDiscreteScheduler, from
/// x = z sqrt(sigma^2 + 1), the variance that training had, with every spacing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Euler {
    /// Uses Karras' noise levels (equation 5, rho = 7) between the first and the last of the evenly spaced timesteps.
    pub karras: bool,
}

impl Config for Euler {}

impl Sampler for Euler {
    fn sample(&self, denoiser: &mut dyn Denoiser, z: &mut [f32], steps: usize) -> Result<()> {
        let levels = noise_levels(denoiser.schedule(), steps, self.karras)?;
        let scale = |sigma: f32| (sigma * sigma + 1.0).sqrt(); // 1 / alpha
        let mut x: Vec<f32> = z.iter().map(|z| z * scale(levels[0].sigma as f32)).collect();
        let mut eps = vec![0.0; z.len()];

        for (step, level) in levels.iter().enumerate() {
            let sigma = level.sigma as f32;
            let sigma_next = levels.get(step + 1).map_or(0.0, |next| next.sigma as f32);

            denoiser.predict(z, level.timestep, &mut eps)?;
            for (x, eps) in x.iter_mut().zip(&eps) {
                *x += eps * (sigma_next - sigma);
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
    sample: Euler,
    id: "euler",
    manifest: include_str!("../sample-euler.toml"),
}
