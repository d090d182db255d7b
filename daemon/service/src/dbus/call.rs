//! One method call: who made it, what is in it, and what answers it.

use std::sync::Arc;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::SemaphorePermit;
use zbus::message::Flags;
use zbus::{DynamicType, Message, Type};

use super::interfaces::{self, Method};
use super::peer::{Peer, PeerKind};
use super::value::{Dict, Options};
use super::{MESSAGE_BYTES_MAX, adapter, bus_api, composition, job, library, manager, model, plugin, standard};
use crate::cut::{TEXT_BYTES_MAX, cut};
use crate::daemon::Daemon;
use crate::error::{Error, Result};
use crate::jobs::{Lifetime, Owner, Priority, Ticket};
use crate::objects::Object;

/// Bytes of an error's text.
const ERROR_BYTES_MAX: usize = 4 * TEXT_BYTES_MAX;

/// Who makes a call.
#[derive(Clone)]
pub struct Caller {
    /// The unique name of its connection.
    pub client: String,
    /// Its user.
    pub uid: u32,
    /// Its process; 0 if unknown.
    pub pid: u32,
    /// The connection that it came over.
    pub peer: Arc<Peer>,
}

impl Caller {
    /// As the owner of what it makes.
    pub fn owner(&self) -> Owner {
        Owner { client: self.client.clone(), uid: self.uid }
    }
}

/// A call.
pub struct Call {
    /// The daemon.
    pub daemon: Arc<Daemon>,
    /// Who makes it.
    pub caller: Caller,
    /// The message.
    pub message: Message,
}

/// Why a call is refused: an error of the service, or one of D-Bus itself.
#[derive(Debug)]
pub struct Refusal {
    name: String,
    message: String,
}

impl Refusal {
    /// `org.freedesktop.DBus.Error.` and `name`.
    pub fn bus(name: &str, message: impl Into<String>) -> Self {
        Self { name: format!("org.freedesktop.DBus.Error.{name}"), message: message.into() }
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self { name: error.name(), message: error.message }
    }
}

/// The answer to a call.
pub type Answer = Result<Message, Refusal>;

/// Whether the caller waits for a reply.
pub fn wants_reply(message: &Message) -> bool {
    !message.primary_header().flags().contains(Flags::NO_REPLY_EXPECTED)
}

/// The reply that says why a call is refused, if the caller waits for one.
pub fn error_reply(peer: &Peer, message: &Message, refusal: Refusal) -> Option<Message> {
    if !wants_reply(message) {
        return None;
    }
    // Many an error shows what is wrong, and that may be as long as a message.
    let text = cut(&refusal.message, ERROR_BYTES_MAX);
    let header = message.header();
    let builder = peer.signed(Message::error(&header, refusal.name.as_str()));
    let reply = builder.build(&(text.as_ref(),));
    reply.inspect_err(|error| tracing::error!("cannot build the error {}: {error}", refusal.name)).ok()
}

/// Answers a call.
pub async fn answer(call: Call) -> Answer {
    let header = call.message.header();
    let text = |part: Option<&str>| part.unwrap_or_default().to_owned();
    let path = text(header.path().map(|p| p.as_str()));
    let member = text(header.member().map(|m| m.as_str()));
    let named = header.interface().map(|i| i.to_string());
    drop(header);
    if path == bus_api::PATH && call.caller.is_on_socket() {
        let interfaces = [
            "org.freedesktop.DBus",
            "org.freedesktop.DBus.Introspectable",
            "org.freedesktop.DBus.Peer",
            "org.freedesktop.DBus.Properties",
        ];
        let (interface, method) = find(&call, &interfaces, named.as_deref(), &member, &path)?;
        return match interface {
            "org.freedesktop.DBus" => bus_api::answer(&call, &member, method),
            _ => standard::answer(&call, None, &path, interface, &member, method).await,
        };
    }
    let object = call.daemon.object(&path);
    let own = object.as_ref().map_or(&standard::NODE_INTERFACES[..], Object::interfaces);
    let to_bus = path == "/org/freedesktop" && call.caller.is_on_socket();
    if object.is_none()
        && path != "/"
        && !to_bus
        && call.daemon.children(&path).is_empty()
        && !is_ping(named.as_deref())
    {
        return Err(Refusal::bus("UnknownObject", format!("there is no object {path}")));
    }
    let (interface, method) = find(&call, own, named.as_deref(), &member, &path)?;
    match (&object, interface.strip_prefix("org.blocklora.Daemon1.")) {
        (Some(Object::Manager), Some(_)) => match manager::answer(&call, &member, method).await? {
            Some(reply) => Ok(reply),
            None => library::answer(&call, &member, method).await,
        },
        (Some(Object::Model(object)), Some(_)) => model::answer(&call, object, &member, method).await,
        (Some(Object::Adapter(object)), Some(_)) => adapter::answer(&call, object, &member, method).await,
        (Some(Object::Composition(object)), Some(_)) => composition::answer(&call, object, &member, method).await,
        (Some(Object::Job(object)), Some(_)) => job::answer(&call, object, &member, method).await,
        (Some(Object::Plugin(id)), Some(_)) => plugin::answer(&call, id, &member, method).await,
        _ => standard::answer(&call, object.as_ref(), &path, interface, &member, method).await,
    }
}

