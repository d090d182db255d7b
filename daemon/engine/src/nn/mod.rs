//! The model's modules, written to read like diffusers' and transformers' and named by their paths.

mod checkpoint;
mod clip;
mod conditioning;
mod layers;
mod linear;
pub mod loader;
mod resnet;
mod samples;
mod transformer;
mod unet;
mod vae;

pub use checkpoint::Gradients;
pub use clip::ClipTextEncoder;
pub use conditioning::Conditioning;
pub use layers::{Conv2d, GroupNorm, LayerNorm};
pub use linear::{Forward, LayerId, Linear, Recorder, TrainingAdapter};
pub use samples::LossOf;
pub use unet::UNet;
pub use vae::Vae;
