//! A real daemon in a process of its own, a real message bus, and a client of either.

#![allow(dead_code, clippy::unwrap_used)]

pub mod hostile;
pub mod raw;
pub mod stub;

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use zbus::{Connection, DynamicType, OwnedObjectPath, OwnedVariant, Variant};

/// The root object.
pub const ROOT: &str = "/org/blocklora/Daemon1";
/// The daemon's name.
pub const NAME: &str = "org.blocklora.Daemon1";
/// How long anything may take: the machines that run tests are busy.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// a{sv}
pub type Dict = HashMap<String, OwnedVariant>;

/// A test cannot be run here, for this reason. `./run test` names it at its end; with `BLOCKLORA_ALL_TESTS` it has failed.
pub fn not_run(why: &str) {
    assert!(std::env::var_os("BLOCKLORA_ALL_TESTS").is_none(), "not run: {why}");
    if let Some(list) = std::env::var_os("BLOCKLORA_NOT_RUN") {
        let name = std::thread::current().name().unwrap_or_default().to_owned();
        let mut list = File::options().append(true).create(true).open(list).unwrap();
        writeln!(list, "{name}: {why}").unwrap();
    }
}

/// Brings an adapter for the length of the connection; its path.
pub async fn bring(client: &Client, file: &File) -> Result<OwnedObjectPath, String> {
    let body = (zbus::Fd::from(file.as_fd()), dict([("lifetime", "connection".into())]));
    client.call(ROOT, "Manager", "RegisterAdapter", &body).await
}

/// Builds an a{sv}.
pub fn dict<const N: usize>(entries: [(&str, Variant<'static>); N]) -> Dict {
    entries.into_iter().map(|(key, value)| (key.to_owned(), value.try_into_owned().unwrap())).collect()
}

/// The executable under test.
pub fn blocklorad() -> PathBuf {
    match option_env!("CARGO_BIN_EXE_blocklorad") {
        Some(path) => path.into(),
        // Of an example: target/debug/examples/name.
        None => std::env::current_exe().unwrap().ancestors().nth(2).unwrap().join("blocklorad"),
    }
}

/// The bundled starter: `model`, `adapters`, `concepts`.
pub fn starter() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("starter")
}

/// The file of a bundled adapter.
pub fn adapter_file(name: &str) -> PathBuf {
    starter().join(format!("adapters/{name}.safetensors"))
}

/// A message bus of its own, ended when dropped.
pub struct Bus {
    child: Child,
    pub address: String,
}

impl Bus {
    /// Starts dbus-daemon, which `run` installs where it is missing.
    pub fn start() -> Self {
        Self::start_as("--session")
    }

    /// One with the limits of a system bus, which are those of a configuration that sets none; open to all users.
    pub fn start_with_system_limits() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("bus.conf");
        let config = format!(
            "<busconfig><type>session</type><listen>unix:tmpdir={}</listen><auth>EXTERNAL</auth>\
             <policy context=\"default\"><allow user=\"*\"/><allow send_destination=\"*\" eavesdrop=\"true\"/><allow eavesdrop=\"true\"/>\
             <allow own=\"*\"/></policy></busconfig>",
            std::env::temp_dir().display()
        );
        std::fs::write(&file, config).unwrap();
        Self::start_as(&format!("--config-file={}", file.display()))
    }

    fn start_as(what: &str) -> Self {
        let mut child = Command::new("dbus-daemon")
            .args([what, "--nofork", "--print-address"])
            .stdout(Stdio::piped())
            .spawn()
            .expect("dbus-daemon is not installed: install the package dbus");
        let mut address = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut address).unwrap();
        Self { child, address: address.trim().to_owned() }
    }
}

