//! A sampler: Euler steps along the probability-flow ODE.

use blocklora_sdk::sample::{Denoiser, Sampler, noise_levels};
use blocklora_sdk::{Config, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// x = z / alpha moves along dx / dsigma = eps.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct MyMethod {
    /// Uses Karras' noise levels.
    pub karras: bool,
}

impl Config for MyMethod {}

impl Sampler for MyMethod {
    fn sample(&self, denoiser: &mut dyn Denoiser, z: &mut [f32], steps: usize) -> Result<()> {
        let levels = noise_levels(denoiser.schedule(), steps, self.karras)?;
        let mut eps = vec![0.0; z.len()];
        for (step, level) in levels.iter().enumerate() {
            let (alpha, sigma) = level.alpha_sigma();
            let (alpha_next, sigma_next) = levels.get(step + 1).map_or((1.0, 0.0), |next| next.alpha_sigma());
            denoiser.predict(z, level.timestep, &mut eps)?;
            for (z, eps) in z.iter_mut().zip(&eps) {
                *z = alpha_next * (*z / alpha + (sigma_next / alpha_next - sigma / alpha) * eps);
            }
            denoiser.step_done(step, steps, z)?;
        }
        Ok(())
    }
}

blocklora_sdk::export_plugin! {
    sample: MyMethod,
    id: "my-method",
    manifest: include_str!("../sample-my-method.toml"),
}
