//! SDE-DPM-Solver++(2M) (Lu et al., "DPM-Solver++: fast solver for guided sampling of diffusion probabilistic models",
//! 2022).

use blocklora_sdk::sample::{Denoiser, Sampler, multistep_noise_levels};
use blocklora_sdk::{Config, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The paper's second-order multistep solver for the diffusion SDE in the data prediction: exact in the linear part and
/// in the noise. Step for step diffusers' DPMSolverMultistepScheduler (sde-dpmsolver++, midpoint). The
/// last step, to sigma = 0, is of first order and adds no noise. With v-prediction and Karras' levels as close to
/// diffusers as `dpmpp-2m` is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct SdeDpmSolverPlusPlus2M {
    /// Uses Karras' noise levels (rho = 7) instead of those at evenly spaced timesteps.
    pub karras: bool,
}

impl Config for SdeDpmSolverPlusPlus2M {}

impl Sampler for SdeDpmSolverPlusPlus2M {
    fn sample(&self, denoiser: &mut dyn Denoiser, z: &mut [f32], steps: usize) -> Result<()> {
        let levels = multistep_noise_levels(denoiser.schedule(), steps, self.karras)?;
        let zeros = || vec![0.0; z.len()];
        let (mut eps, mut noise, mut x, mut x_before) = (zeros(), zeros(), zeros(), zeros());
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
                    denoiser.noise(step, &mut noise);
                    let (alpha_next, sigma_next) = next.alpha_sigma();
                    let h = (level.sigma / next.sigma).ln() as f32; // lambda_next - lambda, lambda = log(alpha / sigma)
                    let half_over_r = h_before.map_or(0.0, |h_before: f32| h / (2.0 * h_before));
                    let one_minus = -(-2.0 * h).exp_m1(); // 1 - e^(-2h)
                    let kept = sigma_next / sigma * (-h).exp();
                    let (added, fresh) = (alpha_next * one_minus, sigma_next * one_minus.sqrt());
                    for (((z, x), x_before), noise) in z.iter_mut().zip(&x).zip(&x_before).zip(&noise) {
                        let d = x + half_over_r * (x - x_before);
                        *z = kept * *z + added * d + fresh * noise;
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
    sample: SdeDpmSolverPlusPlus2M,
    id: "dpmpp-2m-sde",
    manifest: include_str!("../sample-dpmpp-2m-sde.toml"),
}
