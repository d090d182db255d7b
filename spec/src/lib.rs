//! The BlockLoRA adapter format.

/// What can be wrong with an adapter file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {}
