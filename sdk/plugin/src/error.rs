//! What can go wrong: a code for programs and a message for people.

use std::fmt;

/// What kind of thing went wrong. Codes may be added; a host treats one that it does not know as [`Code::Failed`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[repr(u32)]
pub enum Code {
    /// Anything that no other code says.
    Failed = 1,
    /// The job was cancelled. Not a fault: whoever gets it passes it on at once.
    Cancelled = 2,
    /// A setting is wrong; the message names its key and what is allowed.
    InvalidConfig = 3,
    /// Adapters, layers or pictures do not fit each other or the method; the message names them and the cure.
    Incompatible = 4,
    /// The method or the host cannot do this at all.
    NotSupported = 5,
    /// A number that must be finite is not.
    NotFinite = 6,
    /// The plugin panicked. Made by [`export_plugin!`](crate::export_plugin) only.
    Panicked = 7,
    /// One side of the ABI handed the other something that its contract forbids (a wrong shape, an index outside).
    Contract = 8,
    /// A service of the host failed. Plugins pass it on unchanged; the host knows the cause.
    Host = 9,
}

/// An error on either side of the ABI: a code and one line that names what is wrong and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// What kind.
    pub code: Code,
    /// One line for people.
    pub message: String,
}

/// The SDK's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error of this kind.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    /// The job was cancelled.
    pub fn cancelled() -> Self {
        Self::new(Code::Cancelled, "cancelled")
    }

    /// The setting `key` is wrong: `key = value: reason`, where the reason says what is allowed.
    pub fn config(key: &str, value: impl fmt::Display, reason: impl fmt::Display) -> Self {
        Self::new(Code::InvalidConfig, format!("{key} = {value}: {reason}"))
    }

    /// Things that do not fit each other.
    pub fn incompatible(message: impl Into<String>) -> Self {
        Self::new(Code::Incompatible, message)
    }

    /// `what` is `value`, which is not finite, at `step`.
    pub fn not_finite(what: &str, value: f32, step: usize) -> Self {
        Self::new(Code::NotFinite, format!("{what} is not finite ({value}) at step {step}"))
    }

    /// A broken contract of the ABI.
    pub fn contract(message: impl Into<String>) -> Self {
        Self::new(Code::Contract, message)
    }

    /// Whether the job was cancelled.
    pub fn is_cancelled(&self) -> bool {
        self.code == Code::Cancelled
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}
