//! Benchmarks of the engine, on random weights of real shapes.

mod memory;
mod merge;
mod meter;
mod model;
mod random_model;
mod sampler;
mod shapes;
mod strategy;

pub use memory::{peak as peak_resident_bytes, resident as resident_bytes};
pub use merge::{BenchMerge, merge};
pub use meter::{Cost, cpu_time, measure};
pub use model::{BenchModel, step, text, unet, vae};
pub use random_model::write_random_model;
pub use sampler::{BenchSampler, sampler};
pub use shapes::Shape;
pub use strategy::{BenchStrategy, strategy};
