//! Everything that can go wrong in the engine, one variant per kind, each naming the file, tensor or field.

use std::path::PathBuf;

/// What kind of failure a method's is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MethodFault {
    /// A setting is wrong.
    Option,
    /// What it was given does not fit together.
    Incompatible,
    /// Anything else.
    Failed,
}

/// The engine's error. Every message says what is wrong with which file, tensor or field.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file is there but its content is not what it must be.
    #[error("{path}: {reason}")]
    InvalidFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, naming the field or tensor.
        reason: String,
    },
    /// A tensor is missing, or has the wrong shape or type.
    #[error("{path}: tensor {tensor:?}: {reason}")]
    InvalidTensor {
        /// The file that holds (or should hold) it.
        path: PathBuf,
        /// Its name.
        tensor: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The model has a part or setting that this engine does not support.
    #[error("{path}: {field} = {value} is not supported ({supported})")]
    Unsupported {
        /// The config file.
        path: PathBuf,
        /// The field in it.
        field: String,
        /// Its value.
        value: String,
        /// What would be.
        supported: String,
    },
    /// An adapter file is not valid.
    #[error(transparent)]
    Adapter(blocklora_spec::Error),
    /// An adapter cannot be used with this model or beside these other adapters.
    #[error("adapter {adapter:?}: {reason}")]
    Incompatible {
        /// The adapter's name.
        adapter: String,
        /// Why, and what to do.
        reason: String,
    },
    /// A prompt cannot be encoded.
    #[error("prompt {prompt:?}: {reason}")]
    Prompt {
        /// The prompt, or its beginning.
        prompt: String,
        /// Why.
        reason: String,
    },
    /// A setting is out of its range.
    #[error("{name} = {value}: {reason}")]
    InvalidOption {
        /// The setting.
        name: String,
        /// Its value.
        value: String,
        /// What is allowed.
        reason: String,
    },
    /// A value that must be finite is not; nothing was saved.
    #[error("{what} is not finite ({value}) at step {step}")]
    NotFinite {
        /// Which value.
        what: String,
        /// NaN or an infinity.
        value: f32,
        /// The step at which it appeared.
        step: usize,
    },
    /// A sampler, merge strategy or trainer failed by itself.
    #[error("{method}: {reason}")]
    Method {
        /// Its id.
        method: String,
        /// Why, and what to do.
        reason: String,
        /// What kind of failure.
        fault: MethodFault,
    },
    /// The caller cancelled.
    #[error("cancelled")]
    Cancelled,
    /// The tensor library failed.
    #[error("tensor operation failed: {0}")]
    Tensor(#[from] candle_core::Error),
}

impl From<blocklora_spec::Error> for Error {
    /// What the system said stays that, whoever wrote or read the file.
    fn from(error: blocklora_spec::Error) -> Self {
        match error {
            blocklora_spec::Error::Io { path, source } => Self::Io { path, source },
            error => Self::Adapter(error),
        }
    }
}

/// The engine's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An [`Error::Io`] for `path`.
    pub fn io(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Self::Io { path: path.into(), source }
    }
    /// An [`Error::InvalidFile`] for `path`.
    pub fn invalid_file(path: impl Into<PathBuf>, reason: impl Into<String>) -> Self {
        Self::InvalidFile { path: path.into(), reason: reason.into() }
    }
    /// An [`Error::Prompt`] of a prompt that may be long: its beginning is shown.
    pub fn prompt(prompt: &str, reason: impl Into<String>) -> Self {
        Self::Prompt { prompt: shortened(prompt), reason: reason.into() }
    }
    /// An [`Error::InvalidOption`].
    pub fn option(name: impl Into<String>, value: impl ToString, reason: impl Into<String>) -> Self {
        Self::InvalidOption { name: name.into(), value: value.to_string(), reason: reason.into() }
    }
    /// An [`Error::Method`] of a method that broke its contract: nothing that its user can mend.
    pub fn faulty_method(method: impl Into<String>, reason: impl std::fmt::Display) -> Self {
        let reason = format!("{reason}: report it to the method's author, and use another one meanwhile");
        Self::Method { method: method.into(), reason, fault: MethodFault::Failed }
    }
}

/// The beginning of a text for a message in one line.
pub(crate) fn shortened(text: &str) -> String {
    blocklora_spec::shortened_to(text, 80)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_system_said_stays_that() {
        let source = || std::io::Error::from(std::io::ErrorKind::StorageFull);
        let error = blocklora_spec::Error::Io { path: "x".into(), source: source() };
        assert!(matches!(Error::from(error), Error::Io { path, source } if path.as_os_str() == "x"
            && source.kind() == std::io::ErrorKind::StorageFull));
    }

    #[test]
    fn a_long_prompt_is_shown_by_its_beginning() {
        let message = Error::prompt(&"\u{1}".repeat(65_536), "it is too long").to_string();
        assert_eq!(message, format!("prompt \"{}...\": it is too long", "\\u{1}".repeat(80)));
        assert_eq!(Error::prompt("a dog", "no").to_string(), "prompt \"a dog\": no");
    }
}
