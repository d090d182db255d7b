//! One run of the daemon, from its options to its exit code.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use blocklora_engine::device::Chosen;
use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};

use super::{activation, control, cuda, lock, logind, paths, recover};
use crate::authority::Authority;
use crate::catalogue::Catalogue;
use crate::config::{self, Bus, Config};
use crate::daemon::Daemon;
use crate::dbus::serve;
use crate::error::{Error, Kind, Result};
use crate::jobs::work::Work;
use crate::jobs::{Lifetime, Owner, Priority, Stop, Ticket};
use crate::methods::Methods;
use crate::worker;

/// How long a private daemon waits for the one before it.
const PATIENCE: Duration = Duration::from_secs(20);

/// What the command line says.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Configuration files instead of the standard ones.
    pub config: Vec<PathBuf>,
    /// Instead of the configured bus.
    pub bus: Option<Bus>,
    /// Instead of the configured socket.
    pub socket: Option<String>,
    /// Instead of the configured state folder.
    pub state_dir: Option<String>,
    /// Instead of the configured time.
    pub exit_when_idle_sec: Option<u64>,
    /// Serve only the connection on standard input, and end with it.
    pub private: bool,
    /// Remove the state folder at the end.
    pub temporary: bool,
}

/// Runs the daemon until it is told to end.
/// `methods` are made from the configuration.
pub fn run(options: &Options, methods: impl FnOnce(&Config) -> Arc<dyn Methods>) -> Result<()> {
    let options = &Options { config: absolute(&options.config)?, ..options.clone() };
    let (config, files) = read_config(options)?;
    // Before any thread and any lock, since another program may go on from here.
    let device = cuda::choose(&config.models.device)?;
    let state = paths::state_dir(&config)?;
    tracing::info!("device {device}");
    raise_limits();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        // Far more than there are calls that read clients' files at once, which may hang.
        .max_blocking_threads(64)
        .thread_name("control")
        .enable_all()
        .build()
        .map_err(|e| Error::io("cannot start", &e))?;
    let result = runtime.block_on(live(options, &state, (config, files), device, methods));
    // Nothing that still blocks is worth waiting for.
    runtime.shutdown_timeout(Duration::from_millis(200));
    // One that could not be taken may be somebody's.
    if options.temporary && result.is_ok() {
        // Whoever made it may be faster.
        let _ = std::fs::remove_dir_all(state);
    }
    result
}

/// The files as everyone can find them: clients are told of them.
fn absolute(files: &[PathBuf]) -> Result<Vec<PathBuf>> {
    files.iter().map(|path| std::path::absolute(path).map_err(|e| Error::io(path.display(), &e))).collect()
}

/// As many open files as the system allows: every kept result is one.
fn raise_limits() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let most = rustix::process::Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(error) = setrlimit(Resource::Nofile, most) {
        tracing::warn!("the limit of open files cannot be raised: {error}");
    }
}

/// Both when the daemon starts and when it reads its configuration again.
fn read_config(options: &Options) -> Result<(Config, Vec<PathBuf>)> {
    let user = options.bus != Some(Bus::System);
    let files = if options.config.is_empty() { config::standard_files(user) } else { options.config.clone() };
    let mut config = Config::read(&files)?;
    if let Some(bus) = options.bus {
        config.daemon.bus = bus;
    }
    if options.private {
        (config.daemon.bus, config.daemon.socket) = (Bus::None, "none".to_owned());
    }
    if let Some(socket) = &options.socket {
        config.daemon.socket.clone_from(socket);
    }
    if let Some(folder) = &options.state_dir {
        config.daemon.state_dir.clone_from(folder);
    }
    if let Some(seconds) = options.exit_when_idle_sec {
        config.daemon.exit_when_idle_sec = seconds;
    }
    Ok((config, files))
}

