//! A trainer's settings, from TOML.

use std::path::{Path, PathBuf};

use anyhow::Context;
use blocklora_spec::{Kind, Partition};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::{Args, Rows};
use crate::settings;

/// What the trainer gets, and what is not its own business.
pub struct Settings {
    /// The trainer's own settings.
    pub config: Map<String, Value>,
    /// The partition, which is said beside them.
    pub partition: Option<Partition>,
    /// Training steps, if they are said.
    pub steps: Option<usize>,
}

/// Reads the settings in `path`; `steps` counts more than what the file says. What the keys mean is the trainer's.
pub fn read(path: Option<&Path>, steps: Option<u32>) -> anyhow::Result<Settings> {
    let mut config = settings::read(path, &[])?;
    if let Some(steps) = steps {
        config.insert("steps".into(), steps.into());
    }
    let partition = config.remove("partition").map(serde_json::from_value).transpose();
    let steps = config.get("steps").and_then(Value::as_u64).and_then(|n| usize::try_from(n).ok());
    Ok(Settings { partition: partition.context("partition")?, steps, config })
}

/// A digest of everything that decides the result of the training that `args` ask for. The licence and how numbers are
/// stored are decided when the file is written.
pub fn fingerprint(
    args: &Args,
    settings: &Settings,
    rows: &Rows,
    pictures: &[(PathBuf, Option<String>)],
) -> anyhow::Result<String> {
    let mut hash = Sha256::new();
    let said = serde_json::json!([
        args.class,
        args.name,
        Kind::from(args.kind).name(),
        args.method,
        settings.config,
        format!("{rows:?}"),
        args.seed,
        args.model.base,
        args.model.precision.map(|p| p.name()),
    ]);
    hash.update(said.to_string());
    for (path, caption) in pictures {
        hash.update(std::fs::read(path).with_context(|| path.display().to_string())?);
        hash.update(caption.as_deref().unwrap_or("\0"));
    }
    Ok(blocklora_engine::weights::hex(&hash.finalize()))
}
