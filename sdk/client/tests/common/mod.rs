//! A real daemon for tests: on a message bus of its own and on a socket, with its state in a temporary folder.
#![allow(clippy::unwrap_used, dead_code)]

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use blocklora_client::{Client, Place};
use tempfile::TempDir;

/// The repository.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

/// A bundled adapter.
pub fn adapter(index: usize) -> PathBuf {
    let folder = root().join("daemon/starter/adapters");
    let mut files: Vec<PathBuf> = folder.read_dir().unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|file| file.extension().is_some_and(|e| e == "safetensors"));
    files.sort();
    files[index].clone()
}

/// A program that the workspace builds, in the folder above this test's own.
pub fn program(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let path = test.ancestors().nth(2).unwrap().join(name);
    assert!(path.is_file(), "{} is not there: build it with `cargo build --workspace --bins`", path.display());
    path
}

/// A child process that ends with the test.
pub struct Process(pub Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A message bus and a daemon.
pub struct Home {
    pub dir: TempDir,
    pub bus: String,
    pub socket: PathBuf,
    pub daemon: Option<Process>,
    _bus: Process,
}

impl Home {
    /// Starts both.
    pub async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut command = Command::new("dbus-daemon");
        let address = format!("--address=unix:path={}", dir.path().join("session").display());
        command.args(["--session", "--nofork", "--print-address=1", &address]).stdout(Stdio::piped());
        let mut child = command.spawn().expect("dbus-daemon, of Debian's package dbus-daemon, must be installed");
        let mut bus = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut bus).unwrap();
        let bus = bus.trim().to_owned();
        let socket = dir.path().join("run/bus");
        let mut home = Self { dir, bus, socket, daemon: None, _bus: Process(child) };
        home.start().await;
        home
    }

    /// Starts the daemon, and waits until it answers on the bus.
    pub async fn start(&mut self) {
        let mut command = Command::new(program("blocklorad"));
        command.args(["--bus", "session", "--log", "warn", "--socket"]).arg(&self.socket);
        command.arg("--state").arg(self.dir.path().join("state"));
        command.env("DBUS_SESSION_BUS_ADDRESS", &self.bus).env("XDG_CONFIG_HOME", self.dir.path());
        self.daemon = Some(Process(command.spawn().unwrap()));
        let started = Instant::now();
        while let Err(error) = Client::connect(Place::Bus(self.bus.clone())).await {
            assert!(started.elapsed() < Duration::from_secs(60), "the daemon does not answer: {error}");
            let daemon = self.daemon.as_mut().unwrap();
            assert!(daemon.0.try_wait().unwrap().is_none(), "the daemon ended at once");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Ends the daemon as a power cut does.
    pub fn kill(&mut self) {
        self.daemon = None;
    }

    /// Both ways to the daemon.
    pub fn places(&self) -> [Place; 2] {
        [Place::Bus(self.bus.clone()), Place::Socket(self.socket.clone())]
    }
}
