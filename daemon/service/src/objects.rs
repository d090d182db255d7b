//! The objects that clients see, and their properties.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use zbus::{ObjectPath, Variant};

use crate::catalogue::adapters::AdapterEntry;
use crate::config::Precision;
use crate::daemon::Daemon;
use crate::dbus::value::{Dict, clone_dict, dict, own, strings};
use crate::error::Error;
use crate::jobs::work::Set;
use crate::jobs::{Job, Lifetime, Owner};
use crate::methods::{MethodInfo, MethodKind};

/// The root of all paths.
pub const ROOT: &str = "/org/blocklora/Daemon1";
/// The prefix of all interfaces.
pub const INTERFACE: &str = "org.blocklora.Daemon1";

/// The path of the object `id` of the kind `what` ("job", "model" ...). Bytes that paths may not have are escaped.
pub fn path_of(what: &str, id: &str) -> String {
    format!("{ROOT}/{what}/{}", escape(id))
}

/// `text` as an element of a path.
pub fn escape(text: &str) -> String {
    let byte = |b: u8| if b.is_ascii_alphanumeric() { char::from(b).to_string() } else { format!("_{b:02x}") };
    text.bytes().map(byte).collect()
}

/// What is known of a model.
#[derive(Debug, Default)]
pub struct ModelState {
    /// Of its weights; empty before it was loaded once.
    pub digest: String,
    /// Likewise.
    pub architecture: String,
    /// Pixels; 0 before it was loaded once.
    pub size: (u32, u32),
    /// Sides of pictures are multiples of this.
    pub size_multiple: u32,
    /// "unloaded", "loading", "loaded", "missing" or "failed".
    pub state: &'static str,
    /// Why it is missing or failed.
    pub problem: Option<Error>,
    /// While it is loaded: on which device, how, and in how many bytes.
    pub loaded: Option<(String, Precision, u64)>,
    /// Set by a client: how long it stays after its last use; 0: as configured.
    pub keep_alive_usec: u64,
    /// When a job last used it.
    pub last_used: Option<Instant>,
}

/// A registered model.
pub struct ModelObject {
    /// Its id.
    pub id: String,
    /// Its folder.
    pub path: PathBuf,
    /// Whether the configuration names it, so that it cannot be forgotten.
    pub configured: bool,
    state: Mutex<ModelState>,
}

impl ModelObject {
    /// A model that is not loaded.
    pub fn new(id: String, path: PathBuf, configured: bool, state: ModelState) -> Self {
        Self { id, path, configured, state: Mutex::new(state) }
    }
    /// What is known of it.
    pub fn state(&self) -> MutexGuard<'_, ModelState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
    /// Its object path.
    pub fn object_path(&self) -> String {
        path_of("model", &self.id)
    }
    /// Whether it is in memory, or on its way there.
    pub fn is_in_use(&self) -> bool {
        let state = self.state();
        state.loaded.is_some() || state.state == "loading"
    }
    /// How long it stays loaded after its last use; none: for ever.
    pub fn keep_alive(&self, idle_unload: Option<Duration>) -> Option<Duration> {
        match self.state().keep_alive_usec {
            0 => idle_unload,
            u64::MAX => None,
            usec => Some(Duration::from_micros(usec)),
        }
    }
}

/// An adapter of the library that somebody registered or opened.
pub struct AdapterObject {
    /// What the catalogue knows.
    pub entry: AdapterEntry,
    users: Mutex<BTreeSet<u32>>,
}

