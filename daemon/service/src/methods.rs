//! Where samplers, merge strategies and trainers come from.

use blocklora_engine::merge::strategy::MergeStrategy;
use blocklora_engine::merge::{Blocklora, Normalise, WeightedAverage};
use blocklora_engine::sample::{self, Sampler};
use blocklora_engine::train::{BlockLora, Concept, EdLora, TrainConfig, Trainer};
use blocklora_spec::Partition;
use serde_json::{Map, Value};

use crate::error::{Error, Kind, Result};

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
    /// Its id.
    pub id: String,
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

/// A training ready to run: the trainer and the settings that the file will state.
pub struct Training {
    /// The trainer.
    pub trainer: Box<dyn Trainer>,
    /// Its whole configuration.
    pub config: TrainConfig,
}

/// Gives methods by id. Implementations check configurations completely; errors name the key at fault.
pub trait Methods: Send + Sync {
    /// All methods, usable or not.
    fn list(&self) -> Vec<MethodInfo>;
    /// The sampler `id`.
    fn sampler(&self, id: &str, config: &Map<String, Value>) -> Result<Box<dyn Sampler>>;
    /// The merge strategy `id`.
    fn strategy(&self, id: &str, config: &Map<String, Value>) -> Result<Box<dyn MergeStrategy>>;
    /// The trainer `id` for `concept`. `partition`: the rows that the adapter shall own; none: all.
    fn trainer(
        &self,
        id: &str,
        config: &Map<String, Value>,
        concept: &Concept,
        partition: Option<Partition>,
    ) -> Result<Training>;
    /// Whether the trainer `id` confines an adapter to a partition's slot unless told otherwise.
    fn trains_in_slots(&self, id: &str) -> Result<bool>;
    /// Enables, disables or clears (ends the quarantine of) a method.
    fn set_state(&self, id: &str, state: &str) -> Result<()>;
    /// Runs the conformance tests of `id` and returns a JSON report.
    fn validate(&self, id: &str, level: u32, is_cancelled: &dyn Fn() -> bool) -> Result<String>;
    /// Whether foreign code has run in this process.
    fn tainted(&self) -> bool;
}

/// The methods that are compiled in.
pub struct BuiltIn;

const STRATEGIES: [&str; 3] = ["blocklora", "blocklora-sum1", "average"];
const TRAINERS: [&str; 2] = ["blocklora", "ed-lora"];

fn unknown(id: &str, what: &str, known: &[&str]) -> Error {
    Error::new(Kind::PluginNotFound, format!("there is no {what} {id:?}; there are {}", known.join(", ")))
}

fn settings<T: serde::de::DeserializeOwned>(id: &str, config: &Map<String, Value>) -> Result<T> {
    serde_json::from_value(Value::Object(config.clone())).map_err(|e| Error::option(format!("settings of {id}: {e}")))
}

impl Methods for BuiltIn {
    fn list(&self) -> Vec<MethodInfo> {
        let info = |id: &&str, kind| MethodInfo {
            id: (*id).to_owned(),
            kinds: vec![kind],
            version: env!("CARGO_PKG_VERSION").to_owned(),
            digest: String::new(),
            abi: (0, 0),
            config_schema: "{}".to_owned(),
            state: "enabled".to_owned(),
            reason: Default::default(),
            crashes: 0,
        };
        let mut list: Vec<MethodInfo> = Vec::new();
        let all = sample::SAMPLERS.iter().map(|id| info(id, MethodKind::Sampler));
        let all = all.chain(STRATEGIES.iter().map(|id| info(id, MethodKind::MergeStrategy)));
        for method in all.chain(TRAINERS.iter().map(|id| info(id, MethodKind::Trainer))) {
            match list.iter_mut().find(|known| known.id == method.id) {
                Some(known) => known.kinds.extend(method.kinds),
                None => list.push(method),
            }
        }
        list
    }

    fn sampler(&self, id: &str, config: &Map<String, Value>) -> Result<Box<dyn Sampler>> {
        if let Some(key) = config.keys().next() {
            return Err(Error::option(format!("settings of {id}: unknown field {key:?}; it has none")));
        }
        sample::by_id(id).map_err(|_| unknown(id, "sampler", &sample::SAMPLERS))
    }

    fn strategy(&self, id: &str, config: &Map<String, Value>) -> Result<Box<dyn MergeStrategy>> {
        match id {
            "blocklora" => Ok(Box::new(settings::<Blocklora>(id, config)?)),
            "blocklora-sum1" => {
                Ok(Box::new(Blocklora { normalise: Normalise::Sum1, ..settings::<Blocklora>(id, config)? }))
            }
            "average" => Ok(Box::new(settings::<WeightedAverage>(id, config)?)),
            _ => Err(unknown(id, "merge strategy", &STRATEGIES)),
        }
    }

    fn trainer(
        &self,
        id: &str,
        config: &Map<String, Value>,
        concept: &Concept,
        partition: Option<Partition>,
    ) -> Result<Training> {
        if config.contains_key("partition") {
            return Err(Error::option(format!("settings of {id}: \"partition\" is given by the options of Train")));
        }
        let mut config: TrainConfig = settings(id, config)?;
        config.partition = partition;
        let concept = concept.clone();
        match id {
            "blocklora" => {
                // Written out, so that the file states what the method does by default.
                config.erasure.get_or_insert_default();
                config.validate()?;
                Ok(Training { trainer: Box::new(BlockLora { concept, config: config.clone() }), config })
            }
            "ed-lora" => {
                config.validate()?;
                Ok(Training { trainer: Box::new(EdLora { concept, config: config.clone() }), config })
            }
            _ => Err(unknown(id, "trainer", &TRAINERS)),
        }
    }

    fn trains_in_slots(&self, id: &str) -> Result<bool> {
        match id {
            "blocklora" => Ok(true),
            "ed-lora" => Ok(false),
            _ => Err(unknown(id, "trainer", &TRAINERS)),
        }
    }

    fn set_state(&self, id: &str, _state: &str) -> Result<()> {
        Err(Error::new(Kind::NotSupported, format!("{id} is built in: its state cannot be changed")))
    }

    fn validate(&self, id: &str, _level: u32, _is_cancelled: &dyn Fn() -> bool) -> Result<String> {
        Err(Error::new(Kind::NotSupported, format!("{id} is built in: there is no file to validate")))
    }

    fn tainted(&self) -> bool {
        false
    }
}
