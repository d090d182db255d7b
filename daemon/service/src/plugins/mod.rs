//! The plugin host: finds plugins, keeps bad ones away, and makes the engine's samplers, merge strategies and trainers of
//! good ones.
//!
//! Listing reads manifests only. Before a library is first used, it is scanned in a helper process; what it says there is
//! remembered by the digest of its file. A library that crashes or hangs is quarantined until its file changes or the
//! quarantine is lifted.

pub mod artefacts;
pub mod check;
mod current;
pub mod discover;
mod error;
mod helper;
mod kept;
mod merge;
mod methods;
mod records;
mod running;
mod sample;
mod scan;
pub mod settings;
pub mod stop;
mod train;
pub mod words;
mod worker;

use std::collections::HashMap;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use blocklora_engine::merge::strategy::MergeStrategy;
use blocklora_engine::sample::Sampler;
use blocklora_engine::train::Trainer;
use blocklora_sdk::abi::Library;
use blocklora_sdk::manifest::{Manifest, PluginKind};
use blocklora_sdk::merge::AnyMergeStrategy;
use blocklora_sdk::overlay;
use blocklora_sdk::sample::AnySampler;
use blocklora_sdk::train::AnyTrainer;
use blocklora_spec::Algorithm;
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use discover::{Broken, Found};
pub use error::{PluginError, Result, noun};
use kept::Kept;
use records::{Records, Scanned};
use running::{Place, Running};

/// Where plugins' code runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Isolation {
    /// In this process: the fastest way, but a plugin that crashes takes the process along.
    #[default]
    InProcess,
    /// In a child process for each method in use, which is killed if it crashes, hangs or takes too much memory.
    Worker,
}

/// "in-process" or "worker": where plugins' code runs, whatever the configuration says.
pub const ISOLATION_VARIABLE: &str = "BLOCKLORA_PLUGIN_ISOLATION";

impl Isolation {
    /// As a configuration has it: "in-process" or "worker".
    pub fn from_word(word: &str) -> Option<Self> {
        match word {
            "in-process" => Some(Self::InProcess),
            "worker" => Some(Self::Worker),
            _ => None,
        }
    }

    /// What [`ISOLATION_VARIABLE`] says, if it says something; a worker if that is unknown.
    pub fn from_environment() -> Option<Self> {
        let word = std::env::var(ISOLATION_VARIABLE).ok().filter(|word| !word.is_empty())?;
        Some(Self::from_word(&word).unwrap_or(Self::Worker))
    }
}

/// How the host works.
#[derive(Clone, Debug)]
pub struct Options {
    /// The folders to search, in order.
    pub folders: Vec<PathBuf>,
    /// Where records are kept.
    pub state: PathBuf,
    /// Where plugins' code runs.
    pub isolation: Isolation,
    /// How long a plugin in a worker may be silent before it counts as hanging.
    pub silence_max: Duration,
    /// How long a scan may take.
    pub scan_max: Duration,
}

impl Default for Options {
    /// The usual folders, and the state folder of the service or of the user.
    fn default() -> Self {
        let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let state = absolute("STATE_DIRECTORY")
            .or_else(|| Some(absolute("XDG_STATE_HOME")?.join("blocklora")))
            .or_else(|| Some(absolute("HOME")?.join(".local/state/blocklora")))
            .unwrap_or_else(|| std::env::temp_dir().join("blocklora"));
        Self {
            folders: discover::folders(),
            state,
            isolation: Isolation::from_environment().unwrap_or_default(),
            silence_max: worker::SILENCE_MAX,
            scan_max: scan::TIME_LIMIT,
        }
    }
}

/// How a daemon ended that was not to end, for people: which way, and in whose code where it runs that of plugins itself.
/// None if nothing says that it did not end by itself.
pub fn crash_of(status: ExitStatus, process: u32, options: &Options) -> Option<String> {
    let records = Records::open(&options.state);
    let plugins: Vec<String> =
        running::ended_in(&options.state, process).iter().map(|digest| records.name(digest)).collect();
    let death = helper::death(status);
    // What somebody else ended is no plugin's fault, whosever code it was in.
    if plugins.is_empty() || helper::was_ended(status) {
        return status.signal().map(|_| death);
    }
    Some(format!(
        "{death} in the code of {}: report it to the plugin's author, and use another one meanwhile, or let it run apart \
         with {ISOLATION_VARIABLE}=worker",
        plugins.join(", ")
    ))
}

/// What a plugin is good for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// Usable, as far as is known.
    Ready,
    /// Its library is missing or not readable.
    Missing(String),
    /// It crashed or hung.
    Quarantined(String),
}

/// The reason of a quarantine that somebody asked for.
pub const BY_HAND: &str = "disabled by hand";