impl Drop for Bus {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// A daemon with a state of its own, killed when dropped.
pub struct Daemon {
    pub dir: tempfile::TempDir,
    pub child: Child,
    /// More arguments for the next start.
    pub args: Vec<String>,
    /// More environment for the next start.
    pub env: Vec<(String, String)>,
    bus: Option<String>,
}

impl Daemon {
    /// Starts one, on the socket and on `bus` if given, with `config` as its configuration.
    pub fn start_with(bus: Option<&Bus>, config: &str, args: &[&str]) -> Self {
        Self::start_in(bus, config, args, &[])
    }

    /// As [`Self::start_with`], with more environment.
    pub fn start_in(bus: Option<&Bus>, config: &str, args: &[&str], env: &[(&str, &str)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("run")).unwrap();
        std::fs::write(dir.path().join("blocklora.toml"), config).unwrap();
        let args: Vec<String> = args.iter().map(|arg| (*arg).to_owned()).collect();
        let bus = bus.map(|bus| bus.address.clone());
        let env: Vec<(String, String)> = env.iter().map(|&(key, value)| (key.to_owned(), value.to_owned())).collect();
        let child = spawn(dir.path(), bus.as_deref(), &args, &env);
        let mut daemon = Self { dir, child, args, env, bus };
        daemon.wait_ready();
        daemon
    }

    /// Starts one on the socket only.
    pub fn start() -> Self {
        Self::start_with(None, "", &[])
    }

    /// Starts it again on the same state.
    pub fn restart(&mut self) {
        self.kill();
        self.child = spawn(self.dir.path(), self.bus.as_deref(), &self.args, &self.env);
        self.wait_ready();
    }

    fn wait_ready(&mut self) {
        let since = Instant::now();
        loop {
            // A socket that a killed daemon left behind is replaced by the new one: only a connection counts.
            if std::os::unix::net::UnixStream::connect(self.socket()).is_ok() && self.log().contains("ready") {
                return;
            }
            if let Some(status) = self.child.try_wait().unwrap() {
                panic!("the daemon ended: {status}\n{}", self.log());
            }
            assert!(since.elapsed() < PATIENCE, "the daemon is not ready\n{}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Its socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("run/blocklora/bus")
    }

    /// Its state folder.
    pub fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    /// What it wrote since it started.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// kill -9.
    pub fn kill(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        self.child.wait().unwrap();
    }

    /// Sends a signal.
    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Whether it lives.
    pub fn lives(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Its resident memory, bytes.
    pub fn memory(&self) -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{}/statm", self.child.id())).unwrap();
        text.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 4096
    }

    /// The most resident memory that it ever had, bytes.
    pub fn peak_memory(&self) -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = text.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
    }

    /// A client on the socket.
    pub async fn client(&self) -> Client {
        let address = format!("unix:path={}", self.socket().display());
        let builder = zbus::connection::Builder::address(address.as_str()).p2p();
        Client { connection: builder.build().await.unwrap(), bus: false }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            eprintln!("--- the daemon's log\n{}", self.log());
        }
    }
}

fn spawn(dir: &Path, bus: Option<&str>, args: &[String], env: &[(String, String)]) -> Child {
    let log = File::create(dir.join("log")).unwrap();
    let mut command = Command::new(blocklorad());
    command.arg("--config").arg(dir.join("blocklora.toml")).arg("--state").arg(dir.join("state"));
    command.envs(env.iter().map(|(key, value)| (key, value)));
    command.args(args).env("XDG_RUNTIME_DIR", dir.join("run")).stderr(log).stdin(Stdio::null());
    match bus {
        Some(address) if args.iter().any(|arg| arg == "system") => {
            command.arg("--socket").arg(dir.join("run/blocklora/bus")).env("DBUS_SYSTEM_BUS_ADDRESS", address)
        }
        Some(address) => command.env("DBUS_SESSION_BUS_ADDRESS", address),
        None => command.args(["--bus", "none"]),
    };
    command.spawn().unwrap()
}

/// A client.
#[derive(Clone)]
pub struct Client {
    pub connection: Connection,
    pub bus: bool,
}

impl Client {
    /// A client on a message bus.
    pub async fn on_bus(bus: &Bus) -> Self {
        let builder = zbus::connection::Builder::address(bus.address.as_str());
        Self { connection: builder.build().await.unwrap(), bus: true }
    }

