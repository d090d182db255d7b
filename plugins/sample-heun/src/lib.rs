//! Heun's method on the probability-flow ODE (Karras et al., "Elucidating the design space of diffusion-based
//! generative models", NeurIPS 2022).

use blocklora_sdk::sample::{Denoiser, Sampler, noise_levels};
use blocklora_sdk::{Config, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Algorithm 1 of the paper: an Euler step along dx / dsigma = eps with x = z / alpha = z_0 + sigma eps, taken again
/// with the mean of the derivatives at both of its ends; the last step, to sigma = 0, has one end only. Step for step
/// diffusers' HeunDiscreteScheduler, from x = z sqrt(sigma^2 + 1), the variance that training had, with every spacing. Makes
/// 2 steps - 1 predictions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Heun {
    /// Uses Karras' noise levels (equation 5, rho = 7) between the first and the last of the evenly spaced timesteps.
    pub karras: bool,
}

impl Config for Heun {}

impl Sampler for Heun {
    fn sample(&self, denoiser: &mut dyn Denoiser, z: &mut [f32], steps: usize) -> Result<()> {
        let levels = noise_levels(denoiser.schedule(), steps, self.karras)?;
        let scale = |sigma: f32| (sigma * sigma + 1.0).sqrt(); // 1 / alpha
        let mut x: Vec<f32> = z.iter().map(|z| z * scale(levels[0].sigma as f32)).collect();
        let (mut d, mut d_next) = (vec![0.0; z.len()], vec![0.0; z.len()]);

        for (step, level) in levels.iter().enumerate() {
            let next = levels.get(step + 1);
            let sigma_next = next.map_or(0.0, |next| next.sigma as f32);
            let h = sigma_next - level.sigma as f32;

            denoiser.predict(z, level.timestep, &mut d)?;
            for ((z, x), d) in z.iter_mut().zip(&x).zip(&d) {
                *z = (x + h * d) / scale(sigma_next);
            }
            if let Some(next) = next {
                denoiser.predict(z, next.timestep, &mut d_next)?;
                for (d, d_next) in d.iter_mut().zip(&d_next) {
                    *d = (*d + d_next) / 2.0;
                }
            }
            for ((z, x), d) in z.iter_mut().zip(&mut x).zip(&d) {
                *x += h * d;
                *z = *x / scale(sigma_next);
            }
            denoiser.step_done(step, steps, z)?;
        }
        Ok(())
    }
}

blocklora_sdk::export_plugin! {
    sample: Heun,
    id: "heun",
    manifest: include_str!("../sample-heun.toml"),
}