/// One plugin, as it is listed.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Where it lies and what its manifest says.
    pub found: Found,
    /// SHA-256 of its library in hex; empty if that is not readable.
    pub digest: String,
    /// What it is good for.
    pub state: State,
    /// How often it crashed, hung or took too much memory.
    pub crashes: u32,
}

/// One plugin in full.
#[derive(Clone, Debug)]
pub struct Info {
    /// As it is listed.
    pub entry: Entry,
    /// JSON Schema of its settings.
    pub schema: Value,
    /// Its settings if none are given.
    pub defaults: Value,
}

/// The plugin host.
pub struct Plugins {
    options: Options,
    records: Arc<Records>,
    running: Arc<Running>,
    /// Libraries that are open in this process, by digest.
    open: Mutex<HashMap<String, Library>>,
    /// Whether one of them does not come with this release.
    foreign: AtomicBool,
    listed: Mutex<methods::Listed>,
    samplers: Kept<dyn Sampler>,
    strategies: Kept<dyn MergeStrategy>,
}

/// A plugin with its settings, ready to be used.
struct Method {
    name: String,
    algorithm: Algorithm,
    code: Code,
}

/// Where its code runs.
enum Code {
    Library(Library, Place),
    Worker(Box<worker::Worker>),
}

impl Code {
    /// Set when its process has ended.
    fn gone(&self) -> Option<Arc<AtomicBool>> {
        match self {
            Self::Library(..) => None,
            Self::Worker(worker) => Some(worker.gone()),
        }
    }
}

/// A plugin that somebody wants, and the settings that it is given.
struct Wanted {
    /// Tells it from all others, and from itself with other settings.
    key: String,
    found: Found,
    digest: String,
    scanned: Scanned,
    given: Value,
}

impl Plugins {
    /// The host.
    pub fn new(options: Options) -> Self {
        let records = Arc::new(Records::open(&options.state));
        let running = Arc::new(Running::open(&options.state, &records));
        let (samplers, strategies) = (Kept::new(false), Kept::new(true));
        let (open, foreign, listed) = (Mutex::default(), AtomicBool::default(), Mutex::default());
        Self { options, records, running, open, foreign, listed, samplers, strategies }
    }

    /// All plugins by kind and id, and files that are no manifests. Loads nothing.
    pub fn list(&self) -> (Vec<Entry>, Vec<Broken>) {
        let catalogue = discover::search(&self.options.folders);
        (catalogue.found.into_values().map(|found| self.entry(found)).collect(), catalogue.broken)
    }

    /// The plugin's schema and defaults; scans it if that has not been done.
    pub fn info(&self, kind: PluginKind, id: &str) -> Result<Info> {
        let found = self.find(kind, id)?;
        let (digest, scanned) = self.scanned(&found)?;
        let entry = self.entry(found);
        debug_assert_eq!(entry.digest, digest);
        Ok(Info { entry, schema: scanned.schema, defaults: scanned.defaults })
    }

    /// Whether the plugin's settings have this key.
    pub fn has_setting(&self, kind: PluginKind, id: &str, key: &str) -> Result<bool> {
        Ok(self.info(kind, id)?.schema.get("properties").is_some_and(|properties| properties.get(key).is_some()))
    }

    /// Quarantines the plugin for `reason`, or lifts its quarantine (None).
    pub fn set_quarantine(&self, kind: PluginKind, id: &str, reason: Option<&str>) -> Result<()> {
        let found = self.find(kind, id)?;
        let digest = self.digest(&found)?;
        self.records.update(&digest, |record| {
            record.quarantine = reason.map(str::to_owned);
            record.deaths = 0;
        });
        Ok(())
    }

    /// The sampler `id` with these settings (an object; null for none): one that is at hand, or a new one.
    pub fn sampler(&self, id: &str, settings: &Value) -> Result<Arc<dyn Sampler>> {
        let wanted = self.wanted(PluginKind::Sample, id, settings)?;
        if let Some(sampler) = self.samplers.get(&wanted.key) {
            return Ok(sampler);
        }
        let key = wanted.key.clone();
        let spacing = wanted.found.manifest.timestep_spacing.unwrap_or_default();
        let Method { name, algorithm, code } = self.method(wanted)?;
        let gone = code.gone();
        let (sampler, place): (Box<dyn AnySampler>, _) = match code {
            Code::Library(library, place) => {
                let made = place.inside(|| library.sampler(&algorithm.config));
                (made.map_err(|e| refused(&name, e))?, Some(place))
            }
            Code::Worker(worker) => (worker, None),
        };
        let sampler = Arc::new(sample::PluginSampler { id: algorithm.id, sampler, spacing, place }) as Arc<dyn Sampler>;
        self.samplers.put(key, &sampler, gone);
        Ok(sampler)
    }

