//! The configuration: TOML files whose every key is known.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::plugins::Isolation;

/// The example file, which documents every key.
pub const EXAMPLE: &str = include_str!("../blocklora.toml");

/// Everything that can be configured; `blocklora.toml` explains each key.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The process.
    pub daemon: Daemon,
    /// Models and their memory.
    pub models: Models,
    /// The queue and what is kept.
    pub jobs: Jobs,
    /// What a client may ask for.
    pub limits: Limits,
    /// Merge strategies, trainers and samplers.
    pub plugins: Plugins,
}

/// Which bus to be on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Bus {
    /// The user's.
    #[default]
    Session,
    /// The machine's.
    System,
    /// None: only the socket.
    None,
}

/// Storage type of weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Precision {
    /// 32 bits.
    #[default]
    F32,
    /// 16 bits.
    F16,
    /// 16 bits with the range of 32.
    Bf16,
}

impl Precision {
    /// Its name in configuration and interface.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }
    /// The precision called `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::F32, Self::F16, Self::Bf16].into_iter().find(|p| p.name() == name)
    }
    /// As the engine calls it.
    pub fn dtype(self) -> blocklora_engine::DType {
        match self {
            Self::F32 => blocklora_engine::DType::F32,
            Self::F16 => blocklora_engine::DType::F16,
            Self::Bf16 => blocklora_engine::DType::BF16,
        }
    }
}

/// `[daemon]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[allow(missing_docs)] // blocklora.toml explains every key, and a test compares it with these.
pub struct Daemon {
    pub bus: Bus,
    pub socket: String,
    pub state_dir: String,
    pub stop_timeout_sec: u64,
    pub exit_when_idle_sec: u64,
}

impl Default for Daemon {
    fn default() -> Self {
        let (socket, state_dir) = (String::new(), String::new());
        Self { bus: Bus::Session, socket, state_dir, stop_timeout_sec: 20, exit_when_idle_sec: 0 }
    }
}

/// `[models]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[allow(missing_docs)] // As above.
pub struct Models {
    pub folders: BTreeMap<String, PathBuf>,
    pub default: String,
    pub load_at_start: bool,
    pub device: String,
    pub precision: Precision,
    pub idle_unload_sec: u64,
    pub resident_max: usize,
    pub adapter_cache_bytes: u64,
}

impl Default for Models {
    fn default() -> Self {
        Self {
            folders: BTreeMap::new(),
            default: String::new(),
            load_at_start: false,
            device: "auto".to_owned(),
            precision: Precision::F32,
            idle_unload_sec: 900,
            resident_max: 1,
            adapter_cache_bytes: 1 << 30,
        }
    }
}

/// `[jobs]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[allow(missing_docs)] // As above.
pub struct Jobs {
    pub queue_limit: usize,
    pub queue_limit_per_client: usize,
    pub wait_max_sec: u64,
    pub results_keep_sec: u64,
    pub results_keep_max: usize,
    pub results_keep_bytes: u64,
    pub history_max: u64,
    pub checkpoints_max: usize,
}

impl Default for Jobs {
    fn default() -> Self {
        Self {
            queue_limit: 1024,
            queue_limit_per_client: 512,
            wait_max_sec: 120,
            results_keep_sec: 300,
            results_keep_max: 512,
            results_keep_bytes: 512 << 20,
            history_max: 10_000,
            checkpoints_max: 32,
        }
    }
}

/// `[limits]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[allow(missing_docs)] // As above.
pub struct Limits {
    pub picture_pixels_max: u64,
    pub training_data_bytes_max: u64,
    pub adapter_bytes_per_client_max: u64,
    pub connections_max: usize,
    pub calls_per_client_max: usize,
    pub compositions_per_client_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            picture_pixels_max: 4 << 20,
            training_data_bytes_max: 1 << 30,
            adapter_bytes_per_client_max: 1 << 30,
            connections_max: 512,
            calls_per_client_max: 1024,
            compositions_per_client_max: 256,
        }
    }
}

/// `[plugins]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[allow(missing_docs)] // As above.
pub struct Plugins {
    pub isolation: Isolation,
    pub merge_strategy: String,
    pub sampler: String,
}

impl Default for Plugins {
    /// Which methods are the usual ones says the example file, not this program.
    fn default() -> Self {
        let example: toml::Table = toml::from_str(EXAMPLE).unwrap_or_default();
        let usual = |key: &str| {
            let value = example.get("plugins").and_then(|section| section.get(key));
            value.and_then(toml::Value::as_str).unwrap_or_default().to_owned()
        };
        Self { isolation: Isolation::default(), merge_strategy: usual("merge_strategy"), sampler: usual("sampler") }
    }
}

impl Config {
    /// Reads `files` in order, what a later one says winning key by key.
    pub fn read(files: &[PathBuf]) -> Result<Self> {
        let mut merged = toml::Table::new();
        for path in files {
            let text = std::fs::read_to_string(path).map_err(|e| Error::io(path.display(), &e))?;
            Self::parse(&text).map_err(|e| e.context(path.display()))?;
            let table: toml::Table = toml::from_str(&text).map_err(|e| Error::option(e.message()))?;
            merge(&mut merged, table);
        }
        let config: Self = merged.try_into().map_err(|e: toml::de::Error| Error::option(e.message()))?;
        Ok(config)
    }

    /// Reads one file's text. An error begins with its line.
    pub fn parse(text: &str) -> Result<Self> {
        let config: Self = toml::from_str(text).map_err(|e| {
            let line = e.span().map_or(1, |span| 1 + text[..span.start.min(text.len())].matches('\n').count());
            Error::option(format!("line {line}: {}", e.message().replace('\n', " ")))
        })?;
        config.check(text)?;
        Ok(config)
    }

