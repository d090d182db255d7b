//! Signals: to the bus, and on the socket to those whose object it is or who asked.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use zbus::Message;

use super::MESSAGE_BYTES_MAX;
use super::peer::{Peer, PeerKind};
use super::value::{Dict, clone_dict};
use crate::objects::{Object, ROOT, object_path};

/// All connections.
#[derive(Default)]
pub struct Hub {
    peers: Mutex<BTreeMap<u64, Arc<Peer>>>,
}

impl Hub {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<Peer>>> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new connection.
    pub fn add(&self, peer: Arc<Peer>) {
        self.lock().insert(peer.id, peer);
    }

    /// A connection has ended.
    pub fn remove(&self, peer: &Peer) {
        self.lock().remove(&peer.id);
    }

    /// Connections on the socket.
    pub fn sockets(&self) -> usize {
        self.lock().values().filter(|peer| matches!(peer.kind, PeerKind::Socket { .. })).count()
    }

    /// Whether anybody is connected to the socket, or owns something on the bus.
    pub fn has_clients(&self) -> bool {
        self.lock().values().any(|peer| matches!(peer.kind, PeerKind::Socket { .. }) || peer.has_callers())
    }

    /// Whether the client is connected: to the socket, or to a bus.
    pub fn is_connected(&self, client: &str) -> bool {
        self.lock().values().any(|peer| peer.has(client))
    }

    /// The connection called `name`, on the socket.
    pub fn socket(&self, name: &str) -> Option<Arc<Peer>> {
        self.lock().values().find(|peer| peer.name == name && !name.is_empty()).cloned()
    }

    /// The names of the connections on the socket.
    pub fn socket_names(&self) -> Vec<String> {
        self.lock().values().filter(|peer| !peer.name.is_empty()).map(|peer| peer.name.clone()).collect()
    }

    /// Tells all connections that the daemon ends.
    pub fn close(&self) {
        for peer in self.lock().values() {
            peer.close();
        }
    }

    /// `body` is asked for with the texts that only the object's user reads, and without.
    fn emit<B>(&self, path: &str, interface: &str, member: &str, object: &Object, body: impl Fn(bool) -> B)
    where
        B: serde::Serialize + zbus::DynamicType,
    {
        let peers: Vec<Arc<Peer>> = self.lock().values().cloned().collect();
        // With texts and without, and of each one for all buses and one for all sockets: only on sockets do messages name
        // their sender.
        let mut built: [Option<Message>; 4] = Default::default();
        for peer in peers {
            let texts = object.reader().is_none_or(|uid| peer.reads(uid));
            let message = &mut built[2 * usize::from(texts) + usize::from(peer.name.is_empty())];
            if message.is_none() {
                let builder = peer.signed(Message::signal(path, interface, member));
                match builder.build(&body(texts)) {
                    // As for replies.
                    Ok(new) if new.data().len() > MESSAGE_BYTES_MAX => {
                        let bytes = new.data().len();
                        return tracing::error!("signal {member} of {path}: {bytes} bytes are too many: not sent");
                    }
                    Ok(new) => *message = Some(new),
                    Err(error) => return tracing::error!("signal {member} of {path}: {error}"),
                }
            }
            if let Some(message) = message.as_ref().filter(|message| peer.wants(message, object.client())) {
                peer.post(message);
            }
        }
    }

    /// An object has appeared.
    pub fn added(&self, path: &str, object: &Object, properties: &Dict) {
        let body = |texts| {
            let properties = shown(object, properties, texts);
            (object_path(path), std::collections::HashMap::from([(object.interface(), properties)]))
        };
        self.emit(ROOT, "org.freedesktop.DBus.ObjectManager", "InterfacesAdded", object, body);
    }

    /// An object has gone.
    pub fn removed(&self, path: &str, object: &Object) {
        let body = |_| (object_path(path), vec![object.interface()]);
        self.emit(ROOT, "org.freedesktop.DBus.ObjectManager", "InterfacesRemoved", object, body);
    }

    /// Some properties have changed.
    pub fn changed(&self, path: &str, object: &Object, changed: &Dict) {
        let body = |texts| (object.interface(), shown(object, changed, texts), Vec::<String>::new());
        self.emit(path, "org.freedesktop.DBus.Properties", "PropertiesChanged", object, body);
    }

    /// A job has ended.
    pub fn finished(&self, path: &str, object: &Object, result: &str, details: &Dict) {
        let body = |texts: bool| {
            let mut details = clone_dict(details);
            if !texts {
                // The error's name is none of the texts.
                details.retain(|key, _| key == "error");
            }
            (result.to_owned(), details)
        };
        self.emit(path, "org.blocklora.Daemon1.Job", "Finished", object, body);
    }
}

/// Properties of `object`, with the texts that only its user reads or without.
fn shown(object: &Object, properties: &Dict, texts: bool) -> Dict {
    if texts { clone_dict(properties) } else { object.without_texts(properties) }
}