impl AdapterObject {
    /// An adapter that these users registered or opened.
    pub fn new(entry: AdapterEntry, users: BTreeSet<u32>) -> Self {
        Self { entry, users: Mutex::new(users) }
    }
    /// The users who registered or opened it.
    pub fn users(&self) -> MutexGuard<'_, BTreeSet<u32>> {
        self.users.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A set of adapters with weights.
pub struct CompositionObject {
    /// Its path.
    pub path: String,
    /// Id of the model.
    pub model: String,
    /// Who made it.
    pub owner: Owner,
    /// What ends it.
    pub lifetime: Lifetime,
    /// The set, and how often it changed.
    pub content: Mutex<(Set, u64)>,
}

impl CompositionObject {
    /// The set and its generation.
    pub fn content(&self) -> MutexGuard<'_, (Set, u64)> {
        self.content.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Something with a path.
#[derive(Clone)]
pub enum Object {
    /// The root.
    Manager,
    /// A model.
    Model(Arc<ModelObject>),
    /// An adapter.
    Adapter(Arc<AdapterObject>),
    /// A composition.
    Composition(Arc<CompositionObject>),
    /// A job.
    Job(Arc<Job>),
    /// A method, by its id.
    Plugin(String),
}

impl Object {
    /// Its own interface.
    pub fn interface(&self) -> &'static str {
        match self {
            Self::Manager => "org.blocklora.Daemon1.Manager",
            Self::Model(_) => "org.blocklora.Daemon1.Model",
            Self::Adapter(_) => "org.blocklora.Daemon1.Adapter",
            Self::Composition(_) => "org.blocklora.Daemon1.Composition",
            Self::Job(_) => "org.blocklora.Daemon1.Job",
            Self::Plugin(_) => "org.blocklora.Daemon1.Plugin",
        }
    }

    /// All interfaces that it has.
    pub fn interfaces(&self) -> &'static [&'static str] {
        const STANDARD: [&str; 3] =
            ["org.freedesktop.DBus.Introspectable", "org.freedesktop.DBus.Peer", "org.freedesktop.DBus.Properties"];
        macro_rules! with {
            ($name:literal $(, $more:literal)*) => {
                &[concat!("org.blocklora.Daemon1.", $name), STANDARD[0], STANDARD[1], STANDARD[2] $(, $more)*]
            };
        }
        match self {
            Self::Manager => with!("Manager", "org.freedesktop.DBus.ObjectManager"),
            Self::Model(_) => with!("Model"),
            Self::Adapter(_) => with!("Adapter"),
            Self::Composition(_) => with!("Composition"),
            Self::Job(_) => with!("Job"),
            Self::Plugin(_) => with!("Plugin"),
        }
    }

    /// Whose it is: the client whose connection gets its signals without asking.
    pub fn client(&self) -> Option<&str> {
        match self {
            Self::Job(job) => Some(&job.owner.client),
            Self::Composition(composition) => Some(&composition.owner.client),
            _ => None,
        }
    }

    /// The user who alone reads the texts of it: of a job, what it is about and why it failed.
    pub fn reader(&self) -> Option<u32> {
        match self {
            Self::Job(job) => Some(job.owner.uid),
            _ => None,
        }
    }

    /// Properties of it, all or some, without the texts that only its user reads.
    pub fn without_texts(&self, properties: &Dict) -> Dict {
        let mut shown = clone_dict(properties);
        if let Self::Job(job) = self {
            let (name, _, details) = job_error(job);
            let error = own(Variant::from((name, String::new(), details)));
            for (key, instead) in [("Description", own("")), ("Error", error)] {
                shown.entry(key.to_owned()).and_modify(|value| *value = instead);
            }
        }
        shown
    }

    /// Its properties now.
    pub fn properties(&self, daemon: &Daemon) -> Dict {
        match self {
            Self::Manager => manager(daemon),
            Self::Model(model) => model_properties(model),
            Self::Adapter(adapter) => adapter_properties(&adapter.entry),
            Self::Composition(composition) => composition_properties(composition, daemon),
            Self::Job(job) => job_properties(job),
            Self::Plugin(id) => {
                daemon.methods.list().iter().find(|m| m.id == *id).map(plugin_properties).unwrap_or_default()
            }
        }
    }
}

fn ids(methods: &[MethodInfo], kind: MethodKind) -> zbus::OwnedVariant {
    let usable = methods.iter().filter(|m| m.state == "enabled" && m.kinds.contains(&kind));
    strings(&usable.map(|m| m.name.clone()).collect::<Vec<_>>())
}

