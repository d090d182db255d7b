//! What the daemon answers.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::requests::Partition;

/// An adapter that pictures were drawn with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdapterUse {
    /// The concept's name.
    pub name: String,
    /// SHA-256 of its file, in hex.
    pub digest: String,
    /// The weight it was merged with.
    pub weight: f64,
}

/// What drawing gave, beside the pictures.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Generated {
    /// Pictures.
    pub images: u32,
    /// The seed of each.
    pub seeds: Vec<u64>,
    /// What switching to the set took, microseconds.
    pub merge_usec: u64,
    /// What the job took without waiting, microseconds.
    pub usec: u64,
    /// Digest of the model.
    pub model_digest: String,
    /// What was merged.
    #[serde(default)]
    pub adapters: Vec<AdapterUse>,
}

/// What training gave, beside the adapter file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Trained {
    /// The adapter's object.
    pub adapter: String,
    /// Digest of its file.
    pub digest: String,
    /// The concept's name.
    pub name: String,
    /// Trained numbers.
    pub parameters: u64,
    /// What it took without waiting, microseconds.
    pub usec: u64,
    /// Training steps.
    pub steps: u32,
    /// Its slot, with a partition.
    pub slot: Option<u32>,
    /// The step that it continued from; 0: from the start.
    #[serde(default)]
    pub resumed_at: u32,
}

/// What merging gave.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Merged {
    /// The composition's object.
    pub composition: String,
    /// Rows of weights that were written.
    pub rows_rewritten: u64,
    /// Bytes of weights that were written.
    pub bytes_written: u64,
    /// Linears in which something changed.
    pub layers_touched: u32,
    /// What it took, microseconds.
    pub usec: u64,
}

/// What baking gave.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Baked {
    /// Bytes of the archive.
    pub bytes: u64,
    /// Files in it.
    pub files: u32,
    /// Rows of weights that were changed.
    pub rows_rewritten: u64,
    /// What it took, microseconds.
    pub usec: u64,
}

/// What loading gave.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Loaded {
    /// The model's object.
    pub model: String,
    /// The memory it takes.
    pub resident_bytes: u64,
    /// What it took, microseconds.
    pub usec: u64,
}

/// The manager's properties.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all(deserialize = "PascalCase"))]
pub struct Status {
    /// The daemon's version.
    pub version: String,
    /// Versions of the adapter format that it reads.
    pub spec_versions: Vec<String>,
    /// What it can do beyond the first version of the interface.
    pub features: Vec<String>,
    /// Its devices.
    pub devices: Vec<Device>,
    /// The model of requests that name none; "" if there is none.
    pub default_model: String,
    /// Ids of the usable samplers.
    pub samplers: Vec<String>,
    /// Ids of the usable merge strategies.
    pub strategies: Vec<String>,
    /// Ids of the usable trainers.
    pub trainers: Vec<String>,
    /// Jobs waiting.
    pub queue_length: u32,
    /// Jobs that may wait.
    pub queue_limit: u32,
    /// An unused model is unloaded after this time, microseconds; 0: never.
    #[serde(rename(deserialize = "IdleUnloadUSec"))]
    pub idle_unload_usec: u64,
    /// Whether a plugin that is not part of BlockLoRA has run in its process.
    pub tainted: bool,
    /// When it started, microseconds since 1970.
    #[serde(rename(deserialize = "StartedUSec"))]
    pub started_usec: u64,
    /// The configuration files in force.
    pub config_files: Vec<String>,
}

/// A device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Device {
    /// "cpu", "cuda:0".
    pub id: String,
    /// "cpu", "cuda".
    pub kind: String,
    /// What it is called.
    pub name: String,
    /// Its memory.
    pub memory_bytes: u64,
    /// Of it free; 0: unknown.
    pub free_bytes: u64,
    /// "ready", "suspended", "lost" or "unavailable".
    pub state: String,
    /// Why it was chosen, or why it is not ready.
    pub reason: String,
}

