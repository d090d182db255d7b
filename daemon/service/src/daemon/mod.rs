//! What the daemon's parts share: configuration, catalogue, queue, objects, and who hears of their changes.

mod clients;
mod descriptors;
mod loose;
mod plugins;
mod results;
mod trainings;

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use blocklora_engine::device::Chosen;
use tokio::sync::{Notify, Semaphore, mpsc};

use crate::authority::Authority;
use crate::catalogue::Catalogue;
use crate::catalogue::jobs::JobEntry;
use crate::config::Config;
use crate::dbus::signals::Hub;
use crate::dbus::value::{Dict, dict, own};
use crate::error::{Error, Kind, Result};
use crate::jobs::queue::{Limits, Queue};
use crate::jobs::work::Work;
use crate::jobs::{Job, ResultFile, Stop, Ticket, now_usec};
use crate::methods::Methods;
use crate::objects::{ModelObject, Object, Objects, ROOT, escape, path_of};
pub use trainings::ADAPTER;

/// Finds and reads the configuration's files; what the command line says counts more.
pub type ReadConfig = Box<dyn Fn() -> Result<(Config, Vec<PathBuf>)> + Send + Sync>;

/// What all parts share.
pub struct Daemon {
    config: RwLock<(Arc<Config>, Vec<PathBuf>)>,
    read_config: ReadConfig,
    /// What it remembers.
    pub catalogue: Catalogue,
    /// Jobs that wait.
    pub queue: Queue,
    /// Samplers, strategies, trainers.
    pub methods: Arc<dyn Methods>,
    /// Who may do what.
    pub authority: Authority,
    /// Who hears of changes.
    pub hub: Hub,
    /// The user that it runs as.
    pub uid: u32,
    /// When it started.
    pub started_usec: u64,
    /// What ids begin with: how often a daemon has started on this state.
    boot: Mutex<String>,
    next_id: AtomicU64,
    objects: Mutex<Objects>,
    /// Paths whose properties may have changed.
    touched: Mutex<HashSet<String>>,
    /// What clients were last told.
    told: Mutex<HashMap<String, Dict>>,
    finished: mpsc::UnboundedSender<Arc<Job>>,
    /// Jobs that run now.
    running: Mutex<Vec<Arc<Job>>>,
    idle_unload_usec: Mutex<Option<u64>>,
    /// What computes, and why it was chosen.
    pub device: Chosen,
    device_state: Mutex<(&'static str, String)>,
    stopping: AtomicBool,
    /// Wakes whoever waits for the daemon's end.
    pub stop: Notify,
    last_activity: Mutex<Instant>,
    /// Adapters that clients brought without adding them to the library, by digest.
    loose: Mutex<HashMap<String, loose::Loose>>,
    /// Turns to read files of clients: theirs may hang, and not all threads are to hang with them.
    pub client_files: Semaphore,
}

/// How many calls read files of clients at once.
const CLIENT_FILES_MAX: usize = 8;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change under these locks is a single step.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Daemon {
    /// A daemon without clients. The receiver gets every job that has ended.
    pub fn new(
        (config, config_files): (Config, Vec<PathBuf>),
        read_config: ReadConfig,
        catalogue: Catalogue,
        methods: Arc<dyn Methods>,
        authority: Authority,
        device: Chosen,
    ) -> Result<(Arc<Self>, mpsc::UnboundedReceiver<Arc<Job>>)> {
        // What the folder has counted is not known while it cannot be written.
        let boot =
            if catalogue.is_volatile() { format!("v{}", now_usec()) } else { catalogue.next_boot()?.to_string() };
        let (finished, receiver) = mpsc::unbounded_channel();
        let daemon = Self {
            config: RwLock::new((Arc::new(config), config_files)),
            read_config,
            catalogue,
            queue: Queue::default(),
            methods,
            authority,
            hub: Hub::default(),
            uid: rustix::process::geteuid().as_raw(),
            started_usec: now_usec(),
            boot: Mutex::new(boot),
            next_id: AtomicU64::new(1),
            objects: Mutex::new(Objects::from([(ROOT.to_owned(), Object::Manager)])),
            touched: Mutex::default(),
            told: Mutex::default(),
            finished,
            running: Mutex::default(),
            idle_unload_usec: Mutex::default(),
            device_state: Mutex::new(("ready", device.reason.clone())),
            device,
            stopping: AtomicBool::new(false),
            stop: Notify::new(),
            last_activity: Mutex::new(Instant::now()),
            loose: Mutex::default(),
            client_files: Semaphore::new(CLIENT_FILES_MAX),
        };
        daemon.set_wait_max();
        Ok((Arc::new(daemon), receiver))
    }

    /// The configuration in force.
    pub fn config(&self) -> Arc<Config> {
        self.config.read().unwrap_or_else(PoisonError::into_inner).0.clone()
    }

    /// The files that it came from.
    pub fn config_files(&self) -> Vec<PathBuf> {
        self.config.read().unwrap_or_else(PoisonError::into_inner).1.clone()
    }

    /// Reads the configuration again as the start did; an error leaves the old one in force. The log says what happened:
    /// who runs `systemctl reload` is told no more than that it failed.
    pub fn reload(&self) -> Result<()> {
        let read = (self.read_config)();
        let (config, files) =
            read.inspect_err(|error| tracing::error!("the configuration stays as it was: {error}"))?;
        if config.models.device != self.config().models.device {
            tracing::warn!("models.device = {:?} counts from the next start", config.models.device);
        }
        *self.config.write().unwrap_or_else(PoisonError::into_inner) = (Arc::new(config), files);
        *lock(&self.idle_unload_usec) = None;
        self.set_wait_max();
        self.add_configured_models();
        self.touch(ROOT);
        tracing::info!("configuration read again");
        Ok(())
    }

    fn set_wait_max(&self) {
        self.queue.set_wait_max(Duration::from_secs(self.config().jobs.wait_max_sec));
    }

    /// How long an unused model stays; 0: for ever.
    pub fn idle_unload_usec(&self) -> u64 {
        let set = *lock(&self.idle_unload_usec);
        set.unwrap_or_else(|| self.config().models.idle_unload_sec.saturating_mul(1_000_000))
    }

    /// Sets it until the daemon ends or reloads.
    pub fn set_idle_unload_usec(&self, usec: u64) {
        *lock(&self.idle_unload_usec) = Some(usec);
        self.touch(ROOT);
    }

    /// An id that no other job, composition or lease ever had.
    pub fn new_id(&self) -> String {
        format!("{}j{}", lock(&self.boot), self.next_id.fetch_add(1, Ordering::Relaxed))
    }

    /// Counts this start, too, once the catalogue is the state folder's.
    pub fn count_boot(&self) -> Result<()> {
        *lock(&self.boot) = self.catalogue.next_boot()?.to_string();
        Ok(())
    }

    /// The object at `path`.
    pub fn object(&self, path: &str) -> Option<Object> {
        lock(&self.objects).get(path).cloned()
    }

    /// All objects.
    pub fn objects(&self) -> Vec<(String, Object)> {
        lock(&self.objects).iter().map(|(path, object)| (path.clone(), object.clone())).collect()
    }

    /// The names directly below `path`, and whether anything is there.
    pub fn children(&self, path: &str) -> Vec<String> {
        let prefix = if path == "/" { "/".to_owned() } else { format!("{path}/") };
        let mut names: Vec<String> = Vec::new();
        for path in lock(&self.objects).range(prefix.clone()..).map(|(path, _)| path) {
            let Some(rest) = path.strip_prefix(&prefix) else { break };
            let name = rest.split('/').next().unwrap_or_default();
            if names.last().is_none_or(|last| last != name) {
                names.push(name.to_owned());
            }
        }
        names
    }

    /// Shows an object to clients; one that is there already is replaced.
    pub fn add_object(&self, path: &str, object: Object) {
        let properties = object.properties(self);
        self.hub.added(path, &object, &properties);
        lock(&self.told).insert(path.to_owned(), properties);
        lock(&self.objects).insert(path.to_owned(), object.clone());
        self.touch_sets_with(&object);
    }

    /// Puts another object of its kind in the place of one that is shown: what differs is told as a change.
    pub fn replace_object(&self, path: &str, object: Object) {
        if let Some(shown) = lock(&self.objects).get_mut(path) {
            *shown = object;
        }
        self.touch(path);
    }

    /// Takes an object away.
    pub fn remove_object(&self, path: &str) -> Option<Object> {
        let object = lock(&self.objects).remove(path)?;
        lock(&self.told).remove(path);
        lock(&self.touched).remove(path);
        self.hub.removed(path, &object);
        self.touch_sets_with(&object);
        Some(object)
    }

    /// Compositions name the objects of their adapters: where one comes or goes, they change.
    fn touch_sets_with(&self, object: &Object) {
        let Object::Adapter(adapter) = object else { return };
        for (path, object) in self.objects() {
            if let Object::Composition(set) = object
                && set.content().0.entries.iter().any(|entry| entry.digest == adapter.entry.digest)
            {
                self.touch(&path);
            }
        }
    }

    /// The root's properties are what they are from now on: its changes are told, as those of all others are.
    pub fn complete(&self) {
        let properties = Object::Manager.properties(self);
        lock(&self.told).insert(ROOT.to_owned(), properties);
    }

    /// The properties of the object at `path` may have changed.
    pub fn touch(&self, path: &str) {
        lock(&self.touched).insert(path.to_owned());
    }

    /// Tells clients which properties of the object at `path` changed.
    pub fn tell(&self, path: &str) {
        let Some(object) = self.object(path) else { return };
        let now = object.properties(self);
        let mut told = lock(&self.told);
        let Some(before) = told.get_mut(path) else { return };
        let mut changed = Dict::new();
        for (name, value) in now {
            if before.get(&name) != Some(&value) {
                if let Ok(copy) = value.try_clone() {
                    before.insert(name.clone(), copy);
                }
                changed.insert(name, value);
            }
        }
        drop(told);
        if !changed.is_empty() {
            self.hub.changed(path, &object, &changed);
        }
    }

    /// Tells clients of everything that was touched since the last call.
    pub fn tell_all(&self) {
        for path in std::mem::take(&mut *lock(&self.touched)) {
            self.tell(&path);
        }
        let jobs = self.jobs();
        for job in jobs.iter().filter(|job| job.take_dirty()) {
            self.tell(&job.path);
        }
        for job in self.running() {
            job.previews.flush();
        }
    }

    /// All jobs, finished ones that are still kept included.
    pub fn jobs(&self) -> Vec<Arc<Job>> {
        let prefix = format!("{ROOT}/job/");
        let objects = lock(&self.objects);
        let jobs = objects.range(prefix.clone()..).take_while(|(path, _)| path.starts_with(&prefix));
        let job = |(_, object): (&String, &Object)| match object {
            Object::Job(job) => Some(job.clone()),
            _ => None,
        };
        jobs.filter_map(job).collect()
    }

    /// Queues work for `ticket`. A training is written into the catalogue before this returns.
    pub fn submit(&self, ticket: &Ticket, work: Work) -> Result<Arc<Job>> {
        let id = self.new_id();
        self.submit_as(id, ticket, work, self.queue_limits())
    }

    /// How many jobs may wait.
    pub fn queue_limits(&self) -> Limits {
        let jobs = &self.config().jobs;
        Limits { all: jobs.queue_limit, per_client: jobs.queue_limit_per_client }
    }

    /// As [`Self::submit`], for a job that has its id already.
    pub fn submit_as(&self, id: String, ticket: &Ticket, work: Work, limits: Limits) -> Result<Arc<Job>> {
        let path = match &ticket.token {
            Some(token) => format!("{ROOT}/job/{}_{token}", escape(&ticket.owner.client)),
            None => path_of("job", &id),
        };
        let spec = match &work {
            Work::Train(train) => Some(serde_json::to_string(train).map_err(|e| Error::failed(e.to_string()))?),
            _ => None,
        };
        let job = Arc::new(Job::new(id, path.clone(), ticket, work));
        // Known before it can run, so that no signal of it is lost.
        self.add_owned(&path, Object::Job(job.clone()))?;
        if spec.is_some() {
            let entry = JobEntry { spec, ..JobEntry::of(&job) };
            if let Err(error) = self.catalogue.put_jobs(&[entry], self.config().jobs.history_max) {
                return Err(self.not_queued(&job, error));
            }
        }
        if let Err(error) = self.queue.push(job.clone(), limits) {
            let error = self.not_queued(&job, error);
            if job.kind == "train" {
                self.catalogue.forget_job(&job.id)?;
            }
            return Err(error);
        }
        // Its client may have gone before it was in the queue.
        if job.stop_requested().is_some() && self.queue.remove(&job.id).is_some() {
            self.drop_waiting(&job);
        }
        self.touch(ROOT);
        Ok(job)
    }

    /// Takes away a job that cannot be queued: who saw it meanwhile, and waits for it, is told why.
    fn not_queued(&self, job: &Job, error: Error) -> Error {
        job.finish(Err(error.clone()), Vec::new());
        job.announce();
        self.remove_object(&job.path);
        error
    }

    /// A job has ended, whether it ran or not: its last signals go out and those who wait for it go on.
    pub fn finish(&self, job: &Arc<Job>, outcome: Result<Dict>, results: Vec<ResultFile>) {
        let failed = outcome.is_err();
        if job.finish(outcome, results) {
            self.end_training(job);
            if let Some(composition) = job.composition.as_ref().filter(|_| failed) {
                self.remove_object(composition);
            }
            // The receiver lives as long as the daemon.
            let _ = self.finished.send(job.clone());
        }
        self.touch(ROOT);
    }

    /// Ends a job early.
    pub fn stop_job(&self, job: &Arc<Job>, stop: Stop) {
        job.request_stop(stop);
        if self.queue.remove(&job.id).is_some() {
            self.drop_waiting(job);
        }
    }

    /// A job that was taken out of the queue ends without having run.
    pub fn drop_waiting(&self, job: &Arc<Job>) {
        self.finish(job, Err(job.stop_error()), Vec::new());
    }

    /// Notes that the worker runs `job` now, or no longer.
    pub fn set_running(&self, job: &Arc<Job>, runs: bool) {
        let mut running = lock(&self.running);
        running.retain(|other| other.id != job.id);
        if runs {
            running.push(job.clone());
        }
        // One less waits.
        self.touch(ROOT);
    }

    /// Jobs that run now; one that let others go first is among them.
    pub fn running(&self) -> Vec<Arc<Job>> {
        lock(&self.running).clone()
    }

    /// The models, by id.
    pub fn models(&self) -> Vec<Arc<ModelObject>> {
        let model = |(_, object): (String, Object)| match object {
            Object::Model(model) => Some(model),
            _ => None,
        };
        self.objects().into_iter().filter_map(model).collect()
    }

    /// The model `id`.
    pub fn model(&self, id: &str) -> Result<Arc<ModelObject>> {
        match self.object(&path_of("model", id)) {
            Some(Object::Model(model)) => Ok(model),
            _ => {
                let known: Vec<String> = self.models().iter().map(|model| model.id.clone()).collect();
                let known = if known.is_empty() { "there is none".to_owned() } else { known.join(", ") };
                Err(Error::new(Kind::ModelNotFound, format!("there is no model {id:?} (known: {known})")))
            }
        }
    }

    /// The id of the model that is used where none is named.
    pub fn default_model(&self) -> Option<String> {
        let configured = self.config().models.default.clone();
        if !configured.is_empty() {
            return Some(configured);
        }
        let models = self.models();
        models.iter().find(|model| model.id == "starter").or(models.first()).map(|model| model.id.clone())
    }

    /// Devices as the interface shows them.
    pub fn device_properties(&self) -> Dict {
        let (state, reason) = lock(&self.device_state).clone();
        // Only the CPU's memory is known without asking a driver; 0 is unknown.
        let (is_cpu, number) = match self.device.name.split_once(':') {
            Some((_, number)) => (false, number),
            None => (true, ""),
        };
        let (total, free) = if is_cpu { crate::life::memory::system() } else { (0, 0) };
        let name = if is_cpu { crate::life::memory::processor() } else { format!("NVIDIA GPU {number}") };
        dict([
            ("id", own(self.device.name.clone())),
            ("kind", own(self.device.name.split(':').next().unwrap_or_default().to_owned())),
            ("name", own(name)),
            ("memory_bytes", own(total)),
            // In steps, so that it does not change with every breath.
            ("free_bytes", own(free >> 28 << 28)),
            ("state", own(state)),
            ("reason", own(reason)),
        ])
    }

    /// Notes how the device is.
    pub fn set_device_state(&self, state: &'static str, reason: &str) {
        let reason = if state == "ready" { &self.device.reason } else { reason };
        *lock(&self.device_state) = (state, reason.to_owned());
        self.touch(ROOT);
    }

    /// Whether the daemon is ending.
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// The daemon is to end.
    pub fn request_stop(&self) {
        self.stopping.store(true, Ordering::Release);
        self.stop.notify_waiters();
        self.stop.notify_one();
    }

    /// Somebody needs the daemon now.
    pub fn note_activity(&self) {
        *lock(&self.last_activity) = Instant::now();
    }

    /// For how long nobody has needed it.
    pub fn idle_for(&self) -> Duration {
        if !self.queue.is_empty() || !self.running().is_empty() || self.hub.has_clients() {
            self.note_activity();
        }
        lock(&self.last_activity).elapsed()
    }
}
