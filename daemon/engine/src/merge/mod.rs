//! Merging adapters into the live weights: strategies plan, the engine's kernel writes rows.

pub mod strategy;
