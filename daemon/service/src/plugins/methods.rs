//! The plugin host as the daemon's source of methods.

use std::collections::HashMap;
use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant};

use blocklora_check::Level;
use blocklora_engine::merge::strategy::MergeStrategy;
use blocklora_engine::sample::Sampler;
use blocklora_engine::train::Trainer;
use blocklora_sdk::manifest::PluginKind;
use blocklora_spec::Partition;
use serde_json::{Map, Value, json};

use super::check::{Request, check};
use super::records::Scanned;
use super::{BY_HAND, Entry, Found, PluginError, Plugins, State};
use crate::error::{Error, Kind, Result};
use crate::methods::{MethodInfo, MethodKind, Methods};

/// The setting that says which rows a trainer's adapter owns.
const PARTITION: &str = "partition";

/// How long the list believes a scan that refused a plugin. Who asks for the plugin itself has it scanned at once.
const REFUSED_LIFETIME: Duration = Duration::from_secs(60);

/// The daemon's list of methods, which properties ask for at every turn.
#[derive(Default)]
pub(super) struct Listed {
    list: Vec<MethodInfo>,
    /// Plugins that were refused, by the digests of library and manifest, and when.
    refused: HashMap<(String, String), (Instant, PluginError)>,
}

impl Plugins {
    fn lock_listed(&self) -> MutexGuard<'_, Listed> {
        self.listed.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// What the plugin's scan said. One that was refused just now is not tried again: every scan is a process.
    fn scanned_once(&self, found: &Found) -> super::Result<Scanned> {
        let (digest, known) = self.known(found)?;
        if let Some(scanned) = known {
            return Ok(scanned);
        }
        let key = (digest, self.records.digest(&found.path).unwrap_or_default());
        if let Some((_, error)) = self.lock_listed().refused.get(&key) {
            return Err(error.clone());
        }
        let scanned = self.scanned(found).map(|(_, scanned)| scanned);
        // A quarantine is remembered elsewhere, and may be lifted.
        if let Err(error) = &scanned
            && !matches!(error, PluginError::Quarantined { .. })
        {
            self.lock_listed().refused.insert(key, (Instant::now(), error.clone()));
        }
        scanned
    }

    fn method_info(&self, entry: &Entry) -> MethodInfo {
        let manifest = &entry.found.manifest;
        let info = self.scanned_once(&entry.found);
        let (state, reason) = match (&entry.state, &info) {
            (State::Quarantined(reason), _) if reason == BY_HAND => ("disabled", (String::new(), reason.clone())),
            (_, Ok(_)) => ("enabled", Default::default()),
            (_, Err(error)) => {
                let error = Error::from(error.clone());
                let state = if error.kind == Kind::PluginQuarantined { "quarantined" } else { "incompatible" };
                (state, (error.name(), error.message))
            }
        };
        MethodInfo {
            id: manifest.full_name(),
            name: manifest.id.clone(),
            kinds: vec![match manifest.kind {
                PluginKind::Merge => MethodKind::MergeStrategy,
                PluginKind::Train => MethodKind::Trainer,
                PluginKind::Sample => MethodKind::Sampler,
            }],
            version: manifest.version.clone(),
            digest: entry.digest.clone(),
            abi: manifest.abi().unwrap_or_default(),
            config_schema: info.map_or_else(|_| "{}".to_owned(), |scanned| scanned.schema.to_string()),
            state: state.to_owned(),
            reason,
            crashes: self.records.get(&entry.digest).crashes,
        }
    }
}

fn value(config: &Map<String, Value>) -> Value {
    Value::Object(config.clone())
}

impl Methods for Plugins {
    fn list(&self) -> Vec<MethodInfo> {
        self.lock_listed().list.clone()
    }

    fn refresh(&self) {
        self.lock_listed().refused.retain(|_, (at, _)| at.elapsed() < REFUSED_LIFETIME);
        let list = Plugins::list(self).0.iter().map(|entry| self.method_info(entry)).collect();
        self.lock_listed().list = list;
    }

    fn sampler(&self, id: &str, config: &Map<String, Value>) -> Result<Arc<dyn Sampler>> {
        Ok(Plugins::sampler(self, id, &value(config))?)
    }

    fn strategy(&self, id: &str, config: &Map<String, Value>) -> Result<Arc<dyn MergeStrategy>> {
        Ok(Plugins::strategy(self, id, &value(config))?)
    }

    fn trainer(&self, id: &str, config: &Map<String, Value>, partition: Option<Partition>) -> Result<Box<dyn Trainer>> {
        let mut config = value(config);
        if config.get(PARTITION).is_some() {
            return Err(Error::option(format!("settings of {id}: \"partition\" is given by the options of Train")));
        }
        if self.has_setting(PluginKind::Train, id, PARTITION)? {
            config[PARTITION] = json!(partition);
        } else if partition.is_some() {
            return Err(Error::option(format!("the trainer {id} owns all rows: it takes no partition")));
        }
        Ok(Plugins::trainer(self, id, &config)?)
    }

    fn trains_in_slots(&self, id: &str) -> Result<bool> {
        Ok(self.has_setting(PluginKind::Train, id, PARTITION)?)
    }

    fn set_state(&self, id: &str, state: &str) -> Result<()> {
        let (kind, own_id) = self.split(id)?;
        let reason = (state == "disabled").then_some(BY_HAND);
        self.set_quarantine(kind, &own_id, reason)?;
        self.lock_listed().refused.clear();
        // This one's change is seen at once.
        let info = self.method_info(&self.entry(self.find(kind, &own_id)?));
        if let Some(listed) = self.lock_listed().list.iter_mut().find(|listed| listed.id == id) {
            *listed = info;
        }
        Ok(())
    }

    fn validate(&self, id: &str, level: u32, is_cancelled: &dyn Fn() -> bool) -> Result<String> {
        let (kind, id) = self.split(id)?;
        let library = self.info(kind, &id)?.entry.found.library;
        let level = Level::from_number(level).ok_or_else(|| Error::option("level: must be 0 to 3"))?;
        let request = Request { level, only: Vec::new(), seed: 1, is_cancelled };
        Ok(json!(check(&library, request)?).to_string())
    }

    fn tainted(&self) -> bool {
        self.has_foreign_code()
    }
}
