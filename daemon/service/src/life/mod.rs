//! The daemon's life: starting, watching over it, sleeping, ending.

pub mod activation;
pub mod control;
pub mod cuda;
pub mod lock;
pub mod logind;
pub mod memory;
pub mod paths;
pub mod recover;
pub mod run;
