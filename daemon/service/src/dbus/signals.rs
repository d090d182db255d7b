//! Signals: to the bus, and on the socket to those whose object it is or who asked.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use zbus::Message;

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

    fn emit<B>(&self, path: &str, interface: &str, member: &str, client: Option<&str>, body: &B)
    where
        B: serde::Serialize + zbus::DynamicType,
    {
        let peers: Vec<Arc<Peer>> = self.lock().values().cloned().collect();
        if peers.is_empty() {
            return;
        }
        // One for all buses and one for all sockets: only on sockets do messages name their sender.
        let mut built: [Option<Message>; 2] = [None, None];
        for peer in peers {
            let message = &mut built[usize::from(peer.name.is_empty())];
            if message.is_none() {
                let builder = peer.signed(Message::signal(path, interface, member));
                match builder.build(body) {
                    Ok(new) => *message = Some(new),
                    Err(error) => return tracing::error!("signal {member} of {path}: {error}"),
                }
            }
            if let Some(message) = message.as_ref().filter(|message| peer.wants(message, client)) {
                peer.post(message);
            }
        }
    }

    /// An object has appeared.
    pub fn added(&self, path: &str, object: &Object, properties: &Dict) {
        let interfaces = std::collections::HashMap::from([(object.interface(), clone_dict(properties))]);
        let body = (object_path(path), interfaces);
        self.emit(ROOT, "org.freedesktop.DBus.ObjectManager", "InterfacesAdded", object.client(), &body);
    }

    /// An object has gone.
    pub fn removed(&self, path: &str, object: &Object) {
        let body = (object_path(path), vec![object.interface()]);
        self.emit(ROOT, "org.freedesktop.DBus.ObjectManager", "InterfacesRemoved", object.client(), &body);
    }

    /// Some properties have changed.
    pub fn changed(&self, path: &str, object: &Object, changed: &Dict) {
        let body = (object.interface(), clone_dict(changed), Vec::<String>::new());
        self.emit(path, "org.freedesktop.DBus.Properties", "PropertiesChanged", object.client(), &body);
    }

    /// A job has ended.
    pub fn finished(&self, path: &str, object: &Object, result: &str, details: &Dict) {
        let body = (result, clone_dict(details));
        self.emit(path, "org.blocklora.Daemon1.Job", "Finished", object.client(), &body);
    }
}