/// An adapter of the library.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LibraryEntry {
    /// Digest of its file.
    pub digest: String,
    /// The concept's name.
    pub name: String,
    /// "subject", "person", "scene" or "style".
    pub kind: String,
    /// The word for what it is.
    pub class_word: String,
    /// Of the model that it was trained on.
    pub architecture: String,
    /// Digest of that model.
    pub base_digest: String,
    /// The trainer.
    pub algorithm: String,
    /// Its version.
    pub algorithm_version: String,
    /// Of the factors.
    pub rank: u32,
    /// Words that it adds.
    pub tokens: u32,
    /// Bytes of its file.
    pub size: u64,
    /// When it was added, microseconds since 1970.
    pub added_usec: u64,
    /// "" if it states none.
    pub licence: String,
    /// "ok", "missing" or "corrupt".
    pub state: String,
    /// Why it is not ok.
    pub problem: String,
    /// Which blocks of rows there are; none: it owns all rows.
    pub partition: Option<Partition>,
    /// Which of them it owns.
    pub slot: Option<u32>,
}

/// A job, as lists show it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobEntry {
    /// Its id.
    pub id: String,
    /// Its object; "/" if it is only in the history.
    pub path: String,
    /// What kind of work it is.
    pub kind: String,
    /// "queued", "running", "done", "failed" or "cancelled".
    pub state: String,
    /// What it is doing.
    pub stage: String,
    /// 0..1, without meaning unless the next is true.
    pub progress: f64,
    /// Whether the progress means anything.
    pub progress_valid: bool,
    /// Who asked for it.
    pub uid: u32,
    /// "interactive", "normal" or "background".
    pub priority: String,
    /// Microseconds since 1970.
    pub created_usec: u64,
    /// Likewise; 0: not yet.
    pub started_usec: u64,
    /// Likewise.
    pub finished_usec: u64,
    /// 1 is next; 0: not queued.
    pub queue_position: u32,
    /// The name of the error it failed with, or "".
    pub error: String,
    /// What the error says.
    pub message: String,
    /// What it is about.
    pub description: String,
}

/// An owned or leased slot of a partition.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Slot {
    /// Digest of the model.
    pub base_digest: String,
    /// "contiguous", "strided" or "permuted".
    pub scheme: String,
    /// Slots of the partition.
    pub capacity: u32,
    /// Of "permuted".
    pub partition_seed: u64,
    /// Which slot.
    pub slot: u32,
    /// "adapter" or "lease".
    pub holder: String,
    /// The adapter's name, or what the lease is for.
    pub name: String,
    /// Of the adapter, or "".
    pub digest: String,
    /// The lease, or "".
    pub lease: String,
    /// Whose lease it is.
    pub uid: u32,
    /// When the lease ends, microseconds since 1970; 0: never.
    pub expires_usec: u64,
}

/// A file that a job or an export gave: what is known of it, and its bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct ResultFile {
    /// Such as "image/png".
    pub media_type: String,
    /// Which picture, from 0.
    pub index: u32,
    /// A relative path, for exports of several files; else "".
    pub name: String,
    /// Everything that the daemon says of it: width, height, stride, seed, parameters ...
    pub details: Map<String, Value>,
    /// Its content.
    pub bytes: Vec<u8>,
}

impl ResultFile {
    /// Whether a plugin handed it over beside the job's own files.
    pub fn is_artefact(&self) -> bool {
        self.text("format") == "artefact"
    }

    /// A text of [`Self::details`]; "" if there is none.
    pub fn text(&self, key: &str) -> &str {
        self.details.get(key).and_then(Value::as_str).unwrap_or_default()
    }

    /// A number of [`Self::details`].
    pub fn number(&self, key: &str) -> Option<u64> {
        self.details.get(key).and_then(Value::as_u64)
    }
}
