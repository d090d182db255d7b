//! The noise levels that a sampler visits, falling: evenly spaced timesteps, or those of Karras et al. ("Elucidating the
//! design space of diffusion-based generative models", NeurIPS 2022, equation 5).

use super::{NoiseSchedule, TimestepSpacing};
use crate::error::Result;

/// One noise level, and what to tell the model about it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NoiseLevel {
    /// The timestep for [`Denoiser::predict`](super::Denoiser::predict), fractions allowed.
    pub timestep: f32,
    /// Noise-to-signal ratio sigma_t / alpha_t: the sigma of k-diffusion and of EDM.
    pub sigma: f64,
}

impl NoiseLevel {
    /// (alpha, sigma) of the variance-preserving scaling: z = alpha z_0 + sigma eps.
    pub fn alpha_sigma(&self) -> (f32, f32) {
        let alpha = 1.0 / (self.sigma * self.sigma + 1.0).sqrt();
        (alpha as f32, (self.sigma * alpha) as f32)
    }
}

/// The `steps` levels of one-step solvers, before the last one, 0: those of [`NoiseSchedule::timesteps`] (fractional
/// ones with linear spacing), or Karras' between the first and the last of them; as diffusers' EulerDiscreteScheduler
/// and HeunDiscreteScheduler visit them. Fails unless 1 <= steps <= num_train_timesteps.
pub fn noise_levels(schedule: &NoiseSchedule, steps: usize, karras: bool) -> Result<Vec<NoiseLevel>> {
    let timesteps = schedule.timesteps(steps)?;
    let last = schedule.num_train_timesteps() - 1;
    let spaced = |i: usize| match schedule.spacing {
        TimestepSpacing::Linspace if steps > 1 => (steps - 1 - i) as f64 * last as f64 / (steps - 1) as f64,
        _ => timesteps[i] as f64,
    };
    let level = |t: f64| NoiseLevel { timestep: t as f32, sigma: sigma_at(schedule, t) };
    let levels: Vec<NoiseLevel> = (0..steps).map(|i| level(spaced(i))).collect();
    if !karras {
        return Ok(levels);
    }
    let timestep_of = timestep_of_sigma(schedule);
    let sigmas = karras_sigmas(levels[0].sigma, levels[steps - 1].sigma, steps, 7.0);
    Ok(sigmas.into_iter().map(|sigma| NoiseLevel { timestep: timestep_of(sigma) as f32, sigma }).collect())
}

/// The same for multistep solvers: the levels of [`NoiseSchedule::multistep_timesteps`], or Karras' over the whole
/// schedule with the nearest trained timesteps; as diffusers' DPMSolverMultistepScheduler visits them. Fails unless
/// 1 <= steps < num_train_timesteps, and where [`NoiseSchedule::multistep_timesteps`] does.
pub fn multistep_noise_levels(schedule: &NoiseSchedule, steps: usize, karras: bool) -> Result<Vec<NoiseLevel>> {
    if !karras {
        let level = |t: usize| NoiseLevel { timestep: t as f32, sigma: schedule.sigma(t) };
        return Ok(schedule.multistep_timesteps(steps)?.into_iter().map(level).collect());
    }
    schedule.check_steps(steps, schedule.num_train_timesteps() - 1)?;
    let timestep_of = timestep_of_sigma(schedule);
    let sigmas = karras_sigmas(schedule.sigma(schedule.num_train_timesteps() - 1), schedule.sigma(0), steps, 7.0);
    let level = |sigma| NoiseLevel { timestep: timestep_of(sigma).round_ties_even() as f32, sigma };
    Ok(sigmas.into_iter().map(level).collect())
}

/// `steps` noise levels from `sigma_max` down to `sigma_min`, spaced evenly in their `rho`-th root (7 in the paper).
pub fn karras_sigmas(sigma_max: f64, sigma_min: f64, steps: usize, rho: f64) -> Vec<f64> {
    let (max, min) = (sigma_max.powf(1.0 / rho), sigma_min.powf(1.0 / rho));
    (0..steps).map(|i| (max + (min - max) * i as f64 / (steps.max(2) - 1) as f64).powf(rho)).collect()
}

/// The function from a noise level to the timestep, fractions included, that has it, by linear interpolation in the
/// logarithm; clamped to the schedule. What diffusers calls `_sigma_to_t`; some of its schedulers round the result.
pub fn timestep_of_sigma(schedule: &NoiseSchedule) -> impl Fn(f64) -> f64 {
    let last = schedule.num_train_timesteps() - 1;
    let sigmas = (0..=last).map(|t| schedule.sigma(t)).collect::<Vec<_>>();
    move |sigma| {
        let low = sigmas.partition_point(|&s| s <= sigma).clamp(1, last.max(1)) - 1;
        let high = (low + 1).min(last);
        let part = (sigma / sigmas[low]).ln() / (sigmas[high] / sigmas[low]).ln();
        low as f64 + if part.is_finite() { part.clamp(0.0, 1.0) } else { 0.0 }
    }
}

/// Noise-to-signal ratio at a fractional timestep, by linear interpolation (diffusers' `interpolation_type` "linear").
fn sigma_at(schedule: &NoiseSchedule, t: f64) -> f64 {
    let (low, part) = (t.floor() as usize, t - t.floor());
    let sigma = schedule.sigma(low);
    if part == 0.0 { sigma } else { sigma + part * (schedule.sigma(low + 1) - sigma) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn levels_fall_and_their_timesteps_have_them() {
        for spacing in [TimestepSpacing::Leading, TimestepSpacing::Linspace, TimestepSpacing::Trailing] {
            let schedule = NoiseSchedule { spacing, ..NoiseSchedule::scaled_linear(0.00085, 0.012, 1000).unwrap() };
            let timestep_of = timestep_of_sigma(&schedule);
            for (steps, karras) in [(1, false), (1, true), (2, true), (7, false), (20, false), (20, true), (999, false)]
            {
                for levels in [noise_levels, multistep_noise_levels] {
                    let levels = levels(&schedule, steps, karras).unwrap();
                    assert_eq!(levels.len(), steps);
                    assert!(levels.is_sorted_by(|a, b| a.sigma > b.sigma), "{spacing:?} {steps} {karras}");
                    for NoiseLevel { timestep, sigma } in levels {
                        assert!((timestep_of(sigma) - timestep as f64).abs() <= 0.501, "{timestep} {sigma}");
                    }
                }
            }
            assert!(noise_levels(&schedule, 0, true).is_err() && noise_levels(&schedule, 1001, false).is_err());
            // Karras' levels need no timestep of their own.
            let moved = NoiseSchedule { steps_offset: 1, ..schedule.clone() };
            assert!(multistep_noise_levels(&moved, 999, true).is_ok());
            assert!(
                multistep_noise_levels(&moved, 0, true).is_err() && multistep_noise_levels(&moved, 1000, true).is_err()
            );
        }
    }

    #[test]
    fn a_level_has_unit_variance_in_the_variance_preserving_scaling() {
        let (alpha, sigma) = NoiseLevel { timestep: 0.0, sigma: 3.0 }.alpha_sigma();
        assert!((alpha * alpha + sigma * sigma - 1.0).abs() < 1e-6 && (sigma / alpha - 3.0).abs() < 1e-5);
    }
}
