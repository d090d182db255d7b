//! One connection: to a message bus, or of one client on the socket. Calls are answered in order as long as they need
//! not wait; those that wait go on beside the others.

use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::Poll;
use std::time::Duration;

use futures_util::{FutureExt, StreamExt};
use tokio::sync::Notify;
use tokio::sync::futures::Notified;
use zbus::message::{Builder, Type};
use zbus::{Connection, MatchRule, Message, MessageStream};

use super::MESSAGE_BYTES_MAX;
use super::call::{self, Call, Caller, Refusal};
use super::outgoing::{Outgoing, until, weight};
use crate::daemon::Daemon;
use crate::error::Error;

/// The daemon's own unique name on the socket.
pub const OWN_NAME: &str = ":peer.0";

/// How long a message may take to leave. A client that does not read is disconnected then, as by a bus.
const SEND_PATIENCE: Duration = Duration::from_secs(30);
/// What one client's unanswered calls may weigh before no more of them are read.
const INCOMING_MAX: usize = 2 * MESSAGE_BYTES_MAX;

/// What is at the other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerKind {
    /// The user's bus.
    SessionBus,
    /// The machine's bus.
    SystemBus,
    /// A client on the socket; credentials come from the kernel.
    Socket {
        /// Its user.
        uid: u32,
        /// Its process.
        pid: u32,
        /// When that started, as was seen when it connected; none: it was gone already.
        start: Option<u64>,
    },
}

/// One connection.
pub struct Peer {
    /// Counts connections.
    pub id: u64,
    /// The client's unique name on the socket; empty for a bus.
    pub name: String,
    /// What is at the other end.
    pub kind: PeerKind,
    /// The connection.
    pub connection: Connection,
    outgoing: Outgoing,
    closing: Notify,
    rules: Mutex<Vec<(String, MatchRule<'static>)>>,
    /// Unanswered calls, and what they weigh.
    calls: AtomicUsize,
    incoming: AtomicUsize,
    /// A call's place is free.
    freed: Notify,
    /// On a bus: its clients by unique name; none while the bus is asked who that is.
    callers: Mutex<HashMap<String, Option<(u32, u32)>>>,
    /// The client, or one of the bus, has gone.
    gone: Notify,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A call's place among those of its client that are unanswered; given back when the answer has left.
pub struct Place {
    peer: Arc<Peer>,
    weight: usize,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.peer.calls.fetch_sub(1, Ordering::AcqRel);
        self.peer.incoming.fetch_sub(self.weight, Ordering::AcqRel);
        self.peer.freed.notify_waiters();
    }
}

impl Peer {
    /// A connection, and the task that writes to it.
    pub fn new(id: u64, name: String, kind: PeerKind, connection: Connection) -> Arc<Self> {
        Arc::new_cyclic(|weak: &Weak<Self>| {
            let weak = weak.clone();
            let give_up = move || {
                if let Some(peer) = weak.upgrade() {
                    tracing::warn!("client {} does not read: disconnected", peer.name);
                    peer.close();
                }
            };
            let outgoing = Outgoing::new(connection.clone(), SEND_PATIENCE, give_up);
            let (closing, rules, callers, gone) = Default::default();
            let (calls, incoming, freed) = Default::default();
            Self { id, name, kind, connection, outgoing, closing, rules, calls, incoming, freed, callers, gone }
        })
    }

