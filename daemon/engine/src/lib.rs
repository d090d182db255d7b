//! The engine of BlockLoRA: a Stable Diffusion model on candle whose live weights take adapters in place, exactly and
//! reversibly, and which trains adapters' factors. It knows neither IPC nor plugins.

pub mod bake;
pub mod bench;
#[cfg(feature = "cuda")]
mod cuda;
pub mod device;
mod error;
pub mod generate;
pub mod image;
pub mod merge;
pub mod model;
pub mod nn;
pub mod ops;
pub use blocklora_spec::rng;
pub mod sample;
pub mod score;
pub mod separate;
pub mod text;
pub mod train;
pub mod weights;

pub use candle_core::{DType, Device};
pub use error::{Error, MethodFault, Result};
