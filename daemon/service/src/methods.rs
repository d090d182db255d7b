//! Where samplers, merge strategies and trainers come from.

use std::sync::Arc;

use blocklora_engine::merge::strategy::MergeStrategy;
use blocklora_engine::sample::Sampler;
use blocklora_engine::train::Trainer;
use blocklora_spec::Partition;
use serde_json::{Map, Value};

use crate::error::Result;

/// What a method does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum MethodKind {
    /// Turns noise into latents.
    Sampler,
    /// Plans coefficients.
    MergeStrategy,
    /// Turns pictures into an adapter.
    Trainer,
}

impl MethodKind {
    /// Its name in the interface.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sampler => "sampler",
            Self::MergeStrategy => "merge-strategy",
            Self::Trainer => "trainer",
        }
    }
}

/// One method, as the Plugin object shows it.
#[derive(Clone, Debug, PartialEq)]
pub struct MethodInfo {
    /// Its id among all methods.
    pub id: String,
    /// Its id among those of its kind: what requests name.
    pub name: String,
    /// What it does.
    pub kinds: Vec<MethodKind>,
    /// Its version.
    pub version: String,
    /// Digest of its file; empty if it is built in.
    pub digest: String,
    /// ABI major and minor; (0, 0) if it is built in.
    pub abi: (u32, u32),
    /// JSON Schema of its settings.
    pub config_schema: String,
    /// "enabled", "disabled", "quarantined" or "incompatible".
    pub state: String,
    /// Why: error name and message.
    pub reason: (String, String),
    /// How often it crashed.
    pub crashes: u32,
}

/// Gives methods by id. Implementations check configurations completely; errors name the key at fault.
pub trait Methods: Send + Sync {
    /// All methods, usable or not, as the last [`Self::refresh`] found them: this never waits.
    fn list(&self) -> Vec<MethodInfo>;
    /// Looks for methods again. What is new is tried, which may take long.
    fn refresh(&self);
    /// The sampler `id`.
    fn sampler(&self, id: &str, config: &Map<String, Value>) -> Result<Arc<dyn Sampler>>;
    /// The merge strategy `id`.
    fn strategy(&self, id: &str, config: &Map<String, Value>) -> Result<Arc<dyn MergeStrategy>>;
    /// The trainer `id`. `partition`: the rows that the adapter shall own; none: all.
    fn trainer(&self, id: &str, config: &Map<String, Value>, partition: Option<Partition>) -> Result<Box<dyn Trainer>>;
    /// Whether the trainer `id` confines an adapter to a partition's slot unless told otherwise.
    fn trains_in_slots(&self, id: &str) -> Result<bool>;
    /// Enables, disables or clears (ends the quarantine of) a method, by its id among all.
    fn set_state(&self, id: &str, state: &str) -> Result<()>;
    /// Runs the conformance tests of the method with the id `id` among all, and returns a JSON report.
    fn validate(&self, id: &str, level: u32, is_cancelled: &dyn Fn() -> bool) -> Result<String>;
    /// Whether foreign code has run in this process.
    fn tainted(&self) -> bool;
}
