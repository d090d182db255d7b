//! What can be asked for. Every field that is left at its default is left to the daemon.

use serde_json::{Map, Value};
use zbus::{OwnedObjectPath, Variant};

use crate::client::no_object;
use crate::error::Result;
use crate::proxies::{Dict, Entries};
use crate::value::{Options, dict_of_json, nested};

/// What every job has.
#[derive(Clone, Debug, Default)]
pub struct JobOptions {
    /// "interactive", "normal" or "background".
    pub priority: Option<String>,
    /// "connection": cancelled when the connection ends; "daemon": survives.
    pub lifetime: Option<String>,
    /// Chosen by the caller for the job's path.
    pub token: Option<String>,
    /// The job fails after this time, microseconds.
    pub timeout_usec: Option<u64>,
}

impl JobOptions {
    pub(crate) fn set(&self, options: Options) -> Options {
        options
            .maybe("priority", self.priority.clone())
            .maybe("lifetime", self.lifetime.clone())
            .maybe("token", self.token.clone())
            .maybe("timeout_usec", self.timeout_usec)
    }
}

/// One adapter of a set.
#[derive(Clone, Debug)]
pub struct Entry {
    adapter: OwnedObjectPath,
    digest: Option<String>,
    weight: f64,
}

impl Entry {
    /// An adapter that was registered or opened, as trained.
    pub fn new(adapter: &crate::Adapter) -> Self {
        Self { adapter: adapter.path().to_owned().into(), digest: None, weight: 1.0 }
    }

    /// An adapter of the library: its digest, the first 8 or more digits of it, or its name.
    pub fn of_library(digest_or_name: impl Into<String>) -> Self {
        Self { adapter: no_object(), digest: Some(digest_or_name.into()), weight: 1.0 }
    }

    /// With another weight; 1 is "as trained".
    pub fn weight(self, weight: f64) -> Self {
        Self { weight, ..self }
    }

    fn options(&self) -> Dict {
        Options::new().with("weight", self.weight).maybe("digest", self.digest.clone()).into_dict()
    }
}

/// A set as an argument.
pub(crate) fn entries(set: &[Entry]) -> Entries {
    set.iter().map(|entry| (entry.adapter.clone(), entry.options())).collect()
}

fn entries_variant(set: &[Entry]) -> Variant<'static> {
    let one = |entry: &Entry| (entry.adapter.clone().into_inner(), entry_dict(entry));
    Variant::from(set.iter().map(one).collect::<Vec<_>>())
}

fn entry_dict(entry: &Entry) -> std::collections::HashMap<String, Variant<'static>> {
    entry.options().into_iter().map(|(key, value)| (key, Variant::from(value))).collect()
}

/// Settings as an option's value; none: no settings.
fn object(config: &Map<String, Value>) -> Result<Option<Variant<'static>>> {
    (!config.is_empty()).then(|| dict_of_json(config).map(nested)).transpose()
}

/// Pictures to draw.
#[derive(Clone, Debug, Default)]
pub struct Generate {
    /// What to draw; `<name>` stands for a concept.
    pub prompt: String,
    /// A composition or model; none: the default model.
    pub target: Option<OwnedObjectPath>,
    /// What to steer away from.
    pub negative_prompt: Option<String>,
    /// Sampling steps.
    pub steps: Option<u32>,
    /// How closely to follow the prompt; 1 is no guidance.
    pub guidance_scale: Option<f64>,
    /// Id of the sampler.
    pub sampler: Option<String>,
    /// Its settings.
    pub sampler_config: Map<String, Value>,
    /// Seed of the first picture; picture i has the seed `seed` + i.
    pub seed: Option<u64>,
    /// Pixels.
    pub width: Option<u32>,
    /// Pixels.
    pub height: Option<u32>,
    /// Pictures.
    pub count: Option<u32>,
    /// Storage type of the model's weights: "f32", "f16" or "bf16".
    pub precision: Option<String>,
    /// What to merge for this job; not with a composition as target.
    pub adapters: Vec<Entry>,
    /// How to merge it.
    pub strategy: Option<String>,
    /// Settings of the strategy.
    pub strategy_config: Map<String, Value>,
    /// What results are wanted: "raw", "png"; empty: both.
    pub formats: Vec<String>,
    /// What every job has.
    pub job: JobOptions,
}

impl Generate {
    /// `prompt` with the daemon's defaults.
    pub fn new(prompt: impl Into<String>) -> Self {
        Self { prompt: prompt.into(), ..Self::default() }
    }

    pub(crate) fn arguments(&self) -> Result<(OwnedObjectPath, Dict, Dict)> {
        let params = Options::new()
            .with("prompt", self.prompt.clone())
            .maybe("negative_prompt", self.negative_prompt.clone())
            .maybe("steps", self.steps)
            .maybe("guidance_scale", self.guidance_scale)
            .maybe("sampler", self.sampler.clone())
            .maybe("sampler_config", object(&self.sampler_config)?)
            .maybe("seed", self.seed)
            .maybe("width", self.width)
            .maybe("height", self.height)
            .maybe("count", self.count)
            .maybe("precision", self.precision.clone())
            .maybe("adapters", (!self.adapters.is_empty()).then(|| entries_variant(&self.adapters)))
            .maybe("strategy", self.strategy.clone())
            .maybe("strategy_config", object(&self.strategy_config)?);
        let formats = (!self.formats.is_empty()).then(|| self.formats.clone());
        let options = self.job.set(Options::new()).maybe("formats", formats);
        Ok((self.target.clone().unwrap_or_else(no_object), params.into_dict(), options.into_dict()))
    }
}

