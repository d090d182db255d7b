//! Ancestral sampling with Euler steps (k-diffusion's `sample_euler_ancestral`; Karras et al., NeurIPS 2022, for the
//! variance-exploding form of the ordinary differential equation).

use super::{Denoiser, Sampler};
use crate::error::Result;

/// An Euler step down to less noise than wanted, then fresh noise up to what is wanted; step for step diffusers'
/// EulerAncestralDiscreteScheduler. Works on x = z / alpha = z_0 + sigma eps.
#[derive(Clone, Copy, Debug, Default)]
pub struct EulerAncestral;

impl Sampler for EulerAncestral {
    fn id(&self) -> &'static str {
        "euler-a"
    }

    fn sample(&self, denoiser: &mut dyn Denoiser, z: &mut [f32], steps: usize) -> Result<()> {
        let schedule = denoiser.schedule();
        let timesteps = schedule.timesteps(steps)?;
        let mut sigmas: Vec<f32> = timesteps.iter().map(|&t| schedule.sigma(t) as f32).collect();
        sigmas.push(0.0);
        let scale = |sigma: f32| (sigma * sigma + 1.0).sqrt(); // 1 / alpha
        let mut x: Vec<f32> = z.iter().map(|z| z * scale(sigmas[0])).collect();
        let (mut eps, mut noise) = (vec![0.0; z.len()], vec![0.0; z.len()]);

        for (step, &t) in timesteps.iter().enumerate() {
            let (sigma, sigma_to) = (sigmas[step], sigmas[step + 1]);
            let sigma_up = sigma_to * (1.0 - (sigma_to / sigma).powi(2)).max(0.0).sqrt();
            let sigma_down = (sigma_to * sigma_to - sigma_up * sigma_up).max(0.0).sqrt();

            denoiser.predict(z, t as f32, &mut eps)?; // eps is the derivative dx / dsigma
            denoiser.noise(step, &mut noise);
            for ((x, eps), noise) in x.iter_mut().zip(&eps).zip(&noise) {
                *x += eps * (sigma_down - sigma) + noise * sigma_up;
            }
            for (z, x) in z.iter_mut().zip(&x) {
                *z = x / scale(sigma_to);
            }
            denoiser.step_done(step, steps, z)?;
        }
        Ok(())
    }
}
