//! DPM-Solver++(2M) (Lu et al., "DPM-Solver++: fast solver for guided sampling of diffusion probabilistic models",
//! 2022, algorithm 2), and the noise levels of Karras et al. ("Elucidating the design space of diffusion-based
//! generative models", NeurIPS 2022, equation 5).

use super::{Denoiser, NoiseSchedule, Sampler};
use crate::error::Result;

/// The second-order multistep solver in the data prediction; step for step diffusers' DPMSolverMultistepScheduler
/// (dpmsolver++, midpoint, lower order in the last step). A last noise level of 0 makes that last step first order.
#[derive(Clone, Copy, Debug, Default)]
pub struct DpmSolverPlusPlus2M {
    /// Uses Karras' noise levels (rho = 7) instead of those at evenly spaced timesteps.
    pub karras: bool,
}

impl Sampler for DpmSolverPlusPlus2M {
    fn id(&self) -> &'static str {
        if self.karras { "dpmpp-2m-karras" } else { "dpmpp-2m" }
    }

    fn sample(&self, denoiser: &mut dyn Denoiser, z: &mut [f32], steps: usize) -> Result<()> {
        let levels = self.noise_levels(denoiser.schedule(), steps)?;
        let (mut eps, mut x, mut x_before) = (vec![0.0; z.len()], vec![0.0; z.len()], vec![0.0; z.len()]);
        let mut h_before = None;

        for (step, &(t, level)) in levels.iter().enumerate() {
            let (alpha, sigma) = alpha_sigma(level);
            denoiser.predict(z, t, &mut eps)?;
            std::mem::swap(&mut x, &mut x_before);
            for ((x, z), eps) in x.iter_mut().zip(z.iter()).zip(&eps) {
                *x = (z - sigma * eps) / alpha; // the data prediction x_theta(z_t, t)
            }
            match levels.get(step + 1) {
                None => z.copy_from_slice(&x), // h is infinite: z_0 = x_theta
                Some(&(_, level_next)) => {
                    let (alpha_next, sigma_next) = alpha_sigma(level_next);
                    let h = (level / level_next).ln() as f32; // lambda_next - lambda, lambda = log(alpha / sigma)
                    let half_over_r = h_before.map_or(0.0, |h_before: f32| h / (2.0 * h_before));
                    for ((z, x), x_before) in z.iter_mut().zip(&x).zip(&x_before) {
                        let d = x + half_over_r * (x - x_before);
                        *z = sigma_next / sigma * *z - alpha_next * (-h).exp_m1() * d;
                    }
                    h_before = Some(h);
                }
            }
            denoiser.step_done(step, steps, z)?;
        }
        Ok(())
    }
}

impl DpmSolverPlusPlus2M {
    /// (timestep, sigma / alpha) of each step, falling.
    fn noise_levels(&self, schedule: &NoiseSchedule, steps: usize) -> Result<Vec<(f32, f64)>> {
        let timesteps = schedule.multistep_timesteps(steps)?;
        if !self.karras {
            return Ok(timesteps.iter().map(|&t| (t as f32, schedule.sigma(t))).collect());
        }
        let root = |t: usize| schedule.sigma(t).powf(1.0 / 7.0);
        let (max, min) = (root(schedule.num_train_timesteps() - 1), root(0));
        let level = |i: usize| (max + (min - max) * i as f64 / (steps - 1).max(1) as f64).powi(7);
        Ok((0..steps).map(|i| (timestep_of(schedule, level(i)), level(i))).collect())
    }
}

/// The timestep whose noise level is nearest to `level` in its logarithm, rounded to a trained one.
fn timestep_of(schedule: &NoiseSchedule, level: f64) -> f32 {
    let last = schedule.num_train_timesteps() - 1;
    let sigmas = (0..=last).map(|t| schedule.sigma(t)).collect::<Vec<_>>();
    let low = sigmas.partition_point(|&sigma| sigma <= level).clamp(1, last.max(1)) - 1;
    let high = (low + 1).min(last);
    let part = (level / sigmas[low]).ln() / (sigmas[high] / sigmas[low]).ln();
    (low as f64 + if part.is_finite() { part.clamp(0.0, 1.0) } else { 0.0 }).round_ties_even() as f32
}

fn alpha_sigma(level: f64) -> (f32, f32) {
    let alpha = 1.0 / (level * level + 1.0).sqrt();
    (alpha as f32, (level * alpha) as f32)
}