    /// The merge strategy `id` with these settings, likewise.
    pub fn strategy(&self, id: &str, settings: &Value) -> Result<Arc<dyn MergeStrategy>> {
        let wanted = self.wanted(PluginKind::Merge, id, settings)?;
        if let Some(strategy) = self.strategies.get(&wanted.key) {
            return Ok(strategy);
        }
        let key = wanted.key.clone();
        let Method { name, algorithm, code } = self.method(wanted)?;
        let gone = code.gone();
        let (strategy, place): (Box<dyn AnyMergeStrategy>, _) = match code {
            Code::Library(library, place) => {
                let made = place.inside(|| library.strategy(&algorithm.config));
                (made.map_err(|e| refused(&name, e))?, Some(place))
            }
            Code::Worker(worker) => (worker, None),
        };
        let strategy = merge::PluginStrategy::new(algorithm, strategy, place);
        let strategy = Arc::new(strategy) as Arc<dyn MergeStrategy>;
        self.strategies.put(key, &strategy, gone);
        Ok(strategy)
    }

    /// The trainer `id` with these settings.
    pub fn trainer(&self, id: &str, settings: &Value) -> Result<Box<dyn Trainer>> {
        let Method { name, algorithm, code } = self.method(self.wanted(PluginKind::Train, id, settings)?)?;
        let (trainer, place): (Box<dyn AnyTrainer>, _) = match code {
            Code::Library(library, place) => {
                let made = place.inside(|| library.trainer(&algorithm.config));
                (made.map_err(|e| refused(&name, e))?, Some(place))
            }
            Code::Worker(worker) => (worker, None),
        };
        Ok(Box::new(train::PluginTrainer { algorithm, trainer, place }))
    }

    /// The kind and the id in `<kind>-<id>`.
    fn split(&self, name: &str) -> Result<(PluginKind, String)> {
        let found = self.list().0.into_iter().map(|entry| entry.found.manifest).find(|m| m.full_name() == name);
        found.map(|manifest| (manifest.kind, manifest.id)).ok_or_else(|| PluginError::Unknown {
            kind: PluginKind::Merge,
            id: name.to_owned(),
            known: "those that are listed".to_owned(),
        })
    }

    /// Whether a library that does not come with this release was opened in this process.
    fn has_foreign_code(&self) -> bool {
        self.foreign.load(Ordering::Relaxed)
    }

    fn find(&self, kind: PluginKind, id: &str) -> Result<Found> {
        if let Some(found) = discover::find(&self.options.folders, kind, id) {
            return Ok(found);
        }
        let catalogue = discover::search(&self.options.folders);
        let has_alias = |found: &&Found| found.manifest.kind == kind && found.manifest.aliases.contains_key(id);
        if let Some(found) = catalogue.found.values().find(has_alias) {
            return Ok(found.clone());
        }
        // A manifest that is there but wrong explains more than a list of others.
        let file = format!("{kind}-{id}.toml");
        if let Some(broken) = catalogue.broken.into_iter().find(|b| b.path.file_name().is_some_and(|n| *n == *file)) {
            return Err(PluginError::Incompatible { path: broken.path, reason: broken.reason });
        }
        let known: Vec<&str> = catalogue.found.keys().filter(|(k, _)| *k == kind).map(|(_, id)| id.as_str()).collect();
        let known = if known.is_empty() { "none (no plugins are installed)".to_owned() } else { known.join(", ") };
        Err(PluginError::Unknown { kind, id: id.to_owned(), known })
    }

    fn entry(&self, found: Found) -> Entry {
        let digest = self.digest(&found);
        let (digest, state, crashes) = match digest {
            Err(error) => (String::new(), State::Missing(error.to_string()), 0),
            Ok(digest) => {
                let record = self.records.get(&digest);
                let state = record.quarantine.map_or(State::Ready, State::Quarantined);
                (digest, state, record.crashes)
            }
        };
        Entry { found, digest, state, crashes }
    }

    fn digest(&self, found: &Found) -> Result<String> {
        self.records.digest(&found.library).map_err(|e| PluginError::Incompatible {
            path: found.library.clone(),
            reason: format!("{e}: install the plugin again, or build it"),
        })
    }

    /// What the last scan of the same file said, if there was one; an error for a plugin that may not be used.
    fn known(&self, found: &Found) -> Result<(String, Option<Scanned>)> {
        let digest = self.digest(found)?;
        let record = self.records.get(&digest);
        if let Some(reason) = record.quarantine {
            let name = found.manifest.full_name();
            let by_hand = reason == BY_HAND;
            return Err(if by_hand {
                PluginError::Disabled { name }
            } else {
                PluginError::Quarantined { name, reason }
            });
        }
        Ok((digest, record.scanned.filter(|scanned| is_of(scanned, &found.manifest))))
    }

