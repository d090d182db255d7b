//! A sampler that breaks its contract in the way that BLOCKLORA_HOSTILE names, and is DDIM otherwise.
#![allow(missing_docs)]

use blocklora_sdk::sample::{Denoiser, Sampler};
use blocklora_sdk::{Config, Error, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

include!("hostile/mode.rs");

/// DDIM.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Hostile {}

impl Config for Hostile {}

impl Sampler for Hostile {
    fn sample(&self, denoiser: &mut dyn Denoiser, z: &mut [f32], steps: usize) -> Result<()> {
        misbehave("sample");
        hand_over(denoiser, "sample")?;
        if mode("cancelled") {
            return Err(Error::cancelled());
        }
        let schedule = denoiser.schedule().clone();
        let timesteps = schedule.timesteps(if mode("ignores-steps") { 20 } else { steps })?;
        let mut eps = vec![0.0; z.len()];
        for (step, &t) in timesteps.iter().enumerate() {
            let (alpha, sigma) = schedule.alpha_sigma(t);
            let next = timesteps.get(step + 1).map_or(schedule.final_alpha_sigma(), |&t| schedule.alpha_sigma(t));
            if mode("wrong-shape") {
                denoiser.predict(&z[1..], t as f32, &mut eps)?;
            }
            if mode("wrong-timestep") {
                denoiser.predict(z, -1.0, &mut eps)?;
            }
            if mode("short-noise") {
                denoiser.noise(step, &mut eps[1..]);
            }
            denoiser.predict(z, t as f32, &mut eps)?;
            while mode("never-ends") {
                drop(denoiser.predict(z, t as f32, &mut eps).and_then(|()| denoiser.step_done(step, steps, z)));
            }
            for (z, eps) in z.iter_mut().zip(&eps) {
                *z = next.0 * (*z - sigma * eps) / alpha + next.1 * eps;
            }
            if mode("biased") {
                z.iter_mut().for_each(|z| *z += 0.1);
            }
            if !mode("silent") {
                let answer = denoiser.step_done(step, steps, z);
                if !mode("ignores-cancel") {
                    answer?;
                }
            }
        }
        if mode("nan") {
            z[0] = f32::NAN;
        }
        Ok(())
    }
}

blocklora_sdk::export_plugin! {
    sample: Hostile,
    id: "hostile",
    manifest: include_str!("hostile/sample-hostile.toml"),
}
