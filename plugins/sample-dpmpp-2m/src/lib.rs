//! DPM-Solver++(2M) (Lu et al., "DPM-Solver++: fast solver for guided sampling of diffusion probabilistic models",
//! 2022).

use blocklora_sdk::sample::{Denoiser, Sampler, multistep_noise_levels};
use blocklora_sdk::{Config, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Algorithm 2 of the paper: the second-order multistep solver in the data prediction; step for step diffusers'
/// DPMSolverMultistepScheduler (dpmsolver++, midpoint). The last step, to sigma = 0, is of first order. A model that
/// predicts v is asked at the trained timestep that is nearest to one of Karras' levels, and its noise is made from v there:
/// up to 1e-3 apart from diffusers, which takes the level itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DpmSolverPlusPlus2M {
    /// Uses Karras' noise levels (rho = 7) instead of those at evenly spaced timesteps.
    pub karras: bool,
}

impl Config for DpmSolverPlusPlus2M {}

impl Sampler for DpmSolverPlusPlus2M {
    fn sample(&self, denoiser: &mut dyn Denoiser, z: &mut [f32], steps: usize) -> Result<()> {
        let levels = multistep_noise_levels(denoiser.schedule(), steps, self.karras)?;
        let (mut eps, mut x, mut x_before) = (vec![0.0; z.len()], vec![0.0; z.len()], vec![0.0; z.len()]);
        let mut h_before = None;

        for (step, level) in levels.iter().enumerate() {
            let (alpha, sigma) = level.alpha_sigma();
            denoiser.predict(z, level.timestep, &mut eps)?;
            std::mem::swap(&mut x, &mut x_before);
            for ((x, z), eps) in x.iter_mut().zip(z.iter()).zip(&eps) {
                *x = (z - sigma * eps) / alpha; // the data prediction x_theta(z_t, t)
            }
            match levels.get(step + 1) {
                None => z.copy_from_slice(&x), // h is infinite: z_0 = x_theta
                Some(next) => {
                    let (alpha_next, sigma_next) = next.alpha_sigma();
                    let h = (level.sigma / next.sigma).ln() as f32; // lambda_next - lambda, lambda = log(alpha / sigma)
                    let half_over_r = h_before.map_or(0.0, |h_before: f32| h / (2.0 * h_before));
                    let (kept, added) = (sigma_next / sigma, -alpha_next * (-h).exp_m1()); // added: alpha (1 - e^-h)
                    for ((z, x), x_before) in z.iter_mut().zip(&x).zip(&x_before) {
                        let d = x + half_over_r * (x - x_before);
                        *z = kept * *z + added * d;
                    }
                    h_before = Some(h);
                }
            }
            denoiser.step_done(step, steps, z)?;
        }
        Ok(())
    }
}

blocklora_sdk::export_plugin! {
    sample: DpmSolverPlusPlus2M,
    id: "dpmpp-2m",
    manifest: include_str!("../sample-dpmpp-2m.toml"),
}