    /// Calls a method of an interface of ours; `interface` is its last part.
    pub async fn message<B>(&self, path: &str, interface: &str, member: &str, body: &B) -> zbus::Result<zbus::Message>
    where
        B: serde::Serialize + DynamicType,
    {
        let name = if interface.contains('.') { interface.to_owned() } else { format!("{NAME}.{interface}") };
        let call = self.connection.call_method(self.bus.then_some(NAME), path, Some(name.as_str()), member, body);
        tokio::time::timeout(PATIENCE, call).await.expect("no answer")
    }

    /// As [`Self::message`], with what the reply holds.
    pub async fn call<B, R>(&self, path: &str, interface: &str, member: &str, body: &B) -> Result<R, String>
    where
        B: serde::Serialize + DynamicType,
        R: serde::de::DeserializeOwned + zbus::Type,
    {
        match self.message(path, interface, member, body).await {
            Ok(reply) => Ok(reply.body().deserialize().unwrap()),
            Err(zbus::Error::MethodError(name, text, _)) => {
                let name = name.as_str().trim_start_matches("org.blocklora.Daemon1.Error.").to_owned();
                Err(format!("{name}: {}", text.unwrap_or_default()))
            }
            Err(error) => Err(error.to_string()),
        }
    }

    /// A property.
    pub async fn get<T: TryFrom<OwnedVariant>>(&self, path: &str, interface: &str, name: &str) -> T {
        let interface = format!("{NAME}.{interface}");
        let value: OwnedVariant =
            self.call(path, "org.freedesktop.DBus.Properties", "Get", &(interface, name)).await.unwrap();
        T::try_from(value).ok().unwrap()
    }

    /// Queues a drawing; the job's path.
    pub async fn generate(&self, target: &str, params: Dict, options: Dict) -> Result<String, String> {
        let target = zbus::ObjectPath::try_from(target.to_owned()).unwrap();
        let job: OwnedObjectPath = self.call(ROOT, "Manager", "Generate", &(target, params, options)).await?;
        Ok(job.as_str().to_owned())
    }

    /// Waits for a job's end.
    pub async fn wait(&self, job: &str) -> Result<Dict, String> {
        let (result, details): (String, Dict) = self.call(job, "Job", "Wait", &()).await?;
        assert_eq!(result, "done");
        Ok(details)
    }

    /// The files of a job.
    pub async fn results(&self, job: &str) -> Result<Vec<(Vec<u8>, Dict)>, String> {
        let mut files = Vec::new();
        loop {
            let part: Vec<(zbus::OwnedFd, Dict)> = self.call(job, "Job", "TakeResults", &(Dict::new(),)).await?;
            let last = part.len() < 16;
            files.extend(part.into_iter().map(|(fd, info)| (read_fd(&fd), info)));
            if last {
                return Ok(files);
            }
        }
    }

    /// Draws one picture: its raw pixels.
    pub async fn draw(&self, target: &str, params: Dict) -> Result<Vec<u8>, String> {
        let job = self.generate(target, params, dict([("formats", vec!["raw".to_owned()].into())])).await?;
        self.wait(&job).await?;
        let mut files = self.results(&job).await?;
        assert_eq!(files.len(), 1);
        Ok(files.remove(0).0)
    }

    /// Adds a bundled adapter to the library; its path.
    pub async fn register(&self, name: &str) -> String {
        self.register_file(&adapter_file(name)).await
    }

    /// Adds an adapter's file to the library; its path.
    pub async fn register_file(&self, file: &Path) -> String {
        let file = File::open(file).unwrap();
        let body = (zbus::Fd::from(file.as_fd()), Dict::new());
        let path: OwnedObjectPath = self.call(ROOT, "Manager", "RegisterAdapter", &body).await.unwrap();
        path.as_str().to_owned()
    }

