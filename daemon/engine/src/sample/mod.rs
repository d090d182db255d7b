//! Sampling: a sampler drives its own loop on a [`Denoiser`]; plain slices only. The samplers themselves come from
//! outside.

mod denoiser;
mod schedule;

pub use denoiser::{Denoiser, Sampler};
pub use schedule::{NoiseSchedule, TimestepSpacing};
