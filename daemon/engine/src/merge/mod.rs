//! Merging adapters into the live weights: strategies plan, the engine's kernel writes rows.
//!
//! The mapped model file is the pristine copy. A composition is applied in one pass over the rows that change,
//! `W[p] = W0[p] + sum_i c_ip scale_i B_i[p] A_i`, straight into the live tensors.

mod adapter;
mod composition;
pub mod conflicts;
#[cfg(test)]
mod conflicts_tests;
mod dense;
#[cfg(test)]
mod dense_tests;
mod element;
mod kernel;
mod kernel_copy;
#[cfg(feature = "cuda")]
mod kernel_cuda;
#[cfg(target_arch = "x86_64")]
mod kernel_x86;
mod merger;
#[cfg(test)]
mod refusal_tests;
pub mod strategy;
#[cfg(test)]
mod tests;
#[cfg(any(test, feature = "cuda"))]
mod tiles;
#[cfg(test)]
mod tiles_tests;

pub use adapter::{AdapterFactors, AdapterLayer};
pub use kernel::Isa;
pub(crate) use kernel_copy::{copy_rows, is_pristine};
pub use merger::{MergeReport, Merger, Target};
