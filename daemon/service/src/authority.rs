//! Who may do what: the daemon's own user and root everything; on the machine's bus, and for other users on the socket,
//! polkit decides.

use std::collections::HashMap;

use zbus::{Connection, Variant};

use crate::daemon::Daemon;
use crate::dbus::call::Caller;
use crate::dbus::peer::PeerKind;
use crate::error::{Error, Kind, Result};

/// Asks polkit, if it can be reached.
#[derive(Default)]
pub struct Authority {
    polkit: std::sync::OnceLock<Connection>,
}

#[zbus::proxy(
    interface = "org.freedesktop.PolicyKit1.Authority",
    default_service = "org.freedesktop.PolicyKit1",
    default_path = "/org/freedesktop/PolicyKit1/Authority"
)]
trait Polkit {
    /// `subject` is a kind and its details; the answer: authorised, a challenge would help, details.
    fn check_authorization(
        &self,
        subject: &(&str, HashMap<&str, Variant<'_>>),
        action: &str,
        details: HashMap<&str, &str>,
        flags: u32,
        cancellation: &str,
    ) -> zbus::Result<(bool, bool, HashMap<String, String>)>;
}

impl Authority {
    /// Polkit lives on this connection, to the machine's bus.
    pub fn set_system_bus(&self, connection: Connection) {
        // The first one stays: there is only one.
        let _ = self.polkit.set(connection);
    }

    /// Whether polkit is asked.
    pub fn has_polkit(&self) -> bool {
        self.polkit.get().is_some()
    }

    /// Whether `caller` may do `action`, the last part of a polkit action's name. Only if `interactive` is somebody asked
    /// for a password.
    pub async fn check(&self, daemon: &Daemon, caller: &Caller, action: &str, interactive: bool) -> Result<()> {
        if caller.uid == daemon.uid || caller.uid == 0 {
            return Ok(());
        }
        let id = format!("org.blocklora.Daemon1.{action}");
        let refused =
            |why: &str| Error::new(Kind::NotAuthorized, format!("user {} may not do {id}: {why}", caller.uid));
        let Some(polkit) = self.polkit.get() else {
            // Who may open the socket was decided by its owner; what goes beyond drawing needs somebody to ask.
            return if action == "generate" { Ok(()) } else { Err(refused("polkit cannot be asked here")) };
        };
        let subject = match caller.peer.kind {
            PeerKind::Socket { uid, pid, start } => {
                let start = start.ok_or_else(|| refused("the process that connected has ended"))?;
                let details = HashMap::from([
                    ("pid", Variant::from(pid)),
                    ("start-time", Variant::from(start)),
                    ("uid", Variant::from(i32::try_from(uid).unwrap_or(-1))),
                ]);
                ("unix-process", details)
            }
            PeerKind::SessionBus | PeerKind::SystemBus => {
                ("system-bus-name", HashMap::from([("name", Variant::from(caller.client.clone()))]))
            }
        };
        let fail = |e: zbus::Error| refused(&format!("polkit does not answer: {e}"));
        let proxy = PolkitProxy::new(polkit).await.map_err(fail)?;
        let answer = proxy.check_authorization(&subject, &id, HashMap::new(), u32::from(interactive), "").await;
        match answer.map_err(fail)? {
            (true, _, _) => Ok(()),
            (false, true, _) if !interactive => {
                Err(refused("it needs a password; call with interactive authorization allowed"))
            }
            _ => Err(refused("polkit refused")),
        }
    }
}

/// When a process started, in clock ticks after boot. It is read when a client connects; polkit compares it with that of
/// the process which has the id when it is asked, and so refuses one that took the id over since.
pub fn start_time(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything; the start time is the 20th field after it.
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::start_time;

    #[test]
    fn a_process_has_a_start_time() {
        assert!(start_time(std::process::id()).is_some_and(|ticks| ticks > 0));
        assert_eq!(start_time(0), None);
    }
}
