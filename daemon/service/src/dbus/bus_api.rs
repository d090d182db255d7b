//! What a client on the socket expects of a message bus: enough of org.freedesktop.DBus for busctl, gdbus and the usual
//! libraries to work as on a bus with two members, the daemon and itself.

use super::call::{Answer, Call, Refusal};
use super::interfaces::Method;
use super::peer::{OWN_NAME, Peer, PeerKind};
use super::value::{dict, own};
use crate::error::Error;

/// Where a bus answers.
pub const PATH: &str = "/org/freedesktop/DBus";
/// The daemon's name.
pub const NAME: &str = "org.blocklora.Daemon1";
const BUS: &str = "org.freedesktop.DBus";

/// Answers a call of org.freedesktop.DBus.
pub fn answer(call: &Call, member: &str, method: &Method) -> Answer {
    let peer = &call.caller.peer;
    match member {
        "Hello" => call.reply(method, &peer.name),
        "AddMatch" => {
            peer.add_rule(&call.args::<String>()?)?;
            call.reply(method, &())
        }
        "RemoveMatch" => {
            peer.remove_rule(&call.args::<String>()?)?;
            call.reply(method, &())
        }
        "RequestName" => {
            let (name, _): (String, u32) = call.args()?;
            Err(Refusal::bus("AccessDenied", format!("nobody but the daemon has names on this socket, not {name:?}")))
        }
        "ReleaseName" => {
            // 2: there is no such name; 3: it belongs to another.
            let name: String = call.args()?;
            call.reply(method, &if name == NAME { 3u32 } else { 2u32 })
        }
        "GetNameOwner" => {
            let owner = owner(call, &call.args::<String>()?)?;
            call.reply(method, &owner)
        }
        "NameHasOwner" => {
            let known = owner(call, &call.args::<String>()?).is_ok();
            call.reply(method, &known)
        }
        "ListNames" => {
            let mut names = vec![BUS.to_owned(), NAME.to_owned(), OWN_NAME.to_owned()];
            names.extend(call.daemon.hub.socket_names());
            call.reply(method, &names)
        }
        "ListActivatableNames" => call.reply(method, &Vec::<String>::new()),
        "ListQueuedOwners" => {
            let owner = owner(call, &call.args::<String>()?)?;
            call.reply(method, &vec![owner])
        }
        "StartServiceByName" => {
            // 2: it runs already.
            let (name, _): (String, u32) = call.args()?;
            owner(call, &name)?;
            call.reply(method, &2u32)
        }
        "GetConnectionUnixUser" => {
            let (uid, _) = credentials(call)?;
            call.reply(method, &uid)
        }
        "GetConnectionUnixProcessID" => {
            let (_, pid) = credentials(call)?;
            call.reply(method, &pid)
        }
        "GetConnectionCredentials" => {
            let (uid, pid) = credentials(call)?;
            call.reply(method, &dict([("UnixUserID", own(uid)), ("ProcessID", own(pid))]))
        }
        "GetId" => call.reply(method, &peer.connection.server_guid().to_string()),
        _ => Err(Refusal::bus("UnknownMethod", format!("{PATH} has no method {member}"))),
    }
}

fn owner(call: &Call, name: &str) -> Result<String, Refusal> {
    match name {
        BUS => Ok(BUS.to_owned()),
        NAME | OWN_NAME => Ok(OWN_NAME.to_owned()),
        other if call.daemon.hub.socket(other).is_some() => Ok(other.to_owned()),
        other => Err(Refusal::bus("NameHasNoOwner", format!("nobody here has the name {other:?}"))),
    }
}

/// User and process of the connection that the call's argument names.
fn credentials(call: &Call) -> Result<(u32, u32), Refusal> {
    let name: String = call.args()?;
    let owner = owner(call, &name)?;
    match call.daemon.hub.socket(&owner).map(|peer: std::sync::Arc<Peer>| peer.kind) {
        Some(PeerKind::Socket { uid, pid, .. }) => Ok((uid, pid)),
        Some(_) => Err(Error::failed(format!("{name} is not on this socket")).into()),
        None => Ok((call.daemon.uid, std::process::id())),
    }
}