    /// A message with its sender, which a bus adds by itself.
    pub fn signed<'a>(&self, builder: Builder<'a>) -> Builder<'a> {
        if self.name.is_empty() { builder } else { builder.sender(OWN_NAME) }
    }

    /// Ends the connection.
    pub fn close(&self) {
        self.closing.notify_one();
    }

    /// Waits until the client has gone, or on a bus any of its clients: whoever waits for something looks then whether its
    /// own is still there. What happens after this call counts, also before it is waited for.
    pub fn gone(&self) -> Notified<'_> {
        self.gone.notified()
    }

    /// Whether all who get signals here may read what user `uid` asked for.
    pub fn reads(&self, uid: u32) -> bool {
        match self.kind {
            PeerKind::SessionBus => true,
            // A signal on it goes to everyone.
            PeerKind::SystemBus => false,
            PeerKind::Socket { uid: own, .. } => [uid, 0, rustix::process::geteuid().as_raw()].contains(&own),
        }
    }

    /// Whether a signal about an object of `client` goes here.
    pub fn wants(&self, message: &Message, client: Option<&str>) -> bool {
        match self.kind {
            PeerKind::SessionBus | PeerKind::SystemBus => true,
            PeerKind::Socket { .. } => {
                client == Some(self.name.as_str())
                    || lock(&self.rules).iter().any(|(_, rule)| rule.matches(message).unwrap_or(false))
            }
        }
    }

    /// Adds a match rule.
    pub fn add_rule(&self, text: &str) -> Result<(), Refusal> {
        const RULES_MAX: usize = 256;
        const RULE_BYTES_MAX: usize = 1024;
        if text.len() > RULE_BYTES_MAX {
            let message = format!("a match rule of {} bytes, at most {RULE_BYTES_MAX} are allowed", text.len());
            return Err(Refusal::bus("LimitsExceeded", message));
        }
        let invalid = |e: zbus::Error| Refusal::bus("MatchRuleInvalid", format!("{text:?}: {e}"));
        let rule = MatchRule::try_from(text).map_err(invalid)?.into_owned();
        // A name on this socket is always the daemon's own.
        let mut rules = lock(&self.rules);
        if rules.len() >= RULES_MAX {
            return Err(Refusal::bus("LimitsExceeded", format!("{RULES_MAX} match rules are there already")));
        }
        rules.push((text.to_owned(), without_sender(rule)));
        Ok(())
    }

    /// Removes a match rule.
    pub fn remove_rule(&self, text: &str) -> Result<(), Refusal> {
        let mut rules = lock(&self.rules);
        let at = rules.iter().position(|(rule, _)| rule == text);
        let at = at.ok_or_else(|| Refusal::bus("MatchRuleNotFound", format!("{text:?} was never added")))?;
        rules.remove(at);
        Ok(())
    }

    /// Sends a signal; a client whose signals pile up is disconnected.
    pub fn post(&self, message: &Message) {
        if !self.outgoing.signal(message) {
            tracing::warn!("client {}: its signals pile up: disconnected", self.name);
            self.close();
        }
    }

    /// Waits until one more call may be read: who does not read the answers, or sends more than is answered, waits.
    async fn room(&self) {
        self.outgoing.room().await;
        // All clients of a bus share its connection.
        let most = if self.name.is_empty() { INCOMING_MAX.saturating_mul(8) } else { INCOMING_MAX };
        until(&self.freed, || self.incoming.load(Ordering::Acquire) <= most).await;
    }

    /// Whether the client is at the other end, or on this bus.
    pub fn has(&self, client: &str) -> bool {
        if self.name.is_empty() { lock(&self.callers).contains_key(client) } else { self.name == client }
    }

    /// Whether clients of a bus own something here.
    pub fn has_callers(&self) -> bool {
        !lock(&self.callers).is_empty()
    }

    /// Serves the connection until it ends.
    pub async fn serve(self: Arc<Self>, daemon: Arc<Daemon>, mut stream: MessageStream) {
        daemon.hub.add(self.clone());
        loop {
            let next = async {
                self.room().await;
                stream.next().await
            };
            let next = tokio::select! {
                next = next => next,
                () = self.closing.notified() => None,
            };
            let message = match next {
                Some(Ok(message)) => message,
                Some(Err(error)) => {
                    tracing::debug!("connection {} {}: {error}", self.id, self.name);
                    break;
                }
                None => break,
            };
            match message.message_type() {
                Type::MethodCall => self.clone().handle(&daemon, message).await,
                Type::Signal if self.name.is_empty() => self.bus_signal(&daemon, &message),
                _ => {}
            }
        }
        daemon.hub.remove(&self);
        self.gone.notify_waiters();
        let clients: Vec<String> = match self.name.is_empty() {
            true => std::mem::take(&mut *lock(&self.callers)).into_keys().collect(),
            false => vec![self.name.clone()],
        };
        // The end of a training is written to the disk, which may take long.
        let gone = tokio::task::spawn_blocking(move || clients.iter().for_each(|client| daemon.client_gone(client)));
        // A bug in it is in the log.
        let _ = gone.await;
        // Fails only where the other end was faster.
        let _ = self.connection.clone().close().await;
    }

    async fn handle(self: Arc<Self>, daemon: &Arc<Daemon>, message: Message) {
        let weight = weight(&message);
        let place = Place { peer: self.clone(), weight };
        self.incoming.fetch_add(weight, Ordering::AcqRel);
        let most = daemon.config().limits.calls_per_client_max;
        // As in `room`.
        let most = if self.name.is_empty() { most.saturating_mul(64) } else { most };
        if self.calls.fetch_add(1, Ordering::AcqRel) >= most {
            let refusal = Refusal::bus("LimitsExceeded", format!("{most} calls are unanswered already"));
            if let Some(reply) = call::error_reply(&self, &message, refusal) {
                self.outgoing.reply(reply, None);
            }
            return;
        }
        daemon.note_activity();
        let (peer, own) = (self.clone(), self.clone());
        let daemon = daemon.clone();
        let mut answer = Box::pin(async move {
            let work = async {
                let caller = peer.clone().caller(&message).await?;
                call::answer(Call { daemon, caller, message: message.clone() }).await
            };
            let answered = AssertUnwindSafe(work).catch_unwind().await;
            let answered = answered.unwrap_or_else(|_| Err(Error::failed("a bug in the daemon, see its log").into()));
            match answered {
                Ok(reply) => call::wants_reply(&message).then_some(reply),
                Err(refusal) => call::error_reply(&own, &message, refusal),
            }
        });
        match futures_util::poll!(&mut answer) {
            Poll::Ready(Some(reply)) => self.outgoing.reply(reply, Some(place)),
            Poll::Ready(None) => {}
            Poll::Pending => {
                tokio::spawn(async move {
                    if let Some(reply) = answer.await {
                        self.outgoing.reply(reply, Some(place));
                    }
                });
            }
        }
    }

    /// Who sent `message`.
    async fn caller(self: Arc<Self>, message: &Message) -> Result<Caller, Refusal> {
        if let PeerKind::Socket { uid, pid, .. } = self.kind {
            return Ok(Caller { client: self.name.clone(), uid, pid, peer: self });
        }
        let header = message.header();
        let sender = header.sender().map(|name| name.to_string());
        let sender = sender.ok_or_else(|| Refusal::bus("InvalidArgs", "the message has no sender"))?;
        let known = lock(&self.callers).get(&sender).copied().flatten();
        let (uid, pid) = match known {
            Some(known) => known,
            None => self.credentials(&sender).await?,
        };
        Ok(Caller { client: sender, uid, pid, peer: self })
    }

    /// Asks the bus who `sender` is, and to say when it goes.
    async fn credentials(&self, sender: &str) -> Result<(u32, u32), Refusal> {
        let fail = |e: zbus::Error| Refusal::from(Error::failed(format!("the bus does not know {sender}: {e}")));
        let bus = zbus::fdo::DBusProxy::new(&self.connection).await.map_err(fail)?;
        let rule = gone_rule(sender).map_err(fail)?;
        // First the rule: who goes in between is then unknown to the bus, or no longer among the callers below.
        lock(&self.callers).entry(sender.to_owned()).or_default();
        if let Err(error) = bus.add_match_rule(rule.clone()).await {
            self.forget(sender);
            return Err(fail(error.into()));
        }
        let name = zbus::names::BusName::try_from(sender.to_owned()).map_err(fail)?;
        let credentials = match bus.get_connection_credentials(name).await {
            Ok(credentials) => credentials,
            Err(error) => {
                self.forget(sender);
                // What matters is the first error.
                let _ = bus.remove_match_rule(rule).await;
                return Err(fail(error.into()));
            }
        };
        let Some(uid) = credentials.unix_user_id() else {
            self.forget(sender);
            return Err(Error::failed(format!("the bus does not know {sender}'s user")).into());
        };
        let found = (uid, credentials.process_id().unwrap_or(0));
        match lock(&self.callers).get_mut(sender) {
            Some(known) => *known = Some(found),
            None => return Err(Error::failed(format!("{sender} has gone")).into()),
        }
        Ok(found)
    }

    /// The bus does not say who the client is; another call of it may know by now.
    fn forget(&self, sender: &str) {
        let mut callers = lock(&self.callers);
        if callers.get(sender).is_some_and(Option::is_none) {
            callers.remove(sender);
        }
    }

    /// On a bus: a client that has gone.
    fn bus_signal(self: &Arc<Self>, daemon: &Arc<Daemon>, message: &Message) {
        let header = message.header();
        let from_bus = header.sender().is_some_and(|sender| sender.as_str() == "org.freedesktop.DBus");
        if !from_bus || header.member().is_none_or(|member| member.as_str() != "NameOwnerChanged") {
            return;
        }
        let body = message.body();
        let Ok((name, _, new)) = body.deserialize::<(&str, &str, &str)>() else { return };
        if new.is_empty() && lock(&self.callers).remove(name).is_some() {
            self.gone.notify_waiters();
            let (daemon, client) = (daemon.clone(), name.to_owned());
            // As in `serve`.
            tokio::task::spawn_blocking(move || daemon.client_gone(&client));
            let (peer, name) = (self.clone(), name.to_owned());
            tokio::spawn(async move {
                // A rule that stays costs the bus a little memory until the daemon ends.
                if let (Ok(bus), Ok(rule)) = (zbus::fdo::DBusProxy::new(&peer.connection).await, gone_rule(&name)) {
                    let _ = bus.remove_match_rule(rule).await;
                }
            });
        }
    }
}

fn gone_rule(name: &str) -> zbus::Result<MatchRule<'static>> {
    let rule = format!(
        "type='signal',sender='org.freedesktop.DBus',interface='org.freedesktop.DBus',member='NameOwnerChanged',arg0='{name}'"
    );
    MatchRule::try_from(rule.as_str()).map(MatchRule::into_owned)
}

/// The same rule for any sender: on the socket every signal is the daemon's.
fn without_sender(rule: MatchRule<'static>) -> MatchRule<'static> {
    let text = rule.to_string();
    let kept: Vec<&str> = text.split(',').filter(|part| !part.trim_start().starts_with("sender=")).collect();
    MatchRule::try_from(kept.join(",").as_str()).map_or(rule, MatchRule::into_owned)
}
