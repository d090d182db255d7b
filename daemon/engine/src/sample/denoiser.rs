//! What a sampler gets from its host, and what it must do.

use crate::error::Result;

use super::NoiseSchedule;

/// The guided model as a sampler sees it.
pub trait Denoiser {
    /// The schedule that the model was trained with.
    fn schedule(&self) -> &NoiseSchedule;
    /// [N, C, H, W] of the latents.
    fn shape(&self) -> [usize; 4];
    /// Writes the predicted noise eps (whatever the model's own target is) for `latents` = z_t, [N, C, H, W] row-major
    /// in the variance-preserving scaling, at `timestep` (0..num_train_timesteps, fractions allowed).
    fn predict(&mut self, latents: &[f32], timestep: f32, eps: &mut [f32]) -> Result<()>;
    /// Fills `out` ([N, C, H, W]) with standard normal numbers belonging to `index`, the same for the same index.
    fn noise(&mut self, index: usize, out: &mut [f32]);
    /// The seed of the first picture.
    fn seed(&self) -> u64;
    /// Called after each step with the current latents; returns [`crate::Error::Cancelled`] if
    /// the caller has cancelled.
    fn step_done(&mut self, step: usize, steps: usize, latents: &[f32]) -> Result<()>;
}

/// A sampler: turns noise into latents.
pub trait Sampler: Send + Sync {
    /// Its id, as users name it.
    fn id(&self) -> &str;
    /// `latents` [N, C, H, W] holds unit Gaussian noise on entry and the sample z_0 on return.
    fn sample(&self, denoiser: &mut dyn Denoiser, latents: &mut [f32], steps: usize) -> Result<()>;
}