/// The lock of the state folder. Of two private daemons the second comes after a command that was killed, whose daemon
/// is about to notice; so that one waits.
async fn lock_state(folder: &Path, private: bool) -> Result<lock::Lock> {
    let give_up = Instant::now() + if private { PATIENCE } else { Duration::ZERO };
    loop {
        match lock::folder(folder, "state folder") {
            Err(error) if error.kind == Kind::DeviceBusy && Instant::now() < give_up => {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            result => return result,
        }
    }
}

async fn live(
    options: &Options,
    folder: &Path,
    (config, files): (Config, Vec<PathBuf>),
    device: Chosen,
    methods: impl FnOnce(&Config) -> Arc<dyn Methods>,
) -> Result<()> {
    let bus = config.daemon.bus;
    let made = std::fs::create_dir_all(folder);
    if !folder.is_dir() {
        made.map_err(|e| Error::io(folder.display(), &e))?;
    }
    // Held until the end.
    let _state = lock_state(folder, options.private).await?;
    let catalogue = open_catalogue(folder)?;
    let handed = if options.private { None } else { activation::handed_over()? };
    let path = if handed.is_some() { None } else { paths::socket(&config)? };
    let mut _device = None;
    if let Some(folder) = path.as_ref().and_then(|path| path.parent()) {
        std::fs::create_dir_all(folder).map_err(|e| Error::io(folder.display(), &e))?;
        let name = format!("device-{}.lock", device.name);
        _device = Some(lock::file(&folder.join(name), "device's lock")?);
    }
    let socket = match (handed, path) {
        (Some(socket), _) => Some(socket),
        (None, Some(path)) => Some(activation::make(&path, bus == Bus::System)?),
        (None, None) => None,
    };
    if socket.is_none() && bus == Bus::None && !options.private {
        return Err(Error::option("neither a bus nor a socket: nobody could reach the daemon"));
    }

    let load_at_start = config.models.load_at_start;
    let methods = methods(&config);
    let again = options.clone();
    let read_config = Box::new(move || read_config(&again));
    let (daemon, finished) =
        Daemon::new((config, files), read_config, catalogue, methods, Authority::default(), device)?;
    daemon.add_known_models()?;
    daemon.look_for_plugins();
    if let Err(error) = recover::recover(&daemon) {
        tracing::error!("what the last daemon left cannot be taken in: {error}");
    }
    daemon.complete();
    let worker = worker::start(daemon.clone()).map_err(|e| Error::io("cannot start the worker", &e))?;
    let control = tokio::spawn(control::run(daemon.clone(), finished));

    let listener = match &socket {
        Some(socket) => {
            let listener = socket.listener.try_clone().map_err(|e| Error::io("socket", &e))?;
            listener.set_nonblocking(true).map_err(|e| Error::io("socket", &e))?;
            Some(tokio::net::UnixListener::from_std(listener).map_err(|e| Error::io("socket", &e))?)
        }
        None => None,
    };
    let connection = match serve::on_bus(&daemon, bus).await {
        Ok(connection) => connection,
        // Without a desktop there is no session bus; the socket remains.
        Err(error) if bus == Bus::Session && socket.is_some() && error.kind != Kind::DeviceBusy => {
            tracing::warn!("{error}; only the socket is served");
            None
        }
        Err(error) => return Err(error),
    };
    if let Some(listener) = listener {
        tokio::spawn(serve::on_socket(daemon.clone(), listener));
    }
    if options.private {
        let stream = activation::standard_input()?;
        let served = daemon.clone();
        tokio::spawn(async move {
            // In a task of its own: the daemon ends with the connection, however that ends.
            match tokio::spawn(serve::one(served.clone(), stream)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::error!("{error}"),
                Err(error) => tracing::error!("{error}"),
            }
            served.request_stop();
        });
    }
    follow_sleep(&daemon, bus, connection);
    if load_at_start {
        load_default(&daemon);
    }
    tracing::info!("ready; state in {}", daemon.catalogue.folder().display());
    // Without a manager there is nobody to tell.
    let _ = sd_notify::notify(&[NotifyState::Ready]);

    wait_for_end(&daemon).await?;
    let _ = sd_notify::notify(&[NotifyState::Stopping]);
    end(&daemon, worker, control).await;
    Ok(())
}

fn open_catalogue(folder: &Path) -> Result<Catalogue> {
    let opened = Catalogue::open(folder).and_then(|catalogue| catalogue.probe().map(|()| catalogue));
    match opened {
        Err(error) if matches!(error.kind, Kind::StorageReadOnly | Kind::StorageFull) => {
            tracing::error!(
                "{error}; nothing will be remembered, and no training begins or goes on, until the state folder can be \
                 written"
            );
            Catalogue::in_memory(folder, error)
        }
        result => result,
    }
}

fn follow_sleep(daemon: &Arc<Daemon>, bus: Bus, connection: Option<zbus::Connection>) {
    let daemon = daemon.clone();
    tokio::spawn(async move {
        let system = match (bus, connection) {
            (Bus::System, Some(connection)) => Ok(connection),
            (Bus::None, _) => return,
            _ => zbus::Connection::system().await,
        };
        match system {
            Ok(connection) => logind::follow(daemon, connection).await,
            Err(error) => tracing::info!("no system bus, and so no word of the machine's sleep: {error}"),
        }
    });
}

fn load_default(daemon: &Arc<Daemon>) {
    let owner = Owner { client: String::new(), uid: daemon.uid };
    let (priority, lifetime) = (Priority::Normal, Lifetime::Daemon);
    let ticket = Ticket { owner, priority, lifetime, token: None, timeout: None, created_usec: None };
    let queued = match daemon.default_model() {
        Some(model) => {
            let precision = daemon.config().models.precision;
            daemon.submit(&ticket, Work::LoadModel { model, precision }).map(drop)
        }
        None => Err(Error::new(Kind::ModelNotFound, "models.load_at_start: there is no model")),
    };
    if let Err(error) = queued {
        tracing::error!("{error}");
    }
}

/// Waits for SIGTERM, SIGINT or the daemon's own wish; SIGHUP reads the configuration again.
async fn wait_for_end(daemon: &Arc<Daemon>) -> Result<()> {
    let on = |kind| signal(kind).map_err(|e| Error::io("signals", &e));
    let (mut terminate, mut interrupt, mut hangup) =
        (on(SignalKind::terminate())?, on(SignalKind::interrupt())?, on(SignalKind::hangup())?);
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            () = daemon.stop.notified() => break,
            _ = hangup.recv() => {
                let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
                let usec = i128::from(now.tv_sec) * 1_000_000 + i128::from(now.tv_nsec) / 1000;
                let _ = sd_notify::notify(&[NotifyState::Reloading, NotifyState::MonotonicUsec(usec)]);
                let reloading = daemon.clone();
                // The log says how it went.
                let _ = tokio::task::spawn_blocking(move || reloading.reload()).await;
                let _ = sd_notify::notify(&[NotifyState::Ready]);
            }
        }
    }
    daemon.request_stop();
    Ok(())
}

