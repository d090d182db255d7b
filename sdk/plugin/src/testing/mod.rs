//! Hosts whose answers are known, for the tests of plugins: what `blocklora plugin check` uses, too.

mod composed;
mod gaussian;
mod golden;
mod job;
mod laws;
mod merge_golden;
mod quadratic;
mod sampling;
mod train_golden;

pub use composed::{LayerNumbers, Problem, merge};
pub use gaussian::Gaussian;
pub use golden::{SamplerGolden, check_sampler};
pub use job::TestJob;
pub use laws::{check_law, check_laws};
pub use merge_golden::{MergeGolden, check_merge};
pub use quadratic::Quadratic;
pub use sampling::{check_sampler_contract, moment_error, order_of_convergence};
pub use train_golden::{TrainGolden, TrainRun, check_trainer};
