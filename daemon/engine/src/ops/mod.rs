//! The engine's own tensor operations: activations are f32, frozen weights f32, f16 or bf16.
//!
//! Weights are frozen: a backward pass gives the gradient of the input (and of an adapter's factors), never of a
//! weight. Every operation has a plain counterpart in [mod@reference], which its tests compare it with and which
//! devices without an own kernel run.

mod attention;
mod attention_backward;
mod conv2d;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod dense;
mod elementwise;
mod frozen;
mod geglu;
mod linear;
mod linear_lora;
mod memory;
mod norm;
pub mod reference;
mod simd;
mod tile;
mod transpose;
mod unfold;
mod upsample;
mod vector;
mod winograd;

pub use attention::attention;
pub use conv2d::conv2d;
pub(crate) use cpu::{PARALLEL_FROM, side_by_side};
pub use elementwise::{gelu, quick_gelu, silu};
pub use frozen::Frozen;
pub use geglu::geglu;
pub use linear::linear;
pub use linear_lora::linear_lora;
pub(crate) use memory::{give_back_freed_pages, keep_freed_pages};
pub use norm::{group_norm, layer_norm};
pub use reference::LoraBranch;
pub use upsample::upsample_nearest2x;
