//! Benchmarks of the engine, on random weights of real shapes.

mod memory;
mod merge;
mod shapes;

pub use merge::{BenchMerge, merge};
pub use shapes::Shape;
