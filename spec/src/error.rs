//! What can be wrong with an adapter file, one variant per malformation.

use std::path::PathBuf;

/// An error of reading, writing, exporting or importing an adapter. Each names the file and, where there is one, the tensor or
/// the manifest's field, the reason, and what to do if that is not obvious.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The path is a folder, a device or the like.
    #[error("{path}: not a regular file; name an adapter's .safetensors file")]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// The file is larger than any adapter may be.
    #[error("{path}: {bytes} bytes, but an adapter has at most {limit}; is this a whole model?")]
    FileTooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// [`limits::FILE_BYTES_MAX`](crate::limits::FILE_BYTES_MAX).
        limit: u64,
    },
    /// The file ends before what its header describes.
    #[error("{path}: truncated: {what} needs {needed} bytes, the file has {actual}; copy or download it again")]
    Truncated {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        what: String,
        /// The bytes that the file would need.
        needed: u64,
        /// The bytes that it has.
        actual: u64,
    },
    /// The header is longer than any adapter's.
    #[error("{path}: the header claims {claimed} bytes, the limit is {limit}; this is not an adapter")]
    HeaderTooLarge {
        /// The file.
        path: PathBuf,
        /// The claimed length.
        claimed: u64,
        /// [`limits::HEADER_BYTES_MAX`](crate::limits::HEADER_BYTES_MAX).
        limit: u64,
    },
    /// The header's length is not a multiple of 8, so that tensors would not be aligned.
    #[error("{path}: the header's length {length} is not a multiple of 8; pad it with spaces")]
    HeaderMisaligned {
        /// The file.
        path: PathBuf,
        /// The length.
        length: u64,
    },
    /// The header or the manifest is not the JSON it must be.
    #[error("{path}: {part}: {reason}")]
    Json {
        /// The file.
        path: PathBuf,
        /// "header" or "manifest".
        part: &'static str,
        /// What the parser said, with its position.
        reason: String,
    },
    /// A JSON object names one key twice.
    #[error("{path}: {part}: the key {key:?} occurs twice; remove one of them")]
    DuplicateKey {
        /// The file.
        path: PathBuf,
        /// "header" or "manifest".
        part: &'static str,
        /// The key, with the keys above it.
        key: String,
    },
    /// JSON is nested deeper than allowed.
    #[error("{path}: {part}: nested deeper than {limit} levels")]
    TooDeep {
        /// The file.
        path: PathBuf,
        /// "header" or "manifest".
        part: &'static str,
        /// The limit.
        limit: usize,
    },
    /// The header lacks one of the metadata entries that make a safetensors file an adapter.
    #[error("{path}: the header has no metadata {key:?}; this is not a BlockLoRA adapter")]
    MissingMetadata {
        /// The file.
        path: PathBuf,
        /// The key.
        key: &'static str,
    },
    /// The header has a metadata entry that the format does not know.
    #[error("{path}: unknown header metadata {key:?}; remove it")]
    UnknownMetadata {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
    },
    /// The file follows another version of the format.
    #[error("{path}: adapter format {version:?}, but this reader knows only {known:?}; update it or convert the file")]
    UnknownVersion {
        /// The file.
        path: PathBuf,
        /// The file's version.
        version: String,
        /// [`VERSION`](crate::VERSION).
        known: &'static str,
    },
    /// A field of the manifest has a value that it may not have.
    #[error("{path}: manifest: {field}: {reason}")]
    Field {
        /// The file.
        path: PathBuf,
        /// The field, as in `partition.slot`.
        field: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The manifest or the tensors are not those that were written.
    #[error("{path}: the digest of the {part} is {actual}, the file says {expected}; it was altered or damaged")]
    Digest {
        /// The file.
        path: PathBuf,
        /// "manifest" or "tensors".
        part: &'static str,
        /// The digest that the file states.
        expected: String,
        /// The digest that its content has.
        actual: String,
    },
    /// There is nothing in the file.
    #[error("{path}: no tensors; an adapter has at least one layer or token")]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// A tensor's name is not one that an adapter can have.
    #[error("{path}: tensor {tensor:?}: {reason}")]
    TensorName {
        /// The file.
        path: PathBuf,
        /// The name.
        tensor: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A tensor's entry in the header is not the object that it must be.
    #[error("{path}: tensor {tensor:?}: header entry: {reason}")]
    TensorEntry {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What is wrong with the entry.
        reason: String,
    },
    /// A tensor that the manifest or another tensor asks for is not there.
    #[error("{path}: tensor {tensor:?} is missing: {reason}")]
    MissingTensor {
        /// The file.
        path: PathBuf,
        /// The name.
        tensor: String,
        /// What asks for it.
        reason: String,
    },
    /// A tensor that the manifest does not announce.
    #[error("{path}: tensor {tensor:?} is not announced: {reason}")]
    UnknownTensor {
        /// The file.
        path: PathBuf,
        /// The name.
        tensor: String,
        /// Where it should be announced.
        reason: String,
    },
    /// A tensor has a type other than F32, F16 and BF16.
    #[error("{path}: tensor {tensor:?}: type {dtype:?}, expected F32, F16 or BF16")]
    Dtype {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its type.
        dtype: String,
    },
    /// A tensor's shape is not what the manifest asks for, or not a shape at all.
    #[error("{path}: tensor {tensor:?}: shape {shape:?}: {reason}")]
    Shape {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<u64>,
        /// What is wrong with it.
        reason: String,
    },
    /// A tensor's bytes are not as many as its shape and type need.
    #[error("{path}: tensor {tensor:?}: offsets {offsets:?}: {reason}")]
    Offsets {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its begin and end in the data section.
        offsets: [u64; 2],
        /// What is wrong with them.
        reason: String,
    },
    /// Two tensors share bytes.
    #[error("{path}: tensors {first:?} and {second:?} overlap")]
    Overlap {
        /// The file.
        path: PathBuf,
        /// The one that begins first.
        first: String,
        /// The other.
        second: String,
    },
    /// Bytes that belong to no tensor.
    #[error("{path}: bytes {begin}..{end} of the data section belong to no tensor")]
    Hole {
        /// The file.
        path: PathBuf,
        /// The first such byte.
        begin: u64,
        /// One past the last.
        end: u64,
    },
    /// A tensor holds NaN or an infinity.
    #[error("{path}: tensor {tensor:?}: element {index} is {value}; train it again with a lower learning rate")]
    NotFinite {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The element's row-major index.
        index: usize,
        /// NaN, inf or -inf.
        value: f32,
    },
    /// The file is another tool's.
    #[error("{path}: this is {what}, not a BlockLoRA adapter; {}", what.cure())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// Whose.
        what: crate::import::Foreign,
    },
    /// Another tool's file that has no counterpart here, or is damaged.
    #[error("{path}: cannot be imported: {reason}")]
    Import {
        /// The file or folder.
        path: PathBuf,
        /// Why, and what to do.
        reason: String,
    },
    /// Keys of another tool's file that cannot be applied.
    #[error("{path}: {}", crate::import::summary(keys))]
    Unmatched {
        /// The file or folder.
        path: PathBuf,
        /// All of them.
        keys: Vec<crate::import::Unmatched>,
    },
    /// The adapter has no counterpart in the format that it should be exported to.
    #[error("{path}: cannot be exported to {format}: {reason}")]
    Export {
        /// The adapter's file.
        path: PathBuf,
        /// The format.
        format: &'static str,
        /// Why, and what to do.
        reason: String,
    },
}

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An [`Error::Io`] for `path`.
    pub(crate) fn io(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Self::Io { path: path.into(), source }
    }
}

/// Foreign text for a message: nothing that a terminal might obey, and not more than a line or two.
pub(crate) fn excerpt(text: &str) -> String {
    let mut out = String::new();
    for c in shortened(text).chars() {
        if matches!(c, '"' | '\'' | '\\') { out.push(c) } else { out.extend(c.escape_debug()) }
    }
    out
}

/// The same for text that is shown with `{:?}`, which escapes by itself.
pub(crate) fn shortened(text: &str) -> String {
    shortened_to(text, 200)
}

/// `text`, or its first `most` characters and "...".
pub fn shortened_to(text: &str, most: usize) -> String {
    match text.char_indices().nth(most) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}