/// Anything can be pinged.
fn is_ping(interface: Option<&str>) -> bool {
    interface == Some("org.freedesktop.DBus.Peer")
}

/// The method that is called, its arguments being of the declared types.
fn find(
    call: &Call,
    own: &[&'static str],
    named: Option<&str>,
    member: &str,
    path: &str,
) -> Result<(&'static str, &'static Method), Refusal> {
    let Some((interface, method)) = interfaces::find_method(own, named, member) else {
        return Err(match named {
            Some(name) if !own.contains(&name) => {
                Refusal::bus("UnknownInterface", format!("{path} has no interface {name}"))
            }
            _ => Refusal::bus("UnknownMethod", format!("{path} has no method {member}")),
        });
    };
    let body = call.message.body();
    let signature = body.signature().to_string_no_parens();
    if signature != method.takes {
        let message = format!("{member} takes {:?}, not {signature:?}", method.takes);
        return Err(Refusal::bus("InvalidArgs", message));
    }
    Ok((interface.name.as_str(), method))
}

impl Caller {
    /// Whether it came over the socket.
    pub fn is_on_socket(&self) -> bool {
        matches!(self.peer.kind, PeerKind::Socket { .. })
    }
}

impl Call {
    /// The arguments.
    pub fn args<T: DeserializeOwned + Type>(&self) -> Result<T, Refusal> {
        let body = self.message.body();
        body.deserialize().map_err(|e| Refusal::bus("InvalidArgs", format!("the arguments cannot be read: {e}")))
    }

    /// The reply with `body`, which has the declared types.
    pub fn reply<B: Serialize + DynamicType>(&self, method: &Method, body: &B) -> Answer {
        let fail = |e: zbus::Error| Refusal::from(Error::from(e));
        let header = self.message.header();
        let builder = self.caller.peer.signed(Message::method_return(&header));
        let reply = builder.build(body).map_err(fail)?;
        let member = header.member().map(|m| m.to_string()).unwrap_or_default();
        let bytes = reply.data().len();
        if bytes > MESSAGE_BYTES_MAX {
            // A bus disconnects who sends what is too large, and the daemon would end.
            let message =
                format!("{member}: the reply has {bytes} bytes, at most {MESSAGE_BYTES_MAX} are allowed; ask for less");
            return Err(Refusal::bus("LimitsExceeded", message));
        }
        interfaces::check_reply(&member, &method.gives, &reply.body().signature().to_string_no_parens())?;
        Ok(reply)
    }

    /// Runs `work` where it may block.
    pub async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Daemon) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let daemon = self.daemon.clone();
        let done = tokio::task::spawn_blocking(move || work(&daemon)).await;
        done.map_err(|_| Error::failed("a bug in the daemon, see its log"))?
    }

    /// A turn to read files that the caller sent, which may be as slow as whoever serves them likes.
    pub async fn turn_to_read(&self) -> Result<SemaphorePermit<'_>> {
        self.daemon.client_files.acquire().await.map_err(|e| Error::failed(e.to_string()))
    }

    /// As [`Self::blocking`], for what must be remembered: refused while the state folder cannot be written.
    pub async fn remembering<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Daemon) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.blocking(move |daemon| daemon.catalogue.lasting().and_then(|()| work(daemon))).await
    }

    /// Whether the caller may do `action`.
    pub async fn authorize(&self, action: &str) -> Result<()> {
        let interactive = self.message.primary_header().flags().contains(Flags::ALLOW_INTERACTIVE_AUTH);
        self.daemon.authority.check(&self.daemon, &self.caller, action, interactive).await
    }

    /// Whether the caller may read what user `uid` asked for. Nobody is asked for a password to read.
    pub async fn reads(&self, uid: u32) -> bool {
        self.caller.uid == uid || self.reads_all().await
    }

    /// Whether the caller may read what any user asked for.
    pub async fn reads_all(&self) -> bool {
        self.daemon.authority.check(&self.daemon, &self.caller, "manage-other-jobs", false).await.is_ok()
    }

    /// Whether the caller may change something of user `uid`.
    pub async fn authorize_owner(&self, uid: u32) -> Result<()> {
        if self.caller.uid == uid {
            return Ok(());
        }
        self.authorize("manage-other-jobs").await
    }

    /// What the options of every job say.
    pub fn ticket(&self, options: &mut Options, priority: Priority, lifetime: Lifetime) -> Result<Ticket> {
        let priority = options.string("priority")?.map_or(Ok(priority), |name| Priority::from_name(&name))?;
        let lifetime =
            options.string("lifetime")?.map_or(Ok(lifetime), |name| Lifetime::from_name("lifetime", &name))?;
        let token = options.string("token")?;
        if let Some(token) = &token {
            let valid = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
            if token.is_empty() || token.len() > 64 || !token.bytes().all(valid) {
                return Err(Error::option("option \"token\": must be 1 to 64 of [A-Za-z0-9_]"));
            }
        }
        let timeout = options.u64("timeout_usec")?.map(std::time::Duration::from_micros);
        Ok(Ticket { owner: self.caller.owner(), priority, lifetime, token, timeout, created_usec: None })
    }
}

/// Options that a method takes none of.
pub fn no_options(options: Dict) -> Result<()> {
    Options::new(options).finish()
}
