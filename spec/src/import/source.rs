//! What is given to be imported: one file, a PEFT folder, or a folder with one PEFT folder for each part of the model.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value};

use super::file::File;
use super::index::PARTS;
use super::peft::{self, Config};
use super::{Name, fail};
use crate::error::{Error, Result, excerpt};
use crate::{json, limits};

const PEFT_WEIGHTS: &str = "adapter_model.safetensors";
const PEFT_CONFIG: &str = "adapter_config.json";
/// What diffusers' scripts write into a folder.
const DIFFUSERS_WEIGHTS: &str = "pytorch_lora_weights.safetensors";
/// The header's entry in which diffusers keeps PEFT's configuration, as one object with keys such as `unet.r`.
const HEADER_CONFIG: &str = "lora_adapter_metadata";

/// A file and what is known of its scales.
pub(super) struct Source {
    pub(super) file: File,
    /// Of all of it.
    whole: Option<Config>,
    /// By part.
    parts: BTreeMap<&'static str, Config>,
}

impl Source {
    /// The alpha of the layer that `key` names as `module`, where the file states none beside its factors of this rank:
    /// the configuration's, or else the rank.
    pub(super) fn alpha(&self, key: &str, module: &Name, layer: &str, rank: usize) -> Result<f64> {
        let part = layer.split('.').next().unwrap_or_default();
        let config = self.whole.as_ref().or_else(|| self.parts.get(part));
        match (config, module) {
            (Some(config), Name::Dotted(path)) => {
                // Patterns are about the module's name inside its part.
                let inside = path.strip_prefix(part).and_then(|rest| rest.strip_prefix('.')).unwrap_or(path);
                config.alpha(&self.file.path, inside, rank)
            }
            (None, _) if peft::is_wrapped(key) => fail(
                &self.file.path,
                format!("no {PEFT_CONFIG} beside it, without which nobody knows its lora_alpha: put it there"),
            ),
            _ => Ok(rank as f64),
        }
    }
}

/// Opens what is at `path`.
pub(super) fn open(path: &Path) -> Result<Vec<Source>> {
    if !path.is_dir() {
        return Ok(vec![file(path)?]);
    }
    if path.join(PEFT_CONFIG).is_file() {
        return Ok(vec![peft_folder(path)?]);
    }
    let folders = PARTS.iter().map(|part| path.join(part)).filter(|folder| folder.join(PEFT_CONFIG).is_file());
    let sources = folders.map(|folder| peft_folder(&folder)).collect::<Result<Vec<_>>>()?;
    if !sources.is_empty() {
        return Ok(sources);
    }
    let weights = path.join(DIFFUSERS_WEIGHTS);
    if weights.is_file() {
        return Ok(vec![file(&weights)?]);
    }
    fail(
        path,
        format!("the folder has no {PEFT_CONFIG} (nor have unet/ and text_encoder/ in it) and no {DIFFUSERS_WEIGHTS}"),
    )
}

fn file(path: &Path) -> Result<Source> {
    let file = File::open(path)?;
    let beside = path.with_file_name(PEFT_CONFIG);
    // Beside any other file it may be of another adapter.
    let whole = if file.tensors.keys().any(|key| peft::is_wrapped(key)) && beside.is_file() {
        Some(read_config(&beside)?)
    } else {
        None
    };
    let parts = match file.metadata.get(HEADER_CONFIG) {
        Some(text) => header_configs(path, text)?,
        None => BTreeMap::new(),
    };
    Ok(Source { file, whole, parts })
}

fn peft_folder(folder: &Path) -> Result<Source> {
    let weights = folder.join(PEFT_WEIGHTS);
    let pickle = folder.join("adapter_model.bin");
    // Opened for the sake of its refusal, which says what to do.
    let path = if !weights.is_file() && pickle.is_file() { pickle } else { weights };
    Ok(Source {
        file: File::open(&path)?,
        whole: Some(read_config(&folder.join(PEFT_CONFIG))?),
        parts: BTreeMap::new(),
    })
}

fn read_config(path: &Path) -> Result<Config> {
    let bytes = std::fs::metadata(path).map_err(|e| Error::io(path, e))?.len();
    if bytes > limits::HEADER_BYTES_MAX {
        return fail(path, format!("the configuration has {bytes} bytes, and may have {}", limits::HEADER_BYTES_MAX));
    }
    let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
    Config::new(path, &object(path, &text)?)
}

fn header_configs(path: &Path, text: &str) -> Result<BTreeMap<&'static str, Config>> {
    let all = object(path, text)?;
    let mut configs = BTreeMap::new();
    for part in PARTS {
        let field = |(key, value): (&String, &Value)| {
            Some((key.strip_prefix(part)?.strip_prefix('.')?.to_owned(), value.clone()))
        };
        let of_part: Map<String, Value> = all.iter().filter_map(field).collect();
        if !of_part.is_empty() {
            configs.insert(part, Config::new(path, &of_part)?);
        }
    }
    Ok(configs)
}

fn object(path: &Path, text: &str) -> Result<Map<String, Value>> {
    json::check(path, "configuration", text.as_bytes(), limits::MANIFEST_DEPTH_MAX)?;
    serde_json::from_str(text).map_err(|e| Error::Json {
        path: path.into(),
        part: "configuration",
        reason: excerpt(&e.to_string()),
    })
}
