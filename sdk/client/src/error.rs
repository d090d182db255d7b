//! What can go wrong, as types.

use std::io;
use std::path::PathBuf;

/// The prefix of the daemon's error names.
pub const PREFIX: &str = "org.blocklora.Daemon1.Error.";

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident),+ $(,)?) => {
        /// The daemon's named errors.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum ErrorKind {
            $($(#[$doc])* $name),+
        }

        impl ErrorKind {
            /// All of them, in the order of the interface's documentation.
            pub const ALL: &'static [Self] = &[$(Self::$name),+];

            /// Its name behind [`PREFIX`].
            pub fn name(self) -> &'static str {
                match self { $(Self::$name => stringify!($name)),+ }
            }
        }
    };
}

kinds! {
    /// Anything that has no name of its own.
    Failed,
    /// The job was cancelled.
    Cancelled,
    /// The job's time limit passed.
    TimedOut,
    /// Known, but not by this daemon.
    NotSupported,
    /// The caller may not do this.
    NotAuthorized,
    /// The queue, or the caller's share of it, is full.
    QueueFull,
    /// The device is held by another process or job.
    DeviceBusy,
    /// The device's memory does not suffice.
    OutOfDeviceMemory,
    /// The device is gone.
    DeviceLost,
    /// No such model, or its folder is missing or damaged.
    ModelNotFound,
    /// No such adapter in the library, or its file is missing.
    AdapterNotFound,
    /// The adapter was made for another model.
    IncompatibleArchitecture,
    /// The file is not a valid adapter.
    InvalidAdapter,
    /// The adapter's format version is unknown.
    UnsupportedSpecVersion,
    /// Two adapters, or an adapter and a lease, own the same rows.
    SlotConflict,
    /// An option, object path or file descriptor is wrong.
    InvalidOption,
    /// Somebody else changed the composition first.
    GenerationConflict,
    /// The job still runs.
    JobNotFinished,
    /// The disk is full.
    StorageFull,
    /// The state folder cannot be written.
    StorageReadOnly,
    /// No plugin has this id.
    PluginNotFound,
    /// The plugin was built for another ABI.
    PluginIncompatible,
    /// The plugin is quarantined.
    PluginQuarantined,
    /// The plugin crashed or panicked.
    PluginCrashed,
    /// The daemon is stopping.
    ShuttingDown,
}

impl ErrorKind {
    /// The kind of the D-Bus error `name`; none if it is not one of the daemon's.
    pub fn from_name(name: &str) -> Option<Self> {
        let name = name.strip_prefix(PREFIX)?;
        Self::ALL.iter().copied().find(|kind| kind.name() == name)
    }
}

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The daemon said no; the message is its own, one line, and says what to do.
    #[error("{message}")]
    Daemon {
        /// Which of its named errors.
        kind: ErrorKind,
        /// What it says.
        message: String,
    },
    /// No daemon answers where one was looked for.
    #[error("no daemon answers on {place}: {reason}")]
    NotRunning {
        /// Where.
        place: String,
        /// What the system says.
        reason: String,
    },
    /// The connection ended; what the call did is not known.
    #[error("the connection to the daemon ended: {0}")]
    Disconnected(String),
    /// An object that is not there, or no longer.
    #[error("the daemon has no such object: {0}")]
    NoSuchObject(String),
    /// The reply is not what the interface describes.
    #[error("the daemon's reply is not as its interface says: {0}")]
    Protocol(String),
    /// A file of the caller's.
    #[error("{}: {source}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The result of a call.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Which of the daemon's named errors it is, if it is one.
    pub fn kind(&self) -> Option<ErrorKind> {
        match self {
            Self::Daemon { kind, .. } => Some(*kind),
            _ => None,
        }
    }

    /// Whether the daemon is not there, or no longer: connecting again may help.
    pub fn is_disconnected(&self) -> bool {
        matches!(self, Self::Disconnected(_) | Self::NotRunning { .. })
    }

    pub(crate) fn io(path: impl Into<PathBuf>, source: io::Error) -> Self {
        Self::Io { path: path.into(), source }
    }

    pub(crate) fn protocol(reason: impl ToString) -> Self {
        Self::Protocol(reason.to_string())
    }

    /// An error that was sent as a name and a message, as in a job's property Error.
    pub fn from_name(name: &str, message: &str) -> Self {
        match ErrorKind::from_name(name) {
            Some(kind) => Self::Daemon { kind, message: message.to_owned() },
            None => Self::Daemon { kind: ErrorKind::Failed, message: format!("{name}: {message}") },
        }
    }
}

impl From<zbus::Error> for Error {
    fn from(error: zbus::Error) -> Self {
        match error {
            zbus::Error::MethodError(name, message, _) => Self::from_name(&name, &message.unwrap_or_default()),
            zbus::Error::FDO(error) => (*error).into(),
            zbus::Error::InputOutput(source) => Self::Disconnected(source.to_string()),
            zbus::Error::Handshake(reason) => Self::Disconnected(reason),
            other => Self::Protocol(other.to_string()),
        }
    }
}

impl From<zbus::fdo::Error> for Error {
    fn from(error: zbus::fdo::Error) -> Self {
        use zbus::fdo::Error as F;
        match error {
            F::ZBus(inner) => inner.into(),
            F::ServiceUnknown(reason) | F::NameHasNoOwner(reason) => {
                Self::NotRunning { place: "the message bus".into(), reason }
            }
            F::NoReply(reason) | F::Disconnected(reason) | F::Timeout(reason) | F::TimedOut(reason) => {
                Self::Disconnected(reason)
            }
            F::UnknownObject(reason) | F::UnknownMethod(reason) | F::UnknownInterface(reason) => {
                Self::NoSuchObject(reason)
            }
            // The bus's policy, before the daemon sees anything.
            F::AccessDenied(message) | F::AuthFailed(message) => {
                Self::Daemon { kind: ErrorKind::NotAuthorized, message }
            }
            F::LimitsExceeded(message) => Self::Daemon { kind: ErrorKind::QueueFull, message },
            F::InvalidArgs(message) => Self::Daemon { kind: ErrorKind::InvalidOption, message },
            F::Failed(message) => Self::Daemon { kind: ErrorKind::Failed, message },
            other => Self::Protocol(other.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_documented_error_has_a_kind_and_no_other() {
        let interface = include_str!("../interfaces/org.blocklora.Daemon1.Manager.xml");
        let list = interface.split("Errors, all beginning with").nth(1).unwrap_or_default();
        let list = list.split("polkit actions").next().unwrap_or_default();
        let documented: Vec<&str> = list
            .lines()
            .filter_map(|line| line.strip_prefix("    ").filter(|rest| !rest.starts_with(' ')))
            .filter_map(|line| line.split_whitespace().next())
            .collect();
        let known: Vec<&str> = ErrorKind::ALL.iter().map(|kind| kind.name()).collect();
        assert_eq!(known, documented);
    }

    #[test]
    fn names_become_kinds() {
        assert_eq!(ErrorKind::from_name("org.blocklora.Daemon1.Error.QueueFull"), Some(ErrorKind::QueueFull));
        assert_eq!(ErrorKind::from_name("org.freedesktop.DBus.Error.QueueFull"), None);
        let error = Error::from_name("org.example.Odd", "strange");
        assert_eq!(error.kind(), Some(ErrorKind::Failed));
        assert_eq!(error.to_string(), "org.example.Odd: strange");
    }
}
