//! Hosts whose answers are known, for the tests of plugins: what `blocklora plugin check` uses, too.

mod composed;
mod gaussian;
mod golden;
mod job;
mod quadratic;
mod sampling;

pub use composed::{Problem, merge};
pub use gaussian::Gaussian;
pub use golden::{SamplerGolden, check_sampler};
pub use job::TestJob;
pub use quadratic::Quadratic;
pub use sampling::{check_sampler_contract, moment_error, order_of_convergence};
