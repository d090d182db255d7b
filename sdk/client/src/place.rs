//! Where a daemon may be.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// Where to look for the daemon.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Place {
    /// The user's message bus, `$DBUS_SESSION_BUS_ADDRESS`.
    SessionBus,
    /// The machine's message bus.
    SystemBus,
    /// Another message bus, by its D-Bus address.
    Bus(String),
    /// The daemon's own socket: the same objects, without a bus in between.
    Socket(PathBuf),
}

impl Place {
    /// The socket of the user's own daemon, `$XDG_RUNTIME_DIR/blocklora/bus`; none without such a folder.
    pub fn user_socket() -> Option<Self> {
        let folder = std::env::var_os("XDG_RUNTIME_DIR").filter(|folder| !folder.is_empty())?;
        Some(Self::Socket(PathBuf::from(folder).join("blocklora/bus")))
    }

    /// The socket of the machine's daemon.
    pub fn system_socket() -> Self {
        Self::Socket("/run/blocklora/bus".into())
    }

    /// Where daemons usually are, in the order to look: the user's own before the machine's, the socket, which is
    /// faster, before the bus.
    pub fn usual() -> Vec<Self> {
        let mut places: Vec<Self> = Self::user_socket().into_iter().collect();
        if std::env::var_os("DBUS_SESSION_BUS_ADDRESS").is_some_and(|address| !address.is_empty()) {
            places.push(Self::SessionBus);
        }
        places.extend([Self::system_socket(), Self::SystemBus]);
        places
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SessionBus => f.write_str("the session bus"),
            Self::SystemBus => f.write_str("the system bus"),
            Self::Bus(address) => write!(f, "the bus {address}"),
            Self::Socket(path) => write!(f, "the socket {}", path.display()),
        }
    }
}

/// "session", "system", a bus address (`unix:path=...`), or the path of a socket.
impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "session" => Ok(Self::SessionBus),
            "system" => Ok(Self::SystemBus),
            _ if text.starts_with("unix:") || text.starts_with("tcp:") => Ok(Self::Bus(text.into())),
            _ if text.contains('/') => Ok(Self::Socket(text.into())),
            _ => Err(format!("{text:?} is not \"session\", \"system\", a bus address or the path of a socket")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_read_as_people_write_them() {
        assert_eq!("session".parse(), Ok(Place::SessionBus));
        assert_eq!("system".parse(), Ok(Place::SystemBus));
        assert_eq!("unix:path=/x".parse(), Ok(Place::Bus("unix:path=/x".into())));
        assert_eq!("./bus".parse(), Ok(Place::Socket("./bus".into())));
        assert!("bus".parse::<Place>().is_err());
    }
}
