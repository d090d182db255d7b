//! The manifest: a TOML file beside the library that says what it is, so that listing plugins loads none.

use std::fmt;

use serde::{Deserialize, Serialize};

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

/// A law of merging that a strategy keeps; `blocklora plugin check` verifies what is declared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Law {
    /// One adapter at weight 1 gives that adapter's own delta.
    Identity,
    /// The order of the adapters makes no difference beyond rounding.
    Order,
    /// With all weights multiplied by c, the change of the weights is multiplied by c.
    Scale,
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
    /// The laws that a merge strategy keeps.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub laws: Vec<Law>,
}

impl Manifest {
    /// The name that tells the plugin from all others: `merge-blocklora`.
    pub fn full_name(&self) -> String {
        format!("{}-{}", self.kind, self.id)
    }

    /// The ABI version as numbers.
    pub fn abi(&self) -> Option<(u32, u32)> {
        let (major, minor) = self.abi.split_once('.')?;
        Some((major.parse().ok()?, minor.parse().ok()?))
    }

    /// Checks every field for itself; the reason names the field and what is allowed.
    pub fn check(&self) -> Result<(), String> {
        let id_ok = self.id.len() <= 64
            && self.id.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
            && self.id.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        if !id_ok {
            return Err(format!("id = {:?}: must be 1 to 64 lower-case letters, digits and '-'", self.id));
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
        if self.kind != PluginKind::Merge && !self.laws.is_empty() {
            return Err("laws: only merge strategies have them".into());
        }
        Ok(())
    }
}