fn manager(daemon: &Daemon) -> Dict {
    let methods = daemon.methods.list();
    let config = daemon.config();
    let files: Vec<String> = daemon.config_files().iter().map(|p| p.display().to_string()).collect();
    let mut features: Vec<String> = ["previews", "train", "bake", "plugins"].map(str::to_owned).into();
    if daemon.authority.has_polkit() {
        features.push("polkit".to_owned());
    }
    dict([
        ("Version", own(env!("CARGO_PKG_VERSION"))),
        ("SpecVersions", strings(&[blocklora_spec::VERSION.to_owned()])),
        ("Features", strings(&features)),
        ("Devices", own(Variant::from(vec![daemon.device_properties()]))),
        ("DefaultModel", own(daemon.default_model().unwrap_or_default())),
        ("Samplers", ids(&methods, MethodKind::Sampler)),
        ("Strategies", ids(&methods, MethodKind::MergeStrategy)),
        ("Trainers", ids(&methods, MethodKind::Trainer)),
        ("QueueLength", own(daemon.queue.len() as u32)),
        ("QueueLimit", own(config.jobs.queue_limit as u32)),
        ("IdleUnloadUSec", own(daemon.idle_unload_usec())),
        ("Tainted", own(daemon.methods.tainted())),
        ("StartedUSec", own(daemon.started_usec)),
        ("ConfigFiles", strings(&files)),
    ])
}

fn model_properties(model: &ModelObject) -> Dict {
    let state = model.state();
    let (device, precision, bytes) = match &state.loaded {
        Some((device, precision, bytes)) => (device.clone(), precision.name(), *bytes),
        None => (String::new(), "", 0),
    };
    let problem = state.problem.as_ref().map(|e| (e.name(), e.message.clone())).unwrap_or_default();
    dict([
        ("Id", own(model.id.clone())),
        ("Digest", own(state.digest.clone())),
        ("Architecture", own(state.architecture.clone())),
        ("Device", own(device)),
        ("Precision", own(precision)),
        ("State", own(state.state)),
        ("Problem", own(Variant::from(problem))),
        ("ResidentBytes", own(bytes)),
        ("Path", own(model.path.display().to_string())),
        ("Width", own(state.size.0)),
        ("Height", own(state.size.1)),
        ("SizeMultiple", own(state.size_multiple)),
        ("KeepAliveUSec", own(state.keep_alive_usec)),
    ])
}

/// A partition as a{sv}; `slot` only of an adapter's.
pub fn partition_dict(partition: &blocklora_spec::Partition, with_slot: bool) -> Dict {
    let scheme = serde_json::to_value(partition.scheme).ok().and_then(|v| v.as_str().map(str::to_owned));
    let mut entries = dict([
        ("scheme", own(scheme.unwrap_or_default())),
        ("capacity", own(partition.capacity)),
        ("seed", own(partition.seed)),
    ]);
    if with_slot {
        entries.insert("slot".to_owned(), own(partition.slot));
    }
    entries
}

fn adapter_properties(entry: &AdapterEntry) -> Dict {
    let partition = entry.partition.as_ref().map(|p| partition_dict(p, true)).unwrap_or_default();
    let name = match entry.state.as_str() {
        "missing" => Some(crate::error::Kind::AdapterNotFound),
        "ok" => None,
        _ => Some(crate::error::Kind::InvalidAdapter),
    };
    let problems: Vec<(String, String)> =
        name.into_iter().map(|kind| (Error::new(kind, "").name(), entry.problem.clone())).collect();
    dict([
        ("Name", own(entry.name.clone())),
        ("Digest", own(entry.digest.clone())),
        ("SpecVersion", own(blocklora_spec::VERSION)),
        ("Architecture", own(entry.architecture.clone())),
        ("BaseDigest", own(entry.base_digest.clone())),
        ("Algorithm", own(entry.algorithm.clone())),
        ("Producer", own(Variant::from((entry.algorithm_version.clone(), entry.algorithm_digest.clone())))),
        ("Kind", own(entry.kind.clone())),
        ("ClassWord", own(entry.class_word.clone())),
        ("Rank", own(entry.rank)),
        ("Partition", own(Variant::from(partition))),
        ("SizeBytes", own(entry.size)),
        ("Problems", own(Variant::from(problems))),
    ])
}

