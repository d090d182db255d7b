//! The manifest: a TOML file beside the library that says what it is, so that listing plugins loads none.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::sample::TimestepSpacing;

/// What a plugin does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PluginKind {
    /// A merge strategy.
    Merge,
    /// A trainer.
    Train,
    /// A sampler.
    Sample,
}

impl PluginKind {
    /// As it stands in manifests, file names and on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Merge => "merge",
            Self::Train => "train",
            Self::Sample => "sample",
        }
    }
}

impl fmt::Display for PluginKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A law that a method keeps; `blocklora plugin check` verifies what is declared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Law {
    /// Merge: one adapter at weight 1 gives that adapter's own delta.
    Identity,
    /// Merge: the order of the adapters makes no difference beyond rounding.
    Order,
    /// Merge: with all weights multiplied by c, the change of the weights is multiplied by c.
    Scale,
    /// Sample: with more steps the distribution of the samples approaches the exact one.
    Converges,
}

/// The manifest of one plugin: `<kind>-<id>.toml`, beside the library or where the library's path leads from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// The method's id, as users name it: lower-case letters, digits and `-`. Unique among plugins of its kind.
    pub id: String,
    /// What it does.
    pub kind: PluginKind,
    /// The plugin's own version.
    pub version: String,
    /// The ABI version that it was built for: "major.minor".
    pub abi: String,
    /// File name of the library in the manifest's folder.
    pub library: String,
    /// What it is, in one line.
    pub summary: String,
    /// SPDX expression.
    pub licence: String,
    /// Memory in MiB that the plugin itself takes at most while it works; in a worker process, taking more ends the job.
    pub memory_mib: u64,
    /// Same input, same bits: verified by `blocklora plugin check`.
    #[serde(default)]
    pub deterministic: bool,
    /// The paper or page that describes the method.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reference: Option<String>,
    /// The laws that it keeps.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub laws: Vec<Law>,
    /// Samplers: how timesteps are spaced on a model whose folder does not say it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timestep_spacing: Option<TimestepSpacing>,
    /// Other names that users know the method by, each with the settings that it stands for: `dpmpp-2m-karras = { karras
    /// = true }`. What a user sets beside such a name comes on top. Unique among the ids of its kind, too.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub aliases: BTreeMap<String, Value>,
}

impl Manifest {
    /// The name that tells the plugin from all others: `merge-blocklora`.
    pub fn full_name(&self) -> String {
        format!("{}-{}", self.kind, self.id)
    }

    /// The ABI version as numbers.
    pub fn abi(&self) -> Option<(u32, u32)> {
        abi_version(&self.abi)
    }

    /// Checks every field for itself; the reason names the field and what is allowed.
    pub fn check(&self) -> Result<(), String> {
        if !is_id(&self.id) {
            return Err(format!("id = {:?}: must be 1 to 64 lower-case letters, digits and '-'", self.id));
        }
        for (alias, settings) in &self.aliases {
            if !is_id(alias) || *alias == self.id {
                return Err(format!(
                    "aliases: {alias:?} must be another id: 1 to 64 lower-case letters, digits and '-'"
                ));
            }
            if !settings.is_object() {
                return Err(format!(
                    "aliases.{alias} = {settings}: must be a table of settings, such as {{ karras = true }}"
                ));
            }
        }
        if self.abi().is_none() {
            return Err(format!("abi = {:?}: must be major.minor, such as \"1.0\"", self.abi));
        }
        let file_ok = !self.library.is_empty() && !self.library.contains(['/', '\0']) && !self.library.starts_with('.');
        if !file_ok {
            return Err(format!("library = {:?}: must be the name of a file in the manifest's folder", self.library));
        }
        if self.version.is_empty() || self.version.len() > 64 {
            return Err("version: must be 1 to 64 characters".into());
        }
        if self.summary.is_empty() || self.summary.chars().any(char::is_control) {
            return Err("summary: must be one line".into());
        }
        if !(1..=1 << 20).contains(&self.memory_mib) {
            return Err(format!("memory_mib = {}: must be 1 to 1048576", self.memory_mib));
        }
        if self.timestep_spacing.is_some() && self.kind != PluginKind::Sample {
            return Err("timestep_spacing: only samplers have one".into());
        }
        let of = |law: &Law| if *law == Law::Converges { PluginKind::Sample } else { PluginKind::Merge };
        if let Some(law) = self.laws.iter().find(|law| of(law) != self.kind) {
            return Err(format!("laws: {law:?} is a law of kind \"{}\", not \"{}\"", of(law), self.kind));
        }
        Ok(())
    }
}

/// "major.minor" as numbers.
pub fn abi_version(text: &str) -> Option<(u32, u32)> {
    let (major, minor) = text.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

fn is_id(id: &str) -> bool {
    id.len() <= 64
        && id.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
        && id.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde_json::json;

    use super::*;

    fn manifest(key: &str, value: Value) -> Result<(), String> {
        let mut json = json!({
            "id": "heun", "kind": "sample", "version": "0.1.0", "abi": "1.0", "library": "libheun.so",
            "summary": "Heun's method", "licence": "MIT", "memory_mib": 64,
        });
        json[key] = value;
        serde_json::from_value::<Manifest>(json).map_err(|e| e.to_string())?.check()
    }

    #[test]
    fn every_wrong_field_is_named() {
        manifest("aliases", json!({"heun-karras": {"karras": true}})).unwrap();
        manifest("timestep_spacing", json!("linspace")).unwrap();
        for (key, value) in [
            ("id", json!("Heun")),
            ("abi", json!("1")),
            ("library", json!("../libheun.so")),
            ("version", json!("")),
            ("summary", json!("two\nlines")),
            ("memory_mib", json!(0)),
            ("laws", json!(["order"])),
            ("aliases", json!({"heun": {}})),
            ("aliases", json!({"heun-karras": true})),
            ("colour", json!("red")),
        ] {
            let error = manifest(key, value.clone()).unwrap_err();
            assert!(error.contains(key), "{key} = {value}: {error}");
        }
        assert!(manifest("timestep_spacing", json!("even")).unwrap_err().contains("even"));
    }
}
