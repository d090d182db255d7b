//! Work in progress.

use std::marker::PhantomData;
use std::os::fd::OwnedFd;

use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tokio::sync::watch;
use zbus::message::Type;
use zbus::proxy::CacheProperties;
use zbus::{Connection, MatchRule, MessageStream, ObjectPath, OwnedObjectPath};

use crate::client::BUS_NAME;
use crate::error::{Error, Result};
use crate::memfd;
use crate::previews::{self, Previews};
use crate::properties;
use crate::proxies::{Dict, JobProxy};
use crate::results::ResultFile;
use crate::value::{self, Options, object_of};

/// Files of one message, as many as a system bus carries. The daemon gives so many in one answer; fewer are the last.
pub(crate) const FILES_PER_CALL: usize = 16;

const INTERFACE: &str = "org.blocklora.Daemon1.Job";

/// A job that gives an `R`.
#[derive(Clone, Debug)]
pub struct Job<R> {
    proxy: JobProxy<'static>,
    result: PhantomData<fn() -> R>,
}

/// How a job ends that is cancelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CancelMode {
    /// Nothing is kept.
    Discard,
    /// A training saves its state: the same training continues from there.
    Checkpoint,
}

/// The properties of a job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all(deserialize = "PascalCase"))]
pub struct JobState {
    /// "generate", "train", "merge", "bake", "load-model", "validate" or "empty".
    pub kind: String,
    /// "queued", "running", "done", "failed" or "cancelled".
    pub state: String,
    /// What it is doing.
    pub stage: String,
    /// 0..1, without meaning unless the next is true.
    pub progress: f64,
    /// Whether the progress means anything.
    pub progress_valid: bool,
    /// Steps done and steps in all; (0, 0) where the job has none.
    pub step: (u32, u32),
    /// 1 is next; 0 if not queued.
    pub queue_position: u32,
    /// Microseconds since 1970.
    #[serde(rename(deserialize = "CreatedUSec"))]
    pub created_usec: u64,
    /// Likewise; 0: not yet.
    #[serde(rename(deserialize = "StartedUSec"))]
    pub started_usec: u64,
    /// Likewise.
    #[serde(rename(deserialize = "FinishedUSec"))]
    pub finished_usec: u64,
    /// When it will probably end; 0: unknown.
    #[serde(rename(deserialize = "ExpectedEndUSec"))]
    pub expected_end_usec: u64,
    /// Who asked for it.
    pub owner_uid: u32,
    /// "interactive", "normal" or "background".
    pub priority: String,
    /// "connection" or "daemon".
    pub lifetime: String,
    /// What it is about.
    pub description: String,
    /// Error name, message and details; the details of a running training have its last "loss".
    pub error: (String, String, Map<String, Value>),
}

impl JobState {
    /// Whether nothing more will happen.
    pub fn is_final(&self) -> bool {
        matches!(self.state.as_str(), "done" | "failed" | "cancelled")
    }

    /// The last loss of a training.
    pub fn loss(&self) -> Option<f64> {
        self.error.2.get("loss").and_then(Value::as_f64)
    }
}

/// States of a job as they change, newest wins; the last one is final, unless the connection ended.
pub type Progress = BoxStream<'static, JobState>;

impl<R: DeserializeOwned> Job<R> {
    pub(crate) async fn new(connection: &Connection, path: OwnedObjectPath) -> Result<Self> {
        let proxy = JobProxy::builder(connection).path(path).cache_properties(CacheProperties::No).build().await?;
        Ok(Self { proxy, result: PhantomData })
    }

