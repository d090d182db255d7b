//! What a caller can be told: a name of the interface's list and one line of text.

use std::io;

use crate::plugins::PluginError;

/// The prefix of every error name.
pub const PREFIX: &str = "org.blocklora.Daemon1.Error.";

/// The names of the interface description, in its order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // Each is explained once, in sdk/client/interfaces/org.blocklora.Daemon1.Manager.xml.
pub enum Kind {
    Failed,
    Cancelled,
    TimedOut,
    NotSupported,
    NotAuthorized,
    QueueFull,
    DeviceBusy,
    OutOfDeviceMemory,
    DeviceLost,
    ModelNotFound,
    AdapterNotFound,
    IncompatibleArchitecture,
    InvalidAdapter,
    UnsupportedSpecVersion,
    SlotConflict,
    InvalidOption,
    GenerationConflict,
    JobNotFinished,
    StorageFull,
    StorageReadOnly,
    PluginNotFound,
    PluginIncompatible,
    PluginQuarantined,
    PluginCrashed,
    ShuttingDown,
}

/// An error with its D-Bus name.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// Which name it has.
    pub kind: Kind,
    /// One line: what is wrong, with which thing, and what to do.
    pub message: String,
}

/// The service's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error of `kind`.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }
    /// [`Kind::Failed`].
    pub fn failed(message: impl Into<String>) -> Self {
        Self::new(Kind::Failed, message)
    }
    /// [`Kind::InvalidOption`].
    pub fn option(message: impl Into<String>) -> Self {
        Self::new(Kind::InvalidOption, message)
    }
    /// The job was cancelled.
    pub fn cancelled() -> Self {
        Self::new(Kind::Cancelled, "the job was cancelled")
    }
    /// An error of the file system on `what`, a file or folder.
    pub fn io(what: impl std::fmt::Display, source: &io::Error) -> Self {
        Self::new(kind_of_io(source), format!("{what}: {source}"))
    }
    /// The whole D-Bus name.
    pub fn name(&self) -> String {
        format!("{PREFIX}{:?}", self.kind)
    }
    /// The same with `context: ` in front.
    pub fn context(self, context: impl std::fmt::Display) -> Self {
        Self { message: format!("{context}: {}", self.message), ..self }
    }
}

fn kind_of_io(error: &io::Error) -> Kind {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => Kind::StorageFull,
        io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied => Kind::StorageReadOnly,
        _ => Kind::Failed,
    }
}

impl From<blocklora_spec::Error> for Error {
    fn from(error: blocklora_spec::Error) -> Self {
        let kind = match &error {
            blocklora_spec::Error::Io { source, .. } => kind_of_io(source),
            blocklora_spec::Error::UnknownVersion { .. } => Kind::UnsupportedSpecVersion,
            _ => Kind::InvalidAdapter,
        };
        Self::new(kind, error.to_string())
    }
}

impl From<blocklora_engine::Error> for Error {
    fn from(error: blocklora_engine::Error) -> Self {
        use blocklora_engine::{Error as E, MethodFault};
        let kind = match &error {
            E::Cancelled => return Self::cancelled(),
            E::Io { source, .. } => kind_of_io(source),
            E::Unsupported { .. } => Kind::NotSupported,
            E::Incompatible { .. } => Kind::IncompatibleArchitecture,
            E::Method { fault: MethodFault::Incompatible, .. } => Kind::IncompatibleArchitecture,
            E::Method { fault: MethodFault::Option, .. } => Kind::InvalidOption,
            E::Prompt { .. } | E::InvalidOption { .. } => Kind::InvalidOption,
            E::Adapter(blocklora_spec::Error::Io { source, .. }) => kind_of_io(source),
            E::Adapter(blocklora_spec::Error::UnknownVersion { .. }) => Kind::UnsupportedSpecVersion,
            E::Adapter(_) => Kind::InvalidAdapter,
            E::Tensor(source) if is_out_of_memory(&source.to_string()) => Kind::OutOfDeviceMemory,
            _ => Kind::Failed,
        };
        Self::new(kind, error.to_string())
    }
}

/// Whether a card's driver says that its memory does not suffice. Backends have no type of their own for that.
fn is_out_of_memory(message: &str) -> bool {
    message.contains("OUT_OF_MEMORY") || message.contains("out of memory")
}

impl From<PluginError> for Error {
    fn from(error: PluginError) -> Self {
        let kind = match &error {
            PluginError::Unknown { .. } => Kind::PluginNotFound,
            PluginError::Incompatible { .. } => Kind::PluginIncompatible,
            PluginError::Quarantined { .. } | PluginError::Disabled { .. } => Kind::PluginQuarantined,
            PluginError::Crashed { .. } => Kind::PluginCrashed,
            PluginError::Settings { .. } => Kind::InvalidOption,
            PluginError::Host { .. } => Kind::Failed,
        };
        Self::new(kind, error.to_string())
    }
}

impl From<rusqlite::Error> for Error {
    fn from(error: rusqlite::Error) -> Self {
        use rusqlite::ErrorCode as C;
        let kind = match error.sqlite_error_code() {
            Some(C::DiskFull) => Kind::StorageFull,
            Some(C::ReadOnly | C::CannotOpen | C::PermissionDenied) => Kind::StorageReadOnly,
            _ => Kind::Failed,
        };
        Self::new(kind, format!("catalogue: {error}"))
    }
}

impl From<zbus::Error> for Error {
    fn from(error: zbus::Error) -> Self {
        Self::failed(format!("D-Bus: {error}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_card_is_told_from_other_failures() {
        assert!(is_out_of_memory("DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")"));
        assert!(!is_out_of_memory("shape mismatch in matmul"));
    }
}
