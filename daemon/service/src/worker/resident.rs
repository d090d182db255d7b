//! Models in memory, and what is merged into each.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use blocklora_engine::bake::baked_concepts;
use blocklora_engine::merge::strategy::{LayerInfo, MergeStrategy, Sum};
use blocklora_engine::merge::{MergeReport, Merger, Target};
use blocklora_engine::model::{Component, Model};
use blocklora_engine::nn::LayerId;
use blocklora_engine::text;
use blocklora_engine::weights::WeightFile;

use super::cache::Cache;
use crate::catalogue::models::ModelEntry;
use crate::config::Precision;
use crate::daemon::Daemon;
use crate::dbus::sets::{check_base, plan_error};
use crate::error::{Error, Kind, Result};
use crate::jobs::Job;
use crate::jobs::work::Set;
use crate::life::memory;
use crate::objects::ModelObject;

/// A model in memory.
struct Resident {
    model: Arc<Model>,
    merger: Merger,
    /// Words built into the model.
    built_in: Vec<text::Concept>,
    precision: Precision,
    bytes: u64,
    /// Jobs that are at work on it; more than one where one lets others go first.
    users: usize,
}

impl Resident {
    /// Whether its weights are held as they are needed; none: however they are.
    fn suits(&self, precision: Option<Precision>) -> bool {
        precision.is_none_or(|precision| precision == self.precision)
    }

    /// Whether it was loaded from the folder of this one.
    fn is_of(&self, object: &ModelObject) -> bool {
        self.model.dir() == object.path
    }
}

/// All models in memory.
pub struct Residents {
    daemon: Arc<Daemon>,
    models: BTreeMap<String, Resident>,
    cache: Cache,
}

impl Residents {
    /// None.
    pub fn new(daemon: Arc<Daemon>) -> Self {
        Self { daemon, models: BTreeMap::new(), cache: Cache::default() }
    }

    /// Whether a job can have the model now, without one having to go that is in use. A model is in memory once: who
    /// needs it in another precision waits for those who are at work on it.
    pub fn is_free(&self, id: &str, precision: Option<Precision>) -> bool {
        match self.models.get(id) {
            // What the id stands for may be another model by now.
            Some(resident) => {
                let is_it = |object: Arc<ModelObject>| resident.is_of(&object) && resident.suits(precision);
                resident.users == 0 || self.daemon.model(id).is_ok_and(is_it)
            }
            None => self.has_room(),
        }
    }

    fn has_room(&self) -> bool {
        self.models.len() < self.daemon.config().models.resident_max || self.models.values().any(|m| m.users == 0)
    }

    /// Loads the model for a job, if it is not in memory as the job needs it, and keeps it until [`Self::release`].
    pub fn hold(&mut self, job: &Job, id: &str, precision: Option<Precision>) -> Result<()> {
        let object = self.daemon.model(id)?;
        let is_it = |resident: &&mut Resident| resident.suits(precision) && resident.is_of(&object);
        if let Some(resident) = self.models.get_mut(id).filter(is_it) {
            resident.users += 1;
            return Ok(());
        }
        self.unload(id)?;
        job.set_stage("loading-model");
        self.make_room()?;
        object.state().state = "loading";
        self.daemon.touch(&object.object_path());
        let precision = precision.unwrap_or(self.daemon.config().models.precision);
        match self.load(id, &object.path, precision) {
            Ok(resident) => {
                self.note_loaded(&object, &resident);
                self.models.insert(id.to_owned(), resident);
                Ok(())
            }
            Err(error) => {
                let mut state = object.state();
                state.state = if object.path.is_dir() { "failed" } else { "missing" };
                state.problem = Some(error.clone());
                drop(state);
                self.daemon.touch(&object.object_path());
                Err(error)
            }
        }
    }

    /// A job no longer needs the model.
    pub fn release(&mut self, id: &str) {
        if let Some(resident) = self.models.get_mut(id) {
            resident.users = resident.users.saturating_sub(1);
            if let Ok(object) = self.daemon.model(id) {
                object.state().last_used = Some(Instant::now());
            }
        }
        let most = self.daemon.config().models.adapter_cache_bytes;
        self.cache.shrink(most);
        self.note_bytes();
    }

    fn load(&self, id: &str, path: &Path, precision: Precision) -> Result<Resident> {
        let fail = |e: blocklora_engine::Error| match Error::from(e) {
            e if [Kind::NotSupported, Kind::OutOfDeviceMemory].contains(&e.kind) => e,
            e => Error::new(Kind::ModelNotFound, format!("model {id:?}: {}", e.message)),
        };
        let device = &self.daemon.device.device;
        let bytes = Component::ALL.iter().map(|c| held_bytes(&path.join(c.folder()), precision)).sum();
        if device.is_cpu() {
            check_room(id, bytes, memory::system().1)?;
        }
        // What a card has free only its driver knows, and says so by refusing.
        let model = Model::load(path, device, precision.dtype()).map_err(fail)?;
        let target = |(i, info): (usize, &LayerInfo)| Target {
            info: info.clone(),
            live: model.live(LayerId(i)).clone(),
            pristine: model.pristine(LayerId(i)).clone(),
        };
        let merger = Merger::new(model.layers().iter().enumerate().map(target).collect()).map_err(fail)?;
        let built_in = baked_concepts(model.dir()).map_err(fail)?;
        Ok(Resident { model: Arc::new(model), merger, built_in, precision, bytes, users: 1 })
    }

