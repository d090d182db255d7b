//! A daemon for one command: it talks over a socket pair, is on no bus, and ends with the command.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Seek};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};
use blocklora_client::Client;
use blocklora_service::plugins::{self, words::shown};
use tempfile::TempDir;

use crate::failure::NoDaemon;

/// Where a private daemon keeps its catalogue and checkpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// In a folder that goes with it: nothing of the user's library is seen or changed.
    Temporary,
    /// In the user's folder: what is added stays.
    User,
    /// In this folder, which stays.
    Folder(PathBuf),
}

/// How long it may take to end after its connection is closed.
const END_TIMEOUT: Duration = Duration::from_secs(10);

/// How long it may take to end after a command that failed.
const DROP_TIMEOUT: Duration = Duration::from_secs(10);

/// A running private daemon.
pub struct Private {
    child: Child,
    /// Our end of its connection; shutting it down ends the connection whoever else still holds it.
    connection: UnixStream,
    /// What it says on standard error.
    log: File,
    /// Whether this command killed it.
    killed: bool,
    /// Goes last.
    _temporary: Option<TempDir>,
}

/// The daemon's program and where it was found.
pub struct Program {
    /// Its file.
    pub path: PathBuf,
}

/// Finds `blocklorad` beside this program, then in `$PATH`.
pub fn program() -> anyhow::Result<Program> {
    let executable = std::env::current_exe().context("cannot find this executable")?;
    let beside = executable.parent().map(|folder| folder.join("blocklorad"));
    // Test programs lie in a folder below.
    let above = executable.parent().and_then(Path::parent).map(|folder| folder.join("blocklorad"));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let in_path = std::env::split_paths(&path).map(|folder| folder.join("blocklorad"));
    match beside.into_iter().chain(above).chain(in_path).find(|file| file.is_file()) {
        Some(path) => Ok(Program { path }),
        None => Err(NoDaemon(
            "the daemon's program, blocklorad, is neither beside blocklora nor in $PATH: install it, too".into(),
        )
        .into()),
    }
}

impl Private {
    /// Starts one and connects to it.
    pub async fn start(threads: Option<std::num::NonZeroUsize>, state: State) -> anyhow::Result<(Client, Self)> {
        let program = program()?.path;
        let (ours, theirs) = UnixStream::pair().context("cannot make a socket")?;
        let mut command = Command::new(&program);
        // Not a pipe, which would hold up a daemon that says much; without a name, so that nothing stays behind.
        let log = tempfile::tempfile().context("cannot make a temporary file")?;
        command.args(["--private", "--log", "warn"]);
        command.stdin(Stdio::from(OwnedFd::from(theirs))).stdout(Stdio::null());
        command.stderr(Stdio::from(log.try_clone().context("cannot make a temporary file")?));
        let mut temporary = None;
        let folder = match state {
            State::Temporary => {
                let folder = tempfile::Builder::new().prefix("blocklora-").tempdir();
                let folder = temporary.insert(folder.context("cannot make a temporary folder")?);
                // Also if this command is killed.
                command.arg("--temporary");
                folder.path().to_path_buf()
            }
            State::User => super::user_state()?,
            State::Folder(folder) => folder,
        };
        // Not $STATE_DIRECTORY: what is known about plugins stays the user's.
        command.arg("--state").arg(folder);
        if let Some(threads) = threads {
            command.env("RAYON_NUM_THREADS", threads.to_string());
        }
        // Ctrl-C on the terminal goes to the whole process group; this command passes on what its daemon should do.
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let child = command.spawn().with_context(|| format!("{}: cannot be started", program.display()))?;
        // It holds the other end of the socket now; with ours of it gone, its end is noticed.
        drop(command);
        let connection = ours.try_clone().context("cannot make a socket")?;
        let mut private = Self { child, connection, log, killed: false, _temporary: temporary };
        match Client::from_stream(ours).await {
            Ok(client) => Ok((client, private)),
            Err(error) => {
                let said = private.last_words();
                let reason = if said.is_empty() { error.to_string() } else { said };
                bail!(NoDaemon(format!("{}: {reason}", program.display())));
            }
        }
    }

    /// What it said on standard error, if it has ended; it is ended if it has not.
    fn last_words(&mut self) -> String {
        // A daemon that cannot start has said so and is gone; one that hangs says nothing more.
        let started = std::time::Instant::now();
        while started.elapsed() < Duration::from_secs(1) && matches!(self.child.try_wait(), Ok(None)) {
            std::thread::sleep(Duration::from_millis(10));
        }
        self.kill();
        let text = self.said();
        let last = text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
        let said = last.trim().trim_start_matches("ERROR ");
        // Behind the name of the module that says it.
        let message =
            said.split_once(": ").filter(|(module, _)| module.starts_with("blocklora") && !module.contains(' '));
        message.map_or(said, |(_, message)| message).to_owned()
    }

    fn said(&mut self) -> String {
        let mut text = String::new();
        let _ = self.log.rewind().and_then(|()| self.log.read_to_string(&mut text));
        text
    }

    /// Passes on what plugins have warned of: this daemon has no log that anybody could look into.
    fn pass_warnings_on(&mut self) {
        let text = self.said();
        let warnings = text.lines().filter(|line| line.contains("WARN "));
        let warnings: BTreeSet<&str> = warnings.filter_map(|line| Some(line.split_once(": plugin: ")?.1)).collect();
        warnings.into_iter().for_each(|warning| eprintln!("blocklora: warning: {}", shown(warning)));
    }

    /// Says how it ended, if it crashed: the command's own error knows only that nobody answers any more.
    fn tell_of_a_crash(&mut self) {
        if let Ok(Some(status)) = self.child.try_wait()
            && !self.killed
            && let Some(crash) = plugins::crash_of(status, self.child.id(), &plugins::Options::default())
        {
            eprintln!("blocklora: the daemon {}", shown(&crash));
        }
    }

    fn kill(&mut self) {
        self.killed |= matches!(self.child.try_wait(), Ok(None));
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Ends it and waits until it has ended.
    pub async fn ended(mut self) {
        let _ = self.connection.shutdown(Shutdown::Both);
        let give_up = tokio::time::Instant::now() + END_TIMEOUT;
        loop {
            match self.child.try_wait() {
                Ok(None) if tokio::time::Instant::now() < give_up => tokio::time::sleep(Duration::from_millis(2)).await,
                Ok(None) => return self.kill(),
                _ => return,
            }
        }
    }
}

impl Drop for Private {
    /// Without its connection it ends by itself; its temporary folder is to go after it.
    fn drop(&mut self) {
        let _ = self.connection.shutdown(Shutdown::Both);
        let started = std::time::Instant::now();
        while matches!(self.child.try_wait(), Ok(None)) && started.elapsed() < DROP_TIMEOUT {
            std::thread::sleep(Duration::from_millis(5));
        }
        if matches!(self.child.try_wait(), Ok(None)) {
            self.kill();
        }
        self.pass_warnings_on();
        self.tell_of_a_crash();
    }
}
