//! The noise levels of Karras et al. ("Elucidating the design space of diffusion-based generative models", NeurIPS
//! 2022, equation 5).

use super::NoiseSchedule;

/// The `steps` noise levels sigma / alpha between the schedule's largest and smallest one, falling, spaced evenly in
/// their `rho`-th root (7 in the paper).
pub fn karras_sigmas(schedule: &NoiseSchedule, steps: usize, rho: f64) -> Vec<f64> {
    let root = |t: usize| schedule.sigma(t).powf(1.0 / rho);
    let (max, min) = (root(schedule.num_train_timesteps() - 1), root(0));
    (0..steps).map(|i| (max + (min - max) * i as f64 / (steps.max(2) - 1) as f64).powf(rho)).collect()
}

/// The timestep, fractions included, whose noise level is `sigma`, by linear interpolation in the logarithm; clamped to
/// the schedule. What diffusers calls `_sigma_to_t`; some of its schedulers round the result.
pub fn timestep_of_sigma(schedule: &NoiseSchedule, sigma: f64) -> f64 {
    let last = schedule.num_train_timesteps() - 1;
    let sigmas = (0..=last).map(|t| schedule.sigma(t)).collect::<Vec<_>>();
    let low = sigmas.partition_point(|&s| s <= sigma).clamp(1, last.max(1)) - 1;
    let high = (low + 1).min(last);
    let part = (sigma / sigmas[low]).ln() / (sigmas[high] / sigmas[low]).ln();
    low as f64 + if part.is_finite() { part.clamp(0.0, 1.0) } else { 0.0 }
}
