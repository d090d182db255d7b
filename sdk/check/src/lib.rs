//! The conformance tests of plugins.
//!
//! [`check`] runs every test in a process of its own, with a limit on its time and its memory, and reports what passed:
//! a plugin that crashes, hangs or takes all memory fails that one test. Besides the ABI, the manifest, the settings and
//! the errors it checks numbers: merges against the laws that the strategy declares, samplers on Gaussian data, whose
//! exact solution is known, trainers on a quadratic problem, whose optimum is known.
//!
//! Every random number comes from one seed, which the report names; the same seed repeats the run.
//!
//! The processes are started by [`Options::runner`]: a program that passes what follows its fixed arguments on to
//! [`run_one`]. `blocklora plugin check`, `blocklorad` and `blocklora-check` are such programs.

mod child;
mod new;
mod parent;
mod report;
mod subject;
mod tests;

pub use child::run_one;
pub use new::new_plugin;
pub use parent::{Options, check};
pub use report::{Outcome, Report, Status};
pub use tests::{Level, list};
