//! The engine's own tensor operations: activations are f32, frozen weights f32, f16 or bf16.
//!
//! Weights are frozen: a backward pass gives the gradient of the input (and of an adapter's factors), never of a
//! weight. Every operation has a plain counterpart in [`reference`], which its tests compare it with and which
//! devices without an own kernel run.

pub mod reference;

pub use reference::{
    LoraBranch, attention, conv2d, geglu, gelu, group_norm, layer_norm, linear, linear_lora, quick_gelu, silu,
    upsample_nearest2x,
};