    /// A set of adapters on the starter; its path.
    pub async fn compose(&self, entries: &[(&str, f64)], options: Dict) -> Result<String, String> {
        self.compose_on("starter", entries, options).await
    }

    /// A set of adapters on a model; its path.
    pub async fn compose_on(&self, model: &str, entries: &[(&str, f64)], options: Dict) -> Result<String, String> {
        let list = entries_of(entries);
        let model = format!("{ROOT}/model/{model}");
        let path: OwnedObjectPath = self.call(&model, "Model", "Compose", &(list, options)).await?;
        Ok(path.as_str().to_owned())
    }
}

/// That the daemon lives and works.
pub async fn alive(daemon: &mut Daemon, client: &Client) {
    let job: OwnedObjectPath = client.call(ROOT, "Manager", "EmptyJob", &(Dict::new(),)).await.unwrap();
    client.wait(job.as_str()).await.unwrap();
    assert!(daemon.lives());
}

/// The step that a job is at, and its steps in all.
pub async fn step_of(client: &Client, job: &str) -> (u32, u32) {
    let value = client.get::<OwnedVariant>(job, "Job", "Step").await;
    zbus::Structure::try_from(value).unwrap().try_into().unwrap()
}

/// What a drawing asks for that takes `steps` steps.
pub fn long(steps: u32) -> Dict {
    let mut params = small("a dog", 1);
    params.insert("steps".to_owned(), OwnedVariant::from(steps));
    params
}

/// a(oa{sv})
pub fn entries_of(entries: &[(&str, f64)]) -> Vec<(zbus::ObjectPath<'static>, Dict)> {
    let entry = |(path, weight): &(&str, f64)| {
        (zbus::ObjectPath::try_from((*path).to_owned()).unwrap(), dict([("weight", (*weight).into())]))
    };
    entries.iter().map(entry).collect()
}

/// What a small drawing asks for.
pub fn small(prompt: &str, seed: u64) -> Dict {
    dict([("prompt", prompt.to_owned().into()), ("steps", 2u32.into()), ("seed", seed.into())])
}

/// A training that takes `steps` short steps, and its pictures.
pub fn training(steps: u32) -> (Dict, Vec<File>) {
    let config = dict([
        ("steps", steps.into()),
        ("batch_size", 1u32.into()),
        ("rank", 1u32.into()),
        ("checkpoint_every", 2u32.into()),
        ("train_text_encoder", false.into()),
    ]);
    let folder = starter().join("concepts/poodle");
    let mut paths: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|e| e == "png" || e == "jpg" || e == "webp"));
    paths.sort();
    assert!(!paths.is_empty());
    (config, paths.iter().take(2).map(|path| File::open(path).unwrap()).collect())
}

/// Queues a training; the job's path.
pub async fn train(client: &Client, name: &str, steps: u32, mut options: Dict) -> Result<String, String> {
    let (config, files) = training(steps);
    let fds: Vec<zbus::Fd> = files.iter().map(|file| zbus::Fd::from(file.as_fd())).collect();
    options.extend(dict([("name", name.to_owned().into()), ("class_word", "dog".into())]));
    let body = ("blocklora", config, fds, options);
    let job: OwnedObjectPath = client.call(ROOT, "Manager", "Train", &body).await?;
    Ok(job.as_str().to_owned())
}

/// All of a file from its beginning.
pub fn read_fd(fd: &zbus::OwnedFd) -> Vec<u8> {
    let mut file = File::from(fd.as_fd().try_clone_to_owned().unwrap());
    file.seek(SeekFrom::Start(0)).unwrap();
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).unwrap();
    bytes
}

/// Waits until `what` holds.
pub async fn until<F: Future<Output = bool>>(what: &str, mut holds: impl FnMut() -> F) {
    let since = Instant::now();
    while !holds().await {
        assert!(since.elapsed() < PATIENCE, "{what} does not come");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
