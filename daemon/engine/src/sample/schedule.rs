//! The training noise schedule.

use crate::error::{Error, Result};

/// How inference timesteps are spread over the training ones (`timestep_spacing`; Lin et al., "Common diffusion noise
/// schedules and sample steps are flawed", 2024, table 2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimestepSpacing {
    /// Multiples of a whole stride, counted up from 0; what Stable Diffusion's schedulers use.
    Leading,
    /// Evenly from the last timestep down to 0, both included.
    Linspace,
    /// Multiples of a stride, counted down from the last timestep.
    Trailing,
}

/// The training noise schedule: z_t = sqrt(alphas_cumprod\[t\]) z_0 + sqrt(1 - alphas_cumprod\[t\]) eps.
#[derive(Clone, Debug, PartialEq)]
pub struct NoiseSchedule {
    /// Product of (1 - beta) up to and including t, for t in 0..num_train_timesteps.
    pub alphas_cumprod: Vec<f32>,
    /// Added to every inference timestep (`steps_offset` of the scheduler config).
    pub steps_offset: usize,
    /// Whether the step after the last one uses alpha_cumprod = 1 (`set_alpha_to_one`), else alphas_cumprod\[0\].
    pub set_alpha_to_one: bool,
    /// `timestep_spacing` of the scheduler config; none: each sampler's own.
    pub spacing: Option<TimestepSpacing>,
}

impl NoiseSchedule {
    /// The schedule of the per-step variances `betas`, each in 0..1 and at least one; offset 0, `set_alpha_to_one`.
    pub fn from_betas(betas: &[f64]) -> Result<Self> {
        if betas.is_empty() {
            return Err(Error::option("betas", "[]", "a schedule needs at least one timestep"));
        }
        if let Some(t) = betas.iter().position(|beta| !(0.0..1.0).contains(beta)) {
            return Err(Error::option(format!("betas[{t}]"), betas[t], "must lie in 0..1"));
        }
        let signal = |product: &mut f64, beta: &f64| {
            *product *= 1.0 - beta;
            Some(*product as f32)
        };
        let alphas_cumprod = betas.iter().scan(1.0, signal).collect();
        Ok(Self { alphas_cumprod, steps_offset: 0, set_alpha_to_one: true, spacing: None })
    }

    /// Betas evenly spaced from `start` to `end` (`beta_schedule` = "linear"; DDPM, section 4).
    pub fn linear(start: f64, end: f64, num_train_timesteps: usize) -> Result<Self> {
        Self::from_betas(&linspace(start, end, num_train_timesteps))
    }

    /// Square roots of betas evenly spaced (`beta_schedule` = "scaled_linear"; latent diffusion, Stable Diffusion).
    pub fn scaled_linear(start: f64, end: f64, num_train_timesteps: usize) -> Result<Self> {
        let roots = linspace(start.sqrt(), end.sqrt(), num_train_timesteps);
        Self::from_betas(&roots.into_iter().map(|root| root * root).collect::<Vec<_>>())
    }

    /// How many timesteps the model was trained on.
    pub fn num_train_timesteps(&self) -> usize {
        self.alphas_cumprod.len()
    }

    /// (alpha_t, sigma_t) with z_t = alpha_t z_0 + sigma_t eps and alpha_t^2 + sigma_t^2 = 1.
    pub fn alpha_sigma(&self, t: usize) -> (f32, f32) {
        alpha_sigma(self.alphas_cumprod[t] as f64)
    }

    /// [`Self::alpha_sigma`] at a fractional `t`, by linear interpolation of the noise-to-signal ratio sigma_t / alpha_t
    /// in its logarithm, clamped to the schedule.
    pub fn alpha_sigma_at(&self, t: f32) -> (f32, f32) {
        let t = t.clamp(0.0, (self.num_train_timesteps() - 1) as f32);
        let (low, part) = (t.floor() as usize, (t - t.floor()) as f64);
        if part == 0.0 {
            return self.alpha_sigma(low);
        }
        let sigma = ((1.0 - part) * self.sigma(low).ln() + part * self.sigma(low + 1).ln()).exp();
        alpha_sigma(1.0 / (sigma * sigma + 1.0))
    }

    /// Noise-to-signal ratio sigma_t / alpha_t at timestep `t`: the sigma of k-diffusion and of EDM.
    pub fn sigma(&self, t: usize) -> f64 {
        let alpha_cumprod = self.alphas_cumprod[t] as f64;
        ((1.0 - alpha_cumprod) / alpha_cumprod).sqrt()
    }
}

fn alpha_sigma(alpha_cumprod: f64) -> (f32, f32) {
    (alpha_cumprod.sqrt() as f32, (1.0 - alpha_cumprod).sqrt() as f32)
}

fn linspace(start: f64, end: f64, n: usize) -> Vec<f64> {
    let step = (end - start) / (n.max(2) - 1) as f64;
    (0..n).map(|i| start + step * i as f64).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn stable_diffusion() -> NoiseSchedule {
        NoiseSchedule { steps_offset: 1, ..NoiseSchedule::scaled_linear(0.00085, 0.012, 1000).unwrap() }
    }

    #[test]
    fn fractional_timesteps_lie_between_their_neighbours() {
        let schedule = stable_diffusion();
        let (alpha, sigma) = schedule.alpha_sigma_at(10.5);
        assert!(alpha < schedule.alpha_sigma(10).0 && alpha > schedule.alpha_sigma(11).0);
        assert!((alpha * alpha + sigma * sigma - 1.0).abs() < 1e-6);
        assert_eq!(schedule.alpha_sigma_at(2000.0), schedule.alpha_sigma(999));
    }

    #[test]
    fn bad_betas_are_refused() {
        for betas in [&[][..], &[0.1, -0.1], &[1.0], &[f64::NAN]] {
            assert!(NoiseSchedule::from_betas(betas).is_err(), "{betas:?}");
        }
    }
}
