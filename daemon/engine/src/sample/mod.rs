//! Sampling: a sampler drives its own loop on a [`Denoiser`]; plain slices only, as plugins will see it.

mod denoiser;

pub use denoiser::{Denoiser, NoiseSchedule, Sampler};
