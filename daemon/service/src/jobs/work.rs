//! What a job does, as the worker needs it: checked, and with nothing of the bus in it.

use std::fs::File;
use std::path::PathBuf;

use blocklora_spec::{Partition, Storage};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::config::Precision;

/// One adapter of a set.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// The digest of its file.
    pub digest: String,
    /// Its name.
    pub name: String,
    /// 1 is "as trained".
    pub weight: f32,
}

/// A set of adapters and how they add up. The default is empty, and needs no strategy.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Set {
    /// The adapters.
    pub entries: Vec<Entry>,
    /// Id of the merge strategy.
    pub strategy: String,
    /// Its settings.
    pub strategy_config: Map<String, Value>,
}

/// Pictures to draw.
#[derive(Clone, Debug)]
pub struct Generate {
    /// Id of the model.
    pub model: String,
    /// How its weights are held.
    pub precision: Precision,
    /// What is merged into it.
    pub set: Set,
    /// What to draw.
    pub prompt: String,
    /// What to steer away from.
    pub negative_prompt: String,
    /// Sampling steps.
    pub steps: usize,
    /// 1 is no guidance.
    pub guidance_scale: f32,
    /// Id of the sampler.
    pub sampler: String,
    /// Its settings.
    pub sampler_config: Map<String, Value>,
    /// Of the first picture.
    pub seed: u64,
    /// Pixels; none: the model's own.
    pub width: Option<usize>,
    /// Likewise.
    pub height: Option<usize>,
    /// Pictures.
    pub count: usize,
    /// Give raw pixels.
    pub raw: bool,
    /// Give PNG files.
    pub png: bool,
}

/// A training. Its pictures lie in a folder of the state, so that a new daemon can go on with it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Train {
    /// Id of the model.
    pub model: String,
    /// How its weights are held; a training that an earlier daemon left does not say.
    #[serde(default)]
    pub precision: Precision,
    /// Id of the trainer.
    pub trainer: String,
    /// Its settings.
    pub config: Map<String, Value>,
    /// Which rows; none: all.
    pub partition: Option<Partition>,
    /// The lease on them, given back at the end.
    pub lease: Option<String>,
    /// The concept's name.
    pub name: String,
    /// The word for what it is.
    pub class_word: String,
    /// What kind of thing it is.
    pub kind: blocklora_spec::Kind,
    /// Pictures' files in the job's folder, and their captions.
    pub pictures: Vec<(String, Option<String>)>,
    /// Decides every random number.
    pub seed: u64,
    /// Type of the numbers in the file.
    #[serde(with = "storage")]
    pub storage: Storage,
    /// To be stated in the file.
    pub licence: Option<String>,
    /// Likewise.
    pub created: Option<String>,
    /// The job's folder.
    pub folder: PathBuf,
    /// It ends with its client's connection: the next daemon keeps its checkpoint, but does not go on with it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub ends_with_client: bool,
    /// It is to go on from a checkpoint, and fails where there is none.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub resume: bool,
    /// When it is over in any case, microseconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline_usec: Option<u64>,
}

/// What a training holds until it is over.
#[derive(Clone, Debug)]
pub struct Held {
    /// The lease on its rows.
    pub lease: Option<String>,
    /// Its folder.
    pub folder: PathBuf,
}

mod storage {
    //! `Storage` by name.
    use blocklora_spec::Storage;
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(storage: &Storage, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(match storage {
            Storage::F16 => "f16",
            _ => "f32",
        })
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Storage, D::Error> {
        match String::deserialize(deserializer)?.as_str() {
            "f32" => Ok(Storage::F32),
            "f16" => Ok(Storage::F16),
            other => Err(serde::de::Error::custom(format!("{other:?} is not f32 or f16"))),
        }
    }
}

/// What the worker does.
pub enum Work {
    /// Draws.
    Generate(Box<Generate>),
    /// Trains.
    Train(Box<Train>),
    /// Merges a set once.
    Merge {
        /// Id of the model.
        model: String,
        /// How its weights are held.
        precision: Precision,
        /// The set.
        set: Set,
        /// The composition's path, for the result.
        composition: String,
    },
    /// Writes a model with a set merged in.
    Bake {
        /// Id of the model.
        model: String,
        /// The set.
        set: Set,
        /// Where the archive goes.
        out: File,
    },
    /// Loads a model.
    LoadModel {
        /// Its id.
        model: String,
        /// How to hold its weights.
        precision: Precision,
    },
    /// Reads every file of the library.
    ValidateLibrary,
    /// Runs a plugin's conformance tests.
    ValidatePlugin {
        /// Its id.
        id: String,
        /// 0 to 3.
        level: u32,
    },
    /// Nothing.
    Empty,
}

impl Work {
    /// Its kind in the interface.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Generate(_) => "generate",
            Self::Train(_) => "train",
            Self::Merge { .. } => "merge",
            Self::Bake { .. } => "bake",
            Self::LoadModel { .. } => "load-model",
            Self::ValidateLibrary | Self::ValidatePlugin { .. } => "validate",
            Self::Empty => "empty",
        }
    }

    /// What it is about, for people.
    pub fn description(&self) -> String {
        match self {
            Self::Generate(work) => work.prompt.clone(),
            Self::Train(work) => work.name.clone(),
            Self::Merge { set, .. } | Self::Bake { set, .. } => {
                let names: Vec<&str> = set.entries.iter().map(|entry| entry.name.as_str()).collect();
                names.join(", ")
            }
            Self::LoadModel { model, .. } => model.clone(),
            Self::ValidateLibrary => "library".to_owned(),
            Self::ValidatePlugin { id, .. } => id.clone(),
            Self::Empty => String::new(),
        }
    }

    /// The adapters that it merges, if it merges any.
    pub fn set(&self) -> Option<&Set> {
        match self {
            Self::Generate(work) => Some(&work.set),
            Self::Merge { set, .. } | Self::Bake { set, .. } => Some(set),
            _ => None,
        }
    }

    /// What it holds until it is over.
    pub fn held(&self) -> Option<Held> {
        match self {
            Self::Train(work) => Some(Held { lease: work.lease.clone(), folder: work.folder.clone() }),
            _ => None,
        }
    }

    /// The path of the composition that was made for it alone.
    pub fn composition(&self) -> Option<String> {
        match self {
            Self::Merge { composition, .. } => Some(composition.clone()),
            _ => None,
        }
    }

    /// The model that it needs, if it needs one.
    pub fn model(&self) -> Option<&str> {
        match self {
            Self::Generate(work) => Some(&work.model),
            Self::Train(work) => Some(&work.model),
            Self::Merge { model, .. } | Self::Bake { model, .. } | Self::LoadModel { model, .. } => Some(model),
            Self::ValidateLibrary | Self::ValidatePlugin { .. } | Self::Empty => None,
        }
    }

    /// How the model's weights must be held for it; none: it does not matter.
    pub fn precision(&self) -> Option<Precision> {
        match self {
            Self::Generate(work) => Some(work.precision),
            Self::Train(work) => Some(work.precision),
            Self::Merge { precision, .. } | Self::LoadModel { precision, .. } => Some(*precision),
            // What is baked is merged in f32 whatever is in memory.
            Self::Bake { .. } | Self::ValidateLibrary | Self::ValidatePlugin { .. } | Self::Empty => None,
        }
    }
}