/// A partition of a layer's rows into slots.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Partition {
    /// "contiguous", "strided" or "permuted".
    pub scheme: String,
    /// Slots.
    pub capacity: u32,
    /// Of "permuted"; 0 otherwise.
    #[serde(default)]
    pub seed: u64,
}

impl Default for Partition {
    fn default() -> Self {
        Self { scheme: "contiguous".into(), capacity: 16, seed: 0 }
    }
}

impl Partition {
    pub(crate) fn dict(&self) -> Dict {
        let options = Options::new().with("scheme", self.scheme.clone()).with("capacity", self.capacity);
        options.with("seed", self.seed).into_dict()
    }
}

/// A training, beside the trainer's own settings.
#[derive(Clone, Debug, Default)]
pub struct Train {
    /// What to call the concept: a prompt names it as `<name>`.
    pub name: String,
    /// The word for what it is, known to the model.
    pub class_word: String,
    /// "subject", "person", "scene" or "style".
    pub kind: Option<String>,
    /// One for each picture, "" for none; `{c}` stands for the concept.
    pub captions: Vec<String>,
    /// Id of the model; none: the default model.
    pub model: Option<String>,
    /// Storage type of the model's weights: "f32", "f16" or "bf16".
    pub precision: Option<String>,
    /// Decides every random number.
    pub seed: Option<u64>,
    /// Which blocks of rows there are.
    pub partition: Option<Partition>,
    /// Which of them to own; none: the lowest free one.
    pub slot: Option<u32>,
    /// Own every row.
    pub all_rows: Option<bool>,
    /// A lease to train on, instead of partition and slot.
    pub lease: Option<String>,
    /// "f32" or "f16".
    pub storage: Option<String>,
    /// An SPDX expression to state in the file.
    pub licence: Option<String>,
    /// When it was made, to state in the file.
    pub created: Option<String>,
    /// Fail where no checkpoint of this training is kept; else it begins anew there.
    pub resume: Option<bool>,
    /// What every job has.
    pub job: JobOptions,
}

impl Train {
    /// A training of the concept `name`, which is a `class_word`.
    pub fn new(name: impl Into<String>, class_word: impl Into<String>) -> Self {
        Self { name: name.into(), class_word: class_word.into(), ..Self::default() }
    }

    pub(crate) fn options(&self) -> Dict {
        let options = self.job.set(Options::new());
        options
            .with("name", self.name.clone())
            .with("class_word", self.class_word.clone())
            .maybe("kind", self.kind.clone())
            .maybe("captions", (!self.captions.is_empty()).then(|| self.captions.clone()))
            .maybe("model", self.model.clone())
            .maybe("precision", self.precision.clone())
            .maybe("seed", self.seed)
            .maybe("partition", self.partition.as_ref().map(|p| nested(p.dict())))
            .maybe("slot", self.slot)
            .maybe("all_rows", self.all_rows)
            .maybe("lease", self.lease.clone())
            .maybe("storage", self.storage.clone())
            .maybe("licence", self.licence.clone())
            .maybe("created", self.created.clone())
            .maybe("resume", self.resume)
            .into_dict()
    }
}

/// A set to merge and keep.
#[derive(Clone, Debug, Default)]
pub struct Merge {
    /// How they add up; empty: as the daemon is configured.
    pub strategy: String,
    /// Settings of the strategy.
    pub strategy_config: Map<String, Value>,
    /// The set.
    pub adapters: Vec<Entry>,
    /// Id of the model; none: the default model.
    pub model: Option<String>,
    /// Storage type of the model's weights, for this merging: "f32", "f16" or "bf16".
    pub precision: Option<String>,
    /// "connection" or "daemon".
    pub composition_lifetime: Option<String>,
    /// What every job has.
    pub job: JobOptions,
}

impl Merge {
    pub(crate) fn arguments(&self) -> Result<(String, Entries, Dict)> {
        let options = self.job.set(Options::new());
        let options = options
            .maybe("model", self.model.clone())
            .maybe("precision", self.precision.clone())
            .maybe("strategy_config", object(&self.strategy_config)?)
            .maybe("composition_lifetime", self.composition_lifetime.clone());
        Ok((self.strategy.clone(), entries(&self.adapters), options.into_dict()))
    }
}

/// How to load a model.
#[derive(Clone, Debug, Default)]
pub struct Load {
    /// "f32", "f16" or "bf16".
    pub precision: Option<String>,
    /// Id of a device.
    pub device: Option<String>,
    /// How long it stays loaded after its last use, microseconds.
    pub keep_alive_usec: Option<u64>,
    /// What every job has.
    pub job: JobOptions,
}

impl Load {
    pub(crate) fn options(&self) -> Dict {
        let options = self.job.set(Options::new());
        options
            .maybe("precision", self.precision.clone())
            .maybe("device", self.device.clone())
            .maybe("keep_alive_usec", self.keep_alive_usec)
            .into_dict()
    }
}