    /// What the plugin's scan said: of the last time, or of this one.
    fn scanned(&self, found: &Found) -> Result<(String, Scanned)> {
        let (digest, known) = self.known(found)?;
        let scan = || scan::scan_in_helper(&self.records, &digest, found, self.options.scan_max);
        let scanned = known.map_or_else(scan, Ok)?;
        Ok((digest, scanned))
    }

    /// The plugin that is there now, if it may be used.
    fn wanted(&self, kind: PluginKind, id: &str, given: &Value) -> Result<Wanted> {
        let found = self.find(kind, id)?;
        let given = settings::with_whole_numbers(with_alias(found.manifest.aliases.get(id), given));
        let (digest, scanned) = self.scanned(&found)?;
        let key = format!("{} {digest} {given}", found.manifest.full_name());
        Ok(Wanted { key, found, digest, scanned, given })
    }

    /// The plugin with checked and completed settings, its library open.
    fn method(&self, wanted: Wanted) -> Result<Method> {
        let Wanted { found, digest, scanned, given, .. } = wanted;
        let (name, given) = (found.manifest.full_name(), &given);
        settings::check(&scanned.schema, given)
            .map_err(|reason| PluginError::Settings { name: name.clone(), reason })?;
        let (code, config) = match self.options.isolation {
            Isolation::InProcess => {
                let library = self.library(&digest, &found)?;
                let place = Place::new(self.running.clone(), &digest);
                let config = place.inside(|| library.resolve(given)).map_err(|e| refused(&name, e))?;
                (Code::Library(library, place), config)
            }
            Isolation::Worker => {
                let (records, digest, name) = (self.records.clone(), digest.clone(), name.clone());
                let accounts = worker::Accounts { records, digest, name };
                let (worker, config) = worker::Worker::start(&found, given, accounts, self.options.silence_max)?;
                (Code::Worker(Box::new(worker)), config)
            }
        };
        let Manifest { id, version, .. } = found.manifest;
        let algorithm = Algorithm { id, version, digest: Some(digest), config };
        Ok(Method { name, algorithm, code })
    }

    fn library(&self, digest: &str, found: &Found) -> Result<Library> {
        let mut open = self.open.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(library) = open.get(digest) {
            return Ok(*library);
        }
        let incompatible = |reason| PluginError::Incompatible { path: found.path.clone(), reason };
        let (library, loaded) = scan::open(&found.library).map_err(incompatible)?;
        if loaded != digest {
            return Err(incompatible("its library changed just now: try again".to_owned()));
        }
        scan::check(&library, found).map_err(incompatible)?;
        if library.version() != env!("CARGO_PKG_VERSION") || !discover::is_ours(&found.path) {
            self.foreign.store(true, Ordering::Relaxed);
        }
        open.insert(loaded, library);
        Ok(library)
    }
}

/// The settings that a method's other name stands for, and on top of them the ones that were given.
fn with_alias(alias: Option<&Value>, given: &Value) -> Value {
    let Some(alias) = alias else { return given.clone() };
    let mut settings = alias.clone();
    if !given.is_null() {
        overlay(&mut settings, given);
    }
    settings
}

fn refused(name: &str, error: blocklora_sdk::Error) -> PluginError {
    PluginError::Settings { name: name.to_owned(), reason: error.message }
}

/// Whether a scan belongs to this manifest, which may have changed while the library did not.
fn is_of(scanned: &Scanned, manifest: &Manifest) -> bool {
    discover::parse(&scanned.manifest).is_ok_and(|inside| inside == *manifest)
}

/// Runs one of the host's hidden commands of the daemon's program; None if `arguments` (without the program) are none.
pub fn serve_hidden_command(arguments: &[std::ffi::OsString]) -> Option<u8> {
    match arguments {
        [command, manifest] if command == scan::COMMAND => Some(scan::serve(manifest.as_ref())),
        [command, manifest] if command == worker::child::COMMAND => Some(worker::child::serve(manifest.as_ref())),
        [command, one @ ..] if command == check::COMMAND => Some(blocklora_check::run_one(one)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::with_alias;

    #[test]
    fn what_is_given_counts_more_than_what_a_name_stands_for_key_by_key() {
        let alias = json!({"karras": true, "rates": {"unet": 1, "tokens": 2}});
        let given = json!({"rates": {"tokens": 3}, "order": 2});
        let both = json!({"karras": true, "rates": {"unet": 1, "tokens": 3}, "order": 2});
        assert_eq!(with_alias(Some(&alias), &given), both);
        assert_eq!(with_alias(Some(&alias), &Value::Null), alias);
        assert_eq!(with_alias(None, &given), given);
        // No table: for the schema to refuse.
        assert_eq!(with_alias(Some(&alias), &json!(5)), json!(5));
    }
}
