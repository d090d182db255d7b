//! Write plugins for BlockLoRA: merge strategies, trainers, samplers.
//!
//! A plugin is a small crate that builds a shared library and a manifest that lies beside it. It implements one trait of
//! this crate on plain data: slices of `f32` with their shapes, never a tensor of the engine. Everything large stays in
//! the engine; the plugin needs no GPU code and no particular compiler flags.
//!
//! | kind | trait | what it does |
//! |---|---|---|
//! | merge | [`MergeStrategy`](merge::MergeStrategy) | says which multiples of which adapters make the weights |
//! | train | [`Trainer`](train::Trainer) | turns pictures into an adapter on a [`TrainHost`](train::TrainHost) |
//! | sample | [`Sampler`](sample::Sampler) | turns noise into latents on a [`Denoiser`](sample::Denoiser) |
//!
//! The struct that implements the trait holds its settings: a [`Config`]. [`export_plugin!`] makes the library.

pub mod abi;
mod config;
mod error;
mod export;
mod job;
#[doc = include_str!("guide.md")]
pub mod guide {}
pub mod manifest;
pub mod merge;
pub mod parallel;
pub mod sample;
pub mod testing;
pub mod train;

pub use blocklora_spec::{Delta, Kind, Partition, Scheme, rng};
pub use config::{Config, overlay, resolve, schema, to_value};
pub use error::{Code, Error, Result};
pub use job::{Job, LogLevel};
pub use serde_json::Value;

/// Version of the ABI that this SDK builds plugins for: (major, minor), counted by itself. A new minor version adds
/// (older plugins go on loading), a new major one changes.
pub const ABI_VERSION: (u32, u32) = (1, 1);