    fn note_loaded(&self, object: &Arc<ModelObject>, resident: &Resident) {
        // It may have been forgotten meanwhile.
        if !self.daemon.model(&object.id).is_ok_and(|shown| Arc::ptr_eq(&shown, object)) {
            return;
        }
        let model = &resident.model;
        let (_, height, width) = model.latent_shape();
        let multiple = model.vae().downscale();
        let entry = ModelEntry {
            id: object.id.clone(),
            path: object.path.clone(),
            digest: model.digest().to_owned(),
            architecture: model.architecture(),
            width: (width * multiple) as u32,
            height: (height * multiple) as u32,
            size_multiple: multiple as u32,
        };
        {
            let mut state = object.state();
            state.digest.clone_from(&entry.digest);
            state.architecture.clone_from(&entry.architecture);
            state.size = (entry.width, entry.height);
            state.size_multiple = entry.size_multiple;
            (state.state, state.problem) = ("loaded", None);
            state.loaded = Some((self.daemon.device.name.clone(), resident.precision, resident.bytes));
            state.last_used = Some(Instant::now());
        }
        self.daemon.touch(&object.object_path());
        // So that the next daemon knows it before it loads it.
        if let Err(error) = self.daemon.catalogue.put_model(&entry) {
            tracing::warn!("{error}");
        }
    }

    fn note_bytes(&self) {
        let cached = self.cache.bytes();
        for (at, (id, resident)) in self.models.iter().enumerate() {
            let Ok(object) = self.daemon.model(id) else { continue };
            if let Some((_, _, bytes)) = &mut object.state().loaded {
                // The factors are shared; they are counted once.
                *bytes = resident.bytes + if at == 0 { cached } else { 0 };
            }
            self.daemon.touch(&object.object_path());
        }
    }

    /// The model, and the words that a prompt with `set` may use.
    pub fn model(&mut self, id: &str, set: &Set) -> Result<(Arc<Model>, Vec<text::Concept>)> {
        let resident = self.models.get(id).ok_or_else(|| Error::failed(format!("model {id:?} is not loaded")))?;
        let (model, mut concepts) = (resident.model.clone(), resident.built_in.clone());
        for entry in &set.entries {
            let loaded = self.cache.get(&self.daemon, &entry.digest)?;
            if concepts.iter().any(|concept| concept.name == loaded.concept.name) {
                let message = format!("the concept {:?} is built into model {id:?}: leave it out", entry.name);
                return Err(Error::option(message));
            }
            concepts.push(loaded.concept.clone());
        }
        Ok((model, concepts))
    }

    /// Whether it is in memory.
    pub fn has(&self, id: &str) -> bool {
        self.models.contains_key(id)
    }

    /// How the model's weights are held.
    pub fn precision(&self, id: &str) -> Option<Precision> {
        self.models.get(id).map(|resident| resident.precision)
    }

    /// Makes `set` what is merged into the model, whatever was merged before.
    pub fn apply(&mut self, id: &str, set: &Set) -> Result<MergeReport> {
        let resident = self.models.get_mut(id).ok_or_else(|| Error::failed(format!("model {id:?} is not loaded")))?;
        let strategy = match set.entries.is_empty() {
            // What takes everything out must not depend on a plugin.
            true => Arc::new(Sum) as Arc<dyn MergeStrategy>,
            false => self.daemon.methods.strategy(&set.strategy, &set.strategy_config)?,
        };
        let (architecture, digest) = (resident.model.architecture(), resident.model.digest());
        let mut adapters = Vec::with_capacity(set.entries.len());
        for entry in &set.entries {
            let loaded = self.cache.get(&self.daemon, &entry.digest)?;
            check_base(&loaded.entry, id, &architecture, digest)?;
            adapters.push((loaded.factors.clone(), entry.weight));
        }
        resident.merger.apply(&adapters, &strategy).map_err(|e| plan_error(&self.daemon, set, e))
    }

    /// Takes everything out of the model: its bits are the file's again.
    pub fn take_out(&mut self, id: &str) -> Result<()> {
        self.apply(id, &Set::default()).map(drop)
    }

    /// Frees a model's memory.
    pub fn unload(&mut self, id: &str) -> Result<()> {
        match self.models.get(id) {
            None => Ok(()),
            Some(resident) if resident.users > 0 => {
                Err(Error::new(Kind::DeviceBusy, format!("a job is at work on model {id:?}; wait for it or cancel it")))
            }
            Some(_) => {
                self.drop_model(id);
                Ok(())
            }
        }
    }

