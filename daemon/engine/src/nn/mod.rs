//! The model's modules, written to read like diffusers' and transformers' and named by their paths.

mod linear;

pub use linear::{Forward, LayerId, Linear, Recorder, TrainingAdapter};
