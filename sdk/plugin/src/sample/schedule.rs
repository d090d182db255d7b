//! The training noise schedule, and which of its timesteps a sampler visits.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// How inference timesteps are spread over the training ones (`timestep_spacing`; Lin et al., "Common diffusion noise
/// schedules and sample steps are flawed", 2024, table 2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TimestepSpacing {
    /// Multiples of a whole stride, counted up from 0; what Stable Diffusion's schedulers use.
    #[default]
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
    /// `timestep_spacing` of the model's scheduler config, or what the sampler's manifest says where the model says none.
    pub spacing: TimestepSpacing,
}

impl NoiseSchedule {
    /// The schedule of the per-step variances `betas`, each in (0, 1); offset 0, leading spacing, `set_alpha_to_one`.
    pub fn from_betas(betas: &[f32]) -> Result<Self> {
        if betas.is_empty() {
            return Err(Error::config("betas", "[]", "a schedule needs at least one timestep"));
        }
        let mut product = 1.0_f64;
        let mut alphas_cumprod = Vec::with_capacity(betas.len());
        for (t, &beta) in betas.iter().enumerate() {
            if !(beta > 0.0 && beta < 1.0) {
                return Err(Error::config(&format!("betas[{t}]"), beta, "must lie between 0 and 1"));
            }
            product *= (1.0 - beta) as f64;
            alphas_cumprod.push(product as f32);
        }
        Ok(Self { alphas_cumprod, steps_offset: 0, set_alpha_to_one: true, spacing: TimestepSpacing::Leading })
    }

    /// Betas evenly spaced from `start` to `end` (`beta_schedule` = "linear"; DDPM, section 4).
    pub fn linear(start: f32, end: f32, num_train_timesteps: usize) -> Result<Self> {
        Self::from_betas(&linspace(start as f64, end as f64, num_train_timesteps))
    }

