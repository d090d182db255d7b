//! Where clients come from: a message bus, and the socket.

use std::fs::File;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::FutureExt;
use tokio::net::{UnixListener, UnixStream};
use zbus::connection::Builder;
use zbus::fdo::{RequestNameFlags, RequestNameReply};
use zbus::{Connection, Guid};

use super::bus_api::NAME;
use super::peer::{Peer, PeerKind};
use super::stream::ClientStream;
use crate::authority::start_time;
use crate::config::Bus;
use crate::daemon::Daemon;
use crate::error::{Error, Kind, Result};

/// How long a client may take to say who it is.
const HANDSHAKE_PATIENCE: Duration = Duration::from_secs(10);

/// Calls of a client that have arrived and are not looked at yet; more stay in its socket.
const CALLS_QUEUED_MAX: NonZeroUsize = NonZeroUsize::MIN.saturating_add(7);

static NEXT_PEER: AtomicU64 = AtomicU64::new(1);

/// A connection's place among those that may be open; given back however what serves it ends.
struct Slot(Arc<AtomicUsize>);

impl Slot {
    fn take(open: &Arc<AtomicUsize>) -> Self {
        open.fetch_add(1, Ordering::AcqRel);
        Self(open.clone())
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Connects to a bus and serves it; the objects are there before the name is.
pub async fn on_bus(daemon: &Arc<Daemon>, bus: Bus) -> Result<Option<Connection>> {
    let (builder, kind, which) = match bus {
        Bus::Session => (Builder::session(), PeerKind::SessionBus, "session"),
        Bus::System => (Builder::system(), PeerKind::SystemBus, "system"),
        Bus::None => return Ok(None),
    };
    let fail = |e: zbus::Error| Error::failed(format!("{which} bus: {e}"));
    let stream = builder.build_message_stream().await.map_err(fail)?;
    let connection = Connection::from(&stream);
    let peer = Peer::new(NEXT_PEER.fetch_add(1, Ordering::Relaxed), String::new(), kind, connection.clone());
    let (served, serving) = (daemon.clone(), peer.clone());
    tokio::spawn(async move {
        serving.serve(served.clone(), stream).await;
        if !served.is_stopping() {
            tracing::error!("the {which} bus has gone: the daemon ends");
            served.request_stop();
        }
    });
    if kind == PeerKind::SystemBus {
        daemon.authority.set_system_bus(connection.clone());
    }
    let name = zbus::names::WellKnownName::from_static_str(NAME).map_err(|e| Error::failed(e.to_string()))?;
    let bus = zbus::fdo::DBusProxy::new(&connection).await.map_err(fail)?;
    let reply = bus.request_name(name, RequestNameFlags::DO_NOT_QUEUE).await.map_err(|e| fail(e.into()))?;
    match reply {
        RequestNameReply::PrimaryOwner | RequestNameReply::AlreadyOwner => Ok(Some(connection)),
        _ => Err(Error::new(
            Kind::DeviceBusy,
            format!("{which} bus: another daemon has the name {NAME}; stop it first, or set daemon.bus to \"none\""),
        )),
    }
}

/// Serves the socket until the daemon ends.
pub async fn on_socket(daemon: Arc<Daemon>, listener: UnixListener) {
    let guid = zbus::OwnedGuid::from(Guid::generate());
    let open = Arc::new(AtomicUsize::new(0));
    // A descriptor for when there are no others.
    let mut spare = File::open("/dev/null").ok();
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors, most likely: it passes. Who connects meanwhile is turned away, not left waiting.
                tracing::warn!("socket: {error}");
                if spare.take().is_some() {
                    drop(listener.accept().now_or_never());
                }
                spare = File::open("/dev/null").ok();
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        if open.load(Ordering::Acquire) >= daemon.config().limits.connections_max {
            tracing::warn!("socket: a client is turned away: limits.connections_max are connected");
            continue;
        }
        let (daemon, guid, slot) = (daemon.clone(), guid.clone(), Slot::take(&open));
        tokio::spawn(async move {
            let _slot = slot;
            if let Err(error) = serve_client(daemon, stream, guid).await {
                tracing::debug!("socket: {error}");
            }
        });
    }
}

/// Serves one connection until it ends.
pub async fn one(daemon: Arc<Daemon>, stream: std::os::unix::net::UnixStream) -> Result<()> {
    let stream = UnixStream::from_std(stream).map_err(|e| Error::io("connection", &e))?;
    serve_client(daemon, stream, Guid::generate().into()).await
}

async fn serve_client(daemon: Arc<Daemon>, stream: UnixStream, guid: zbus::OwnedGuid) -> Result<()> {
    let credentials = stream.peer_cred().map_err(|e| Error::io("credentials of a client", &e))?;
    let pid = credentials.pid().and_then(|pid| u32::try_from(pid).ok()).unwrap_or(0);
    let kind = PeerKind::Socket { uid: credentials.uid(), pid, start: start_time(pid) };
    let builder = Builder::socket(ClientStream(stream)).user_id(credentials.uid()).server(guid).p2p();
    let handshake = builder.max_queued(CALLS_QUEUED_MAX).build_message_stream();
    let stream = tokio::time::timeout(HANDSHAKE_PATIENCE, handshake).await;
    let stream = stream.map_err(|_| Error::new(Kind::TimedOut, "a client did not say who it is"))??;
    let id = NEXT_PEER.fetch_add(1, Ordering::Relaxed);
    let peer = Peer::new(id, format!(":peer.{id}"), kind, Connection::from(&stream));
    peer.serve(daemon, stream).await;
    Ok(())
}
