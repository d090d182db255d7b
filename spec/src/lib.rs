#![doc = include_str!("../ADAPTER.md")]

mod adapter;
mod builder;
mod dtype;
mod error;
pub mod export;
mod format;
mod header;
pub mod import;
mod json;
mod manifest;
mod map;
mod partition;
pub mod rng;

pub use adapter::{Adapter, LayerFactors, TokenVectors, hex};
pub use builder::{AdapterBuilder, Layer, write, write_atomically};
pub use dtype::Storage;
pub use error::{Error, Result, shortened_to};
pub use format::Format;
pub use manifest::{Algorithm, Base, Delta, Fault, Kind, Manifest, NAME_RULE, Token, Training, is_name};
pub use partition::{Partition, Scheme};

/// The one version of the format that this crate reads and writes.
pub const VERSION: &str = "1.0";

/// Limits that every reader enforces, so that a file can cost no more than its own size suggests.
pub mod limits {
    /// Bytes of a file.
    pub const FILE_BYTES_MAX: u64 = 4 << 30;
    /// Bytes of the safetensors header.
    pub const HEADER_BYTES_MAX: u64 = 8 << 20;
    /// Nesting of the manifest's JSON; the manifest itself is depth 1.
    pub const MANIFEST_DEPTH_MAX: usize = 32;
    /// Nesting of the header's JSON: header, tensor, shape.
    pub const HEADER_DEPTH_MAX: usize = 3;
    /// Outputs m and inputs n of a layer.
    pub const LAYER_WIDTH_MAX: usize = 1 << 16;
    /// The sum of the distinct m of one file: each may cost a permutation.
    pub const DISTINCT_OUTPUTS_SUM_MAX: usize = 1 << 20;
    /// Slots of a partition.
    pub const CAPACITY_MAX: u32 = 1 << 16;
    /// The rank r.
    pub const RANK_MAX: usize = 1024;
    /// Tokens of a concept.
    pub const TOKENS_MAX: usize = 16;
    /// Vectors of a token.
    pub const VECTORS_MAX: usize = 1024;
    /// Bytes of a tensor's name.
    pub const TENSOR_NAME_BYTES_MAX: usize = 256;
}