    fn check(&self, text: &str) -> Result<()> {
        let fail = |key: &str, reason: &str| {
            let found = text.lines().position(|line| line.trim_start().starts_with(key));
            Err(Error::option(format!("line {}: {key} {reason}", found.map_or(1, |at| at + 1))))
        };
        if self.models.device.parse::<blocklora_engine::device::Wanted>().is_err() {
            return fail("device", "must be \"auto\", \"cpu\", \"cuda\" or \"cuda:NUMBER\"");
        }
        if self.models.resident_max == 0 {
            return fail("resident_max", "must be at least 1");
        }
        if self.jobs.queue_limit == 0 || self.jobs.queue_limit > 1_000_000 {
            return fail("queue_limit", "must be 1 to 1000000");
        }
        if self.jobs.queue_limit_per_client == 0 {
            return fail("queue_limit_per_client", "must be at least 1");
        }
        if self.jobs.checkpoints_max == 0 {
            return fail("checkpoints_max", "must be at least 1");
        }
        if self.limits.connections_max == 0 {
            return fail("connections_max", "must be at least 1");
        }
        if self.limits.calls_per_client_max == 0 {
            return fail("calls_per_client_max", "must be at least 1");
        }
        if self.limits.compositions_per_client_max == 0 {
            return fail("compositions_per_client_max", "must be at least 1");
        }
        for (key, id) in [("merge_strategy", &self.plugins.merge_strategy), ("sampler", &self.plugins.sampler)] {
            if id.is_empty() {
                return fail(key, "must name a plugin: `blocklora plugin list` shows them");
            }
        }
        Ok(())
    }
}

fn merge(into: &mut toml::Table, from: toml::Table) {
    for (key, value) in from {
        match (into.get_mut(&key), value) {
            (Some(toml::Value::Table(old)), toml::Value::Table(new)) => merge(old, new),
            (_, value) => {
                into.insert(key, value);
            }
        }
    }
}

/// The files that a daemon without `--config` reads: those of the two that exist.
pub fn standard_files(user: bool) -> Vec<PathBuf> {
    let mut files = vec![PathBuf::from("/etc/blocklora/blocklora.toml")];
    if user {
        let home = std::env::var_os("HOME").map(|home| Path::new(&home).join(".config"));
        let config = std::env::var_os("XDG_CONFIG_HOME").filter(|v| !v.is_empty()).map(PathBuf::from).or(home);
        files.extend(config.map(|folder| folder.join("blocklora/blocklora.toml")));
    }
    files.retain(|path| path.is_file());
    files
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_example_documents_every_key_with_its_default() {
        assert_eq!(Config::parse(EXAMPLE).unwrap(), Config::default());
        assert!(!Config::default().plugins.sampler.is_empty());
        let example: toml::Table = toml::from_str(EXAMPLE).unwrap();
        let defaults = toml::Table::try_from(Config::default()).unwrap();
        let keys = |table: &toml::Table| -> Vec<String> {
            let of = |(section, value): (&String, &toml::Value)| {
                value.as_table().unwrap().keys().map(|key| format!("{section}.{key}")).collect::<Vec<_>>()
            };
            table.iter().flat_map(of).collect()
        };
        assert_eq!(keys(&example), keys(&defaults));
        for line in EXAMPLE.lines().filter(|line| line.contains(" = ")) {
            let at = EXAMPLE.lines().position(|l| l == line).unwrap();
            let above = EXAMPLE.lines().nth(at - 1).unwrap();
            assert!(line.starts_with('#') || above.starts_with('#'), "no comment above {line:?}");
        }
    }

    #[test]
    fn a_wrong_key_is_an_error_with_its_line() {
        let message = Config::parse("[jobs]\nqueue_limit = 5\nqueue_lmit = 7\n").unwrap_err().message;
        assert!(message.starts_with("line 3: unknown field `queue_lmit`"), "{message}");
        let message = Config::parse("[daemon]\nbus = \"sesion\"\n").unwrap_err().message;
        assert!(message.starts_with("line 2: ") && message.contains("session"), "{message}");
        let message = Config::parse("[models]\nload_at_start = 1\n\n").unwrap_err().message;
        assert!(message.starts_with("line 2: "), "{message}");
        let message = Config::parse("[models]\n\nresident_max = 0\n").unwrap_err().message;
        assert_eq!(message, "line 3: resident_max must be at least 1");
        let message = Config::parse("[models]\ndevice = \"gpu\"\n").unwrap_err().message;
        assert_eq!(message, "line 2: device must be \"auto\", \"cpu\", \"cuda\" or \"cuda:NUMBER\"");
        let message = Config::parse("[plugins]\nsampler = \"\"\n").unwrap_err().message;
        assert!(message.starts_with("line 2: sampler must name a plugin"), "{message}");
        assert!(Config::parse("[jobs\n").unwrap_err().message.starts_with("line 1: "));
    }

    #[test]
    fn a_later_file_wins_key_by_key() {
        let folder = tempfile::tempdir().unwrap();
        let files = [("a", "[jobs]\nqueue_limit = 5\nhistory_max = 6\n"), ("b", "[jobs]\nqueue_limit = 7\n")];
        let paths: Vec<PathBuf> = files.iter().map(|(name, _)| folder.path().join(name)).collect();
        for (path, (_, text)) in paths.iter().zip(files) {
            std::fs::write(path, text).unwrap();
        }
        let config = Config::read(&paths).unwrap();
        assert_eq!((config.jobs.queue_limit, config.jobs.history_max), (7, 6));
        std::fs::write(&paths[1], "\nx = 1\n").unwrap();
        let message = Config::read(&paths).unwrap_err().message;
        assert!(message.starts_with(&format!("{}: line 2: ", paths[1].display())), "{message}");
    }
}
