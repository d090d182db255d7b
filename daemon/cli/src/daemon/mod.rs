//! The daemon that a command works with: one that runs, or a private one that this command starts for itself.

mod models;
mod private;
pub mod watch;

use std::path::PathBuf;
use std::str::FromStr;

use anyhow::Context;
use blocklora_client::{Client, Error, ErrorKind, Place};

pub use models::{ChosenModel, choose_model};
pub use private::{State, program};

use crate::failure::NoDaemon;
use private::Private;

/// Which daemon to use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Choice {
    /// One that runs, else a private one.
    #[default]
    Auto,
    /// A private one.
    Private,
    /// The one there and no other.
    At(Place),
}

impl FromStr for Choice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "private" => Ok(Self::Private),
            _ => text.parse().map(Self::At).map_err(|_| {
                format!("{text:?} is not auto, private, session, system, a bus address or the path of a socket")
            }),
        }
    }
}

/// The options that say which daemon to use and how.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Which.
    pub choice: Choice,
    /// Threads of a private one.
    pub threads: Option<std::num::NonZeroUsize>,
}

/// A daemon, connected.
pub struct Daemon {
    /// The connection to it.
    pub client: Client,
    private: Option<Private>,
}

impl Daemon {
    /// Whether it is this command's own.
    pub fn is_private(&self) -> bool {
        self.private.is_some()
    }

    /// Ends a private daemon and waits until it is gone; leaves any other alone.
    pub async fn close(self) {
        let Self { client, private } = self;
        drop(client);
        if let Some(private) = private {
            private.ended().await;
        }
    }
}

/// Connects to the daemon that `options` choose; a private one keeps its state in `state`.
pub async fn connect(options: &Options, state: State) -> anyhow::Result<Daemon> {
    match running(options).await? {
        Some(daemon) => Ok(daemon),
        None => start(options, state).await,
    }
}

/// The daemon that `options` choose among those that run; none where a private one is to be started.
pub async fn running(options: &Options) -> anyhow::Result<Option<Daemon>> {
    let client = match &options.choice {
        Choice::At(place) => Client::connect(place.clone()).await.map_err(|e| NoDaemon(explain(&e)))?,
        Choice::Auto => match Client::connect_first(&Place::usual()).await {
            Ok(client) => client,
            Err(_) => return Ok(None),
        },
        Choice::Private => return Ok(None),
    };
    Ok(Some(Daemon { client, private: None }))
}

/// Starts a private one.
pub async fn start(options: &Options, state: State) -> anyhow::Result<Daemon> {
    let (client, private) = Private::start(options.threads, state).await?;
    Ok(Daemon { client, private: Some(private) })
}

/// Why no daemon could be reached, with what to do.
fn explain(error: &Error) -> String {
    match error.kind() {
        Some(ErrorKind::NotAuthorized) => format!("{error}: join the group blocklora, or use --daemon private"),
        _ => format!("{error}: start one (systemctl --user start blocklora), or leave --daemon out"),
    }
}

/// Where the user's own daemon keeps its state, which the library of a private one is, too.
pub fn user_state() -> anyhow::Result<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let home = || set("HOME").map(|home| home.join(".local/state"));
    let base = set("XDG_STATE_HOME").or_else(home).context("neither $XDG_STATE_HOME nor $HOME is set")?;
    Ok(base.join("blocklora"))
}

/// Runs `work`, which may wait for the daemon.
pub fn run<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.context("cannot start")?.block_on(work)
}
