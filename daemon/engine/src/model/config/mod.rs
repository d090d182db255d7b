//! The configs of a diffusers model folder. What this engine does not compute is an error that names file and field.

mod fields;
mod scheduler;
mod text_encoder;
mod unet;
mod vae;

pub(crate) use fields::{Fields, read_json};
pub use scheduler::{Prediction, SchedulerConfig};
pub use text_encoder::{Activation, TextEncoderConfig};
pub use unet::UNetConfig;
pub use vae::VaeConfig;
