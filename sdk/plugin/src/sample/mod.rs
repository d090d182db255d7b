//! Samplers: a sampler drives its own loop on a [`Denoiser`].

mod levels;
mod schedule;

pub use levels::{NoiseLevel, karras_sigmas, multistep_noise_levels, noise_levels, timestep_of_sigma};
pub use schedule::{NoiseSchedule, TimestepSpacing};

use crate::config::Config;
use crate::error::Result;
use crate::job::Job;

/// The guided model as a sampler sees it, and the services of its job. Random numbers come from
/// [`noise`](Self::noise), which knows the seed of each picture in a batch.
///
/// Threads: the methods of this trait are called from the thread that [`Sampler::sample`] was called on.
pub trait Denoiser: Job {
    /// The schedule that the model was trained with.
    fn schedule(&self) -> &NoiseSchedule;

    /// [N, C, H, W] of the latents: N pictures are sampled at once, one behind the other in the slice. A sampler that
    /// treats every number for itself need not care.
    fn shape(&self) -> [usize; 4];

    /// Writes the predicted noise eps (whatever the model's own target is) for `latents` = z_t, in the
    /// variance-preserving scaling z_t = alpha_t z_0 + sigma_t eps, at `timestep` (0..num_train_timesteps, fractions
    /// allowed). Both slices have N * C * H * W numbers. This is where the time goes.
    fn predict(&mut self, latents: &[f32], timestep: f32, eps: &mut [f32]) -> Result<()>;

    /// Fills `out` (N * C * H * W numbers) with standard normal numbers belonging to `index`, the same for the same
    /// index; a sampler that adds noise once in a step uses the step.
    fn noise(&mut self, index: usize, out: &mut [f32]);

    /// To be called after each step with the current latents: reports progress and shows a preview. Returns
    /// [`Error::cancelled`](crate::Error::cancelled) if the caller has cancelled, and an error if a latent is not
    /// finite; pass either on at once.
    fn step_done(&mut self, step: usize, steps: usize, latents: &[f32]) -> Result<()>;
}

/// A sampler, which turns noise into latents; the struct that implements it holds its settings.
pub trait Sampler: Config + Send + Sync {
    /// `latents` holds unit Gaussian noise on entry and the sample z_0 on return; their shape is
    /// [`Denoiser::shape`]. Calls [`Denoiser::step_done`] `steps` times, whatever the number of predictions.
    ///
    /// Errors: [`Code::InvalidConfig`](crate::Code::InvalidConfig) naming `steps` where the schedule does not allow
    /// that many (as [`NoiseSchedule::timesteps`] returns it), and whatever the denoiser returned.
    fn sample(&self, denoiser: &mut dyn Denoiser, latents: &mut [f32], steps: usize) -> Result<()>;
}

/// A [`Sampler`] whatever its settings: what hosts work with.
pub trait AnySampler: Send + Sync {
    /// [`Sampler::sample`].
    fn sample(&self, denoiser: &mut dyn Denoiser, latents: &mut [f32], steps: usize) -> Result<()>;
}

impl<S: Sampler> AnySampler for S {
    fn sample(&self, denoiser: &mut dyn Denoiser, latents: &mut [f32], steps: usize) -> Result<()> {
        Sampler::sample(self, denoiser, latents, steps)
    }
}