    fn drop_model(&mut self, id: &str) {
        self.models.remove(id);
        if let Ok(object) = self.daemon.model(id) {
            {
                let mut state = object.state();
                (state.state, state.loaded) = ("unloaded", None);
            }
            self.daemon.touch(&object.object_path());
        }
        tracing::info!("model {id:?}: unloaded");
    }

    /// Everything out of memory, in use or not.
    pub fn clear(&mut self) {
        for id in self.models.keys().cloned().collect::<Vec<_>>() {
            self.drop_model(&id);
        }
        self.cache.shrink(0);
    }

    /// The model that was used least recently, among those that no job uses.
    fn oldest(&self) -> Option<String> {
        let unused = self.models.iter().filter(|(_, resident)| resident.users == 0);
        let last = |id: &str| self.daemon.model(id).ok().and_then(|object| object.state().last_used);
        unused.min_by_key(|(id, _)| last(id)).map(|(id, _)| id.clone())
    }

    /// Makes room for one more model.
    fn make_room(&mut self) -> Result<()> {
        while self.models.len() >= self.daemon.config().models.resident_max {
            let message = "every model that may be in memory is in use (models.resident_max)";
            let id = self.oldest().ok_or_else(|| Error::new(Kind::DeviceBusy, message))?;
            self.drop_model(&id);
        }
        Ok(())
    }

    /// Frees factors first, then models that no job uses, until `bytes` are free; 0: all. How many were freed.
    pub fn reclaim(&mut self, bytes: u64) -> u64 {
        let wanted = if bytes == 0 { u64::MAX } else { bytes };
        let mut freed = self.cache.shrink(self.cache.bytes().saturating_sub(wanted));
        while freed < wanted {
            let Some(id) = self.oldest() else { break };
            freed += self.models.get(&id).map_or(0, |resident| resident.bytes);
            self.drop_model(&id);
        }
        self.note_bytes();
        freed
    }

    /// Unloads the models whose time is over.
    pub fn unload_idle(&mut self) {
        let idle = match self.daemon.idle_unload_usec() {
            0 => None,
            usec => Some(Duration::from_micros(usec)),
        };
        for id in self.models.keys().cloned().collect::<Vec<_>>() {
            let Ok(object) = self.daemon.model(&id) else { continue };
            let unused = object.state().last_used.map(|last| last.elapsed());
            let over = object.keep_alive(idle).zip(unused).is_some_and(|(keep, unused)| unused >= keep);
            if over && self.models.get(&id).is_some_and(|resident| resident.users == 0) {
                self.drop_model(&id);
                self.cache.shrink(0);
            }
        }
    }
}

/// Fails if a model with this many bytes of weights does not fit into the `free` bytes of main memory; 0 is unknown.
fn check_room(id: &str, weights: u64, free: u64) -> Result<()> {
    if free == 0 || weights <= free {
        return Ok(());
    }
    let message = format!(
        "model {id:?} needs about {} MiB of memory, {} MiB are free: end other programs, or load it as f16",
        weights >> 20,
        free >> 20
    );
    Err(Error::new(Kind::OutOfDeviceMemory, message))
}

/// Bytes that the weights in a folder take as they are held: their number times the size of one.
fn held_bytes(folder: &Path, precision: Precision) -> u64 {
    let Ok(entries) = std::fs::read_dir(folder) else { return 0 };
    let weights = entries.flatten().filter(|e| e.path().extension().is_some_and(|e| e == "safetensors"));
    let largest = weights.filter_map(|e| Some((e.metadata().ok()?.len(), e.path()))).max();
    // A file that cannot be read is an error when it is loaded.
    let Some(file) = largest.and_then(|(_, path)| WeightFile::open(path).ok()) else { return 0 };
    let views = file.names().filter_map(|name| file.view(name).ok());
    let numbers: usize = views.map(|view| view.shape().iter().product::<usize>()).sum();
    (numbers * precision.dtype().size_in_bytes()) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_counts_not_what_is_stored() {
        let unet = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/pipeline/unet");
        let (f32, f16) = (held_bytes(&unet, Precision::F32), held_bytes(&unet, Precision::F16));
        assert!(f32 > 0 && f32 == 2 * f16, "{f32} {f16}");
        assert_eq!(held_bytes(Path::new("nowhere"), Precision::F32), 0);
    }

    #[test]
    fn a_model_that_does_not_fit_is_refused_before_it_is_read() {
        assert!(check_room("m", 5 << 20, 5 << 20).is_ok() && check_room("m", u64::MAX, 0).is_ok());
        let error = check_room("m", 6 << 20, 5 << 20).map_err(|e| (e.kind, e.message));
        let (kind, message) = error.err().unwrap_or((Kind::Failed, String::new()));
        assert_eq!(kind, Kind::OutOfDeviceMemory);
        assert!(message.contains("needs about 6 MiB of memory, 5 MiB are free"), "{message}");
    }
}