/// An object path as a value; ours are always valid.
pub fn object_path(path: &str) -> ObjectPath<'static> {
    ObjectPath::try_from(path.to_owned()).unwrap_or_else(|_| ObjectPath::from_static_str_unchecked("/"))
}

fn composition_properties(composition: &CompositionObject, daemon: &Daemon) -> Dict {
    let content = composition.content();
    let entries: Vec<(ObjectPath<'static>, Dict)> = content
        .0
        .entries
        .iter()
        .map(|entry| {
            let path = path_of("adapter", &entry.digest);
            let path = if daemon.object(&path).is_some() { path } else { "/".to_owned() };
            let info = dict([
                ("digest", own(entry.digest.clone())),
                ("name", own(entry.name.clone())),
                ("weight", own(f64::from(entry.weight))),
            ]);
            (object_path(&path), info)
        })
        .collect();
    dict([
        ("Model", own(Variant::from(object_path(&path_of("model", &composition.model))))),
        ("Entries", own(Variant::from(entries))),
        ("Strategy", own(content.0.strategy.clone())),
        ("Generation", own(content.1)),
        ("OwnerUid", own(composition.owner.uid)),
        ("Lifetime", own(composition.lifetime.name())),
    ])
}

/// Why it failed: name, message, and details, which a training has while it runs.
fn job_error(job: &Job) -> (String, String, Dict) {
    let (name, message) = match job.outcome() {
        Some(Err(error)) => (error.name(), error.message),
        _ => Default::default(),
    };
    let loss = job.status(|s| s.loss).map(|loss| ("loss".to_owned(), own(f64::from(loss))));
    (name, message, loss.into_iter().collect())
}

fn job_properties(job: &Job) -> Dict {
    let error = job_error(job);
    job.status(|s| {
        dict([
            ("Kind", own(job.kind)),
            ("State", own(s.state.name())),
            ("Stage", own(s.stage)),
            ("Progress", own(s.progress.unwrap_or(0.0))),
            ("ProgressValid", own(s.progress.is_some())),
            ("Step", own(Variant::from(s.step))),
            ("QueuePosition", own(s.queue_position)),
            ("CreatedUSec", own(job.created_usec)),
            ("StartedUSec", own(s.started_usec)),
            ("FinishedUSec", own(s.finished_usec)),
            ("ExpectedEndUSec", own(s.expected_end_usec)),
            ("OwnerUid", own(job.owner.uid)),
            ("Priority", own(job.priority.name())),
            ("Lifetime", own(job.lifetime.name())),
            ("Description", own(job.description.clone())),
            ("Error", own(Variant::from(error))),
        ])
    })
}

fn plugin_properties(method: &MethodInfo) -> Dict {
    let kinds: Vec<String> = method.kinds.iter().map(|kind| kind.name().to_owned()).collect();
    dict([
        ("Id", own(method.id.clone())),
        ("Version", own(method.version.clone())),
        ("ConfigSchema", own(method.config_schema.clone())),
        ("State", own(method.state.clone())),
        ("Digest", own(method.digest.clone())),
        ("AbiVersion", own(Variant::from(method.abi))),
        ("Kinds", strings(&kinds)),
        ("Reason", own(Variant::from(method.reason.clone()))),
        ("Crashes", own(method.crashes)),
    ])
}

/// All objects by path.
pub type Objects = BTreeMap<String, Object>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_become_valid_paths() {
        for id in ["starter", "sd-1.5", "ünï", "", "a/b"] {
            let path = path_of("model", id);
            assert!(id.is_empty() || ObjectPath::try_from(path.as_str()).is_ok(), "{path}");
        }
        assert_eq!(path_of("model", "sd-1.5"), "/org/blocklora/Daemon1/model/sd_2d1_2e5");
    }
}