/// Trainings write their checkpoints, drawings may finish, everything else is told that the daemon ends.
async fn end(daemon: &Arc<Daemon>, worker: std::thread::JoinHandle<()>, control: tokio::task::JoinHandle<()>) {
    daemon.queue.stop();
    for job in daemon.queue.remove_all(|_| true) {
        job.request_stop(Stop::Shutdown);
        daemon.drop_waiting(&job);
    }
    for job in daemon.running().iter().filter(|job| job.kind == "train") {
        // What lives with its connection is not continued by the next daemon, but by the next call.
        job.request_stop(if job.lifetime == Lifetime::Daemon { Stop::Shutdown } else { Stop::Checkpoint });
    }
    let patience = Duration::from_secs(daemon.config().daemon.stop_timeout_sec);
    let since = Instant::now();
    let mut told = false;
    while !worker.is_finished() || !daemon.running().is_empty() {
        tokio::time::sleep(Duration::from_millis(20)).await;
        if since.elapsed() >= patience && !told {
            told = true;
            daemon.running().iter().for_each(|job| job.request_stop(Stop::Shutdown));
        }
        // A step that never ends must not keep the service manager waiting.
        if since.elapsed() >= patience + Duration::from_secs(5) {
            tracing::error!("the running step does not end; the daemon ends without it");
            break;
        }
    }
    if tokio::time::timeout(Duration::from_secs(5), control).await.is_err() {
        tracing::error!("the control loop does not end");
    }
    // What was told last is to arrive.
    tokio::time::sleep(Duration::from_millis(50)).await;
    daemon.hub.close();
}