    /// Its object path.
    pub fn path(&self) -> &ObjectPath<'static> {
        self.proxy.inner().path()
    }

    /// Its id, the end of its path.
    pub fn id(&self) -> &str {
        self.path().as_str().rsplit('/').next().unwrap_or_default()
    }

    /// The interface itself.
    pub fn proxy(&self) -> &JobProxy<'static> {
        &self.proxy
    }

    /// Waits until it has ended. Errors: the job's own, and [`Error::Disconnected`] at once when the daemon goes.
    pub async fn wait(&self) -> Result<R> {
        let (_, details) = self.proxy.wait().await?;
        value::read(&details)
    }

    /// Ends it within one denoising or training step; no effect on a finished one.
    pub async fn cancel(&self, mode: CancelMode) -> Result<()> {
        let mode = match mode {
            CancelMode::Discard => "discard",
            CancelMode::Checkpoint => "checkpoint",
        };
        Ok(self.proxy.cancel(mode, &Dict::new()).await?)
    }

    /// The files of a finished job; the daemon keeps them only if `keep`.
    pub async fn take_results(&self, keep: bool) -> Result<Vec<ResultFile>> {
        let mut files = Vec::new();
        loop {
            let offset = if keep { files.len() as u32 } else { 0 };
            let options = Options::new().with("keep", keep).with("offset", offset).into_dict();
            let part = read_files(self.proxy.take_results(&options).await?)?;
            let last = part.len() < FILES_PER_CALL;
            files.extend(part);
            if last {
                return Ok(files);
            }
        }
    }

    /// How it is now.
    pub async fn state(&self) -> Result<JobState> {
        let proxy = self.proxy.inner();
        value::read(&properties::all(proxy.connection(), proxy.path().as_str(), INTERFACE).await?)
    }

    /// Its states from now on.
    pub async fn progress(&self) -> Result<Progress> {
        let connection = self.proxy.inner().connection().clone();
        let rule = MatchRule::builder().msg_type(Type::Signal).path(self.path().clone());
        // On a bus others may send such signals, too.
        let rule = if connection.is_bus() { rule.sender(BUS_NAME) } else { rule }.build()?;
        told(&connection, "AddMatch", &rule).await?;
        let begun = async {
            let signals = MessageStream::for_match_rule(rule.clone(), &connection, None).await?;
            // Subscribed first, asked second: no change is missed.
            let known = object_of(&properties::all(&connection, self.path().as_str(), INTERFACE).await?);
            let first = state(&known)?;
            Ok::<_, Error>((signals, known, first))
        };
        let (mut signals, mut known, first) = match begun.await {
            Ok(begun) => begun,
            Err(error) => {
                // What matters is the first error.
                let _ = told(&connection, "RemoveMatch", &rule).await;
                return Err(error);
            }
        };
        let (sender, receiver) = watch::channel(first);
        let job = self.proxy.clone();
        // A task of its own takes the signals as they come: a slow reader holds up nothing and misses only old news.
        tokio::spawn(async move {
            let ended = async { job.wait().await.map(drop) };
            tokio::pin!(ended);
            let mut done = sender.borrow().is_final();
            while !done {
                let changed = tokio::select! {
                    signal = signals.next() => match signal {
                        Some(Ok(message)) => changes(&message),
                        Some(Err(_)) => continue,
                        None => break,
                    },
                    _ = &mut ended => {
                        done = true;
                        let path = job.inner().path().as_str();
                        properties::all(&connection, path, INTERFACE).await.map(|all| object_of(&all)).unwrap_or_default()
                    }
                    () = sender.closed() => break,
                };
                known.extend(changed);
                if let Ok(new) = state(&known) {
                    sender.send_if_modified(|old| {
                        let modified = *old != new;
                        *old = new;
                        modified
                    });
                }
            }
            drop(signals);
            // The daemon may have gone, and the rule with it.
            let _ = told(&connection, "RemoveMatch", &rule).await;
        });
        let states = stream::unfold((receiver, true), |(mut receiver, first)| async move {
            if !first {
                receiver.changed().await.ok()?;
            }
            let state = receiver.borrow_and_update().clone();
            Some((state, (receiver, false)))
        });
        Ok(Box::pin(states))
    }

    /// Pictures of a drawing in progress, at most one every `interval_usec`, at most `max_side` pixels wide and high.
    pub async fn previews(&self, interval_usec: u64, max_side: u32) -> Result<Previews> {
        let options = Options::new().with("interval_usec", interval_usec).with("max_side", max_side);
        previews::from_fd(self.proxy.open_previews(&options.into_dict()).await?.into())
    }
}

/// Tells the daemon of a match rule on its own socket, where without one only this connection's jobs send signals. A bus is
/// told by the stream of signals itself.
async fn told(connection: &Connection, member: &str, rule: &MatchRule<'_>) -> Result<()> {
    if connection.is_bus() {
        return Ok(());
    }
    let bus = Some("org.freedesktop.DBus");
    let told = connection.call_method(bus, "/org/freedesktop/DBus", bus, member, &rule.to_string()).await;
    told.map(drop).map_err(Error::from)
}

/// The state that these properties are.
fn state(known: &Map<String, Value>) -> Result<JobState> {
    serde_json::from_value(Value::Object(known.clone())).map_err(Error::protocol)
}

/// The properties that a signal of the job changes.
fn changes(message: &zbus::Message) -> Map<String, Value> {
    let header = message.header();
    if header.member().is_none_or(|member| member.as_str() != "PropertiesChanged") {
        return Map::new();
    }
    let body = message.body();
    match body.deserialize::<(String, Dict, Vec<String>)>() {
        Ok((interface, changed, _)) if interface == INTERFACE => object_of(&changed),
        _ => Map::new(),
    }
}

/// Reads the files of a reply.
pub(crate) fn read_files(files: Vec<(zbus::OwnedFd, Dict)>) -> Result<Vec<ResultFile>> {
    let read = |(fd, details): (zbus::OwnedFd, Dict)| {
        let details = object_of(&details);
        let number = |key: &str| details.get(key).and_then(Value::as_u64);
        let text = |key: &str| details.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        let size = number("size").ok_or_else(|| Error::protocol("a file in a reply has no size"))?;
        Ok(ResultFile {
            media_type: text("media_type"),
            index: number("index").and_then(|i| u32::try_from(i).ok()).unwrap_or_default(),
            name: text("name"),
            bytes: memfd::read_file(OwnedFd::from(fd), size)?,
            details,
        })
    };
    files.into_iter().map(read).collect()
}