    /// Square roots of betas evenly spaced (`beta_schedule` = "scaled_linear"; latent diffusion, Stable Diffusion).
    pub fn scaled_linear(start: f32, end: f32, num_train_timesteps: usize) -> Result<Self> {
        let roots = linspace((start as f64).sqrt(), (end as f64).sqrt(), num_train_timesteps);
        Self::from_betas(&roots.iter().map(|root| root * root).collect::<Vec<_>>())
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

    /// (alpha, sigma) after the last step.
    pub fn final_alpha_sigma(&self) -> (f32, f32) {
        alpha_sigma(if self.set_alpha_to_one { 1.0 } else { self.alphas_cumprod[0] as f64 })
    }

    /// Noise-to-signal ratio sigma_t / alpha_t at timestep `t`: the sigma of k-diffusion and of EDM.
    pub fn sigma(&self, t: usize) -> f64 {
        let alpha_cumprod = self.alphas_cumprod[t] as f64;
        ((1.0 - alpha_cumprod) / alpha_cumprod).sqrt()
    }

    /// The `steps` timesteps to visit, falling. Fails unless 1 <= steps <= num_train_timesteps.
    ///
    /// Places between two timesteps are rounded to even as diffusers' are, by the same operations in the same order, so
    /// that a place halfway is the same timestep there.
    pub fn timesteps(&self, steps: usize) -> Result<Vec<usize>> {
        let trained = self.num_train_timesteps();
        self.check_steps(steps, trained)?;
        let last = (trained - 1) as f64;
        let spaced = |i: usize| match self.spacing {
            TimestepSpacing::Leading => (steps - 1 - i) * (trained / steps) + self.steps_offset,
            TimestepSpacing::Linspace if steps == 1 => 0,
            TimestepSpacing::Linspace => {
                ((steps - 1 - i) as f64 * (last / (steps - 1) as f64)).round_ties_even() as usize
            }
            TimestepSpacing::Trailing => trailing(trained, steps, i),
        };
        Ok((0..steps).map(|i| spaced(i).min(trained - 1)).collect())
    }

    /// The same for multistep solvers, which leave out the last of `steps` + 1 evenly spaced timesteps (diffusers'
    /// DPMSolverMultistepScheduler). Fails unless 1 <= steps < num_train_timesteps, and where two steps would be at one
    /// timestep, since these solvers divide by the distance: with as many steps as timesteps there is no room for
    /// `steps_offset`.
    pub fn multistep_timesteps(&self, steps: usize) -> Result<Vec<usize>> {
        let trained = self.num_train_timesteps();
        self.check_steps(steps, trained - 1)?;
        let last = (trained - 1) as f64;
        let spaced = |i: usize| match self.spacing {
            TimestepSpacing::Leading => (steps - i) * (trained / (steps + 1)) + self.steps_offset,
            TimestepSpacing::Linspace => ((steps - i) as f64 * (last / steps as f64)).round_ties_even() as usize,
            TimestepSpacing::Trailing => trailing(trained, steps, i),
        };
        let timesteps: Vec<usize> = (0..steps).map(|i| spaced(i).min(trained - 1)).collect();
        if !timesteps.is_sorted_by(|a, b| a > b) {
            let reason = format!(
                "with steps_offset = {} of this model's noise schedule, two of them would be at timestep {}; take fewer",
                self.steps_offset,
                trained - 1
            );
            return Err(Error::config("steps", steps, reason));
        }
        Ok(timesteps)
    }

    /// Fails unless 1 <= steps <= most.
    pub(super) fn check_steps(&self, steps: usize, most: usize) -> Result<()> {
        if (1..=most).contains(&steps) {
            return Ok(());
        }
        Err(Error::config("steps", steps, format!("must be 1 to {most} for this model's noise schedule and sampler")))
    }
}

fn alpha_sigma(alpha_cumprod: f64) -> (f32, f32) {
    (alpha_cumprod.sqrt() as f32, (1.0 - alpha_cumprod).sqrt() as f32)
}

/// As `numpy.arange(trained, 0, -trained / steps)` has it: counted by the difference of its first two elements.
fn trailing(trained: usize, steps: usize, i: usize) -> usize {
    let first = trained as f64;
    let difference = (first - first / steps as f64) - first;
    let t = (first + i as f64 * difference).round_ties_even();
    (t as usize).saturating_sub(1)
}

fn linspace(start: f64, end: f64, n: usize) -> Vec<f32> {
    let step = (end - start) / (n.max(2) - 1) as f64;
    (0..n).map(|i| (start + step * i as f64) as f32).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn stable_diffusion() -> NoiseSchedule {
        NoiseSchedule { steps_offset: 1, ..NoiseSchedule::scaled_linear(0.00085, 0.012, 1000).unwrap() }
    }

    #[test]
    fn leading_timesteps_are_multiples_of_the_stride_plus_the_offset() {
        let timesteps = stable_diffusion().timesteps(20).unwrap();
        assert_eq!((timesteps[0], timesteps[1], timesteps[19]), (951, 901, 1));
        let timesteps = stable_diffusion().multistep_timesteps(20).unwrap();
        assert_eq!((timesteps[0], timesteps[19]), (941, 48));
    }

    /// tests/parity/make_sampler_golden.py has digests of all of diffusers' timesteps.
    #[test]
    fn every_count_of_steps_visits_the_timesteps_that_diffusers_visits() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/samplers.json");
        let golden: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        let digests = golden["timesteps"].as_object().unwrap();
        assert_eq!(digests.len(), 12);
        for (name, expected) in digests {
            let [kind, spacing, trained] = name.split(' ').collect::<Vec<_>>().try_into().unwrap();
            let spacing = match spacing {
                "leading" => TimestepSpacing::Leading,
                "linspace" => TimestepSpacing::Linspace,
                _ => TimestepSpacing::Trailing,
            };
            let trained = trained.parse().unwrap();
            let schedule = NoiseSchedule { spacing, ..NoiseSchedule::scaled_linear(0.00085, 0.012, trained).unwrap() };
            let mut digest = 0xcbf2_9ce4_8422_2325_u64;
            for steps in 2..trained - 1 {
                let timesteps =
                    if kind == "multistep" { schedule.multistep_timesteps(steps) } else { schedule.timesteps(steps) };
                for t in timesteps.unwrap() {
                    digest = (digest ^ t as u64).wrapping_mul(0x100_0000_01b3);
                }
            }
            assert_eq!(*expected, format!("{digest:016x}"), "{name}");
        }
    }

    #[test]
    fn every_count_of_steps_stays_inside_the_schedule() {
        for spacing in [TimestepSpacing::Leading, TimestepSpacing::Linspace, TimestepSpacing::Trailing] {
            let schedule = NoiseSchedule { spacing, ..stable_diffusion() };
            for steps in [1, 2, 3, 7, 50, 333, 999, 1000] {
                let timesteps = schedule.timesteps(steps).unwrap();
                assert_eq!(timesteps.len(), steps);
                assert!(timesteps.iter().all(|&t| t < 1000), "{spacing:?} {steps}");
                assert!(timesteps.is_sorted_by(|a, b| a >= b), "{spacing:?} {steps}");
            }
            assert!(schedule.timesteps(0).is_err());
            assert!(schedule.timesteps(1001).is_err());
            assert!(schedule.multistep_timesteps(1000).is_err());
            for steps in (1..1000).filter(|&steps| spacing != TimestepSpacing::Leading || steps != 999) {
                let timesteps = schedule.multistep_timesteps(steps).unwrap();
                assert!(timesteps.len() == steps && timesteps.is_sorted_by(|a, b| a > b), "{spacing:?} {steps}");
            }
        }
        // 999 and 998, moved up by 1, are both the last one.
        let error = stable_diffusion().multistep_timesteps(999).unwrap_err().message;
        assert!(error.contains("steps = 999: with steps_offset = 1") && error.contains("timestep 999"), "{error}");
        assert!(NoiseSchedule { steps_offset: 0, ..stable_diffusion() }.multistep_timesteps(999).is_ok());
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
        for betas in [&[][..], &[0.1, 0.0], &[1.0], &[f32::NAN]] {
            assert!(NoiseSchedule::from_betas(betas).is_err(), "{betas:?}");
        }
    }
}
