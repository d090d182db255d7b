//! Which files make up a diffusers model folder.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

use super::config::read_json;
use crate::error::{Error, Result};
use crate::weights::WeightFile;

/// A component that holds weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Component {
    /// `text_encoder/`
    TextEncoder,
    /// `unet/`
    UNet,
    /// `vae/`
    Vae,
}

impl Component {
    /// All of them, in the order of their folders' names.
    pub const ALL: [Self; 3] = [Self::TextEncoder, Self::UNet, Self::Vae];

    /// Its folder.
    pub fn folder(self) -> &'static str {
        match self {
            Self::TextEncoder => "text_encoder",
            Self::UNet => "unet",
            Self::Vae => "vae",
        }
    }

    /// Its weight file's name in a folder that diffusers loads without being told a variant.
    pub fn weight_file(self) -> &'static str {
        match self {
            Self::TextEncoder => "model.safetensors",
            Self::UNet | Self::Vae => "diffusion_pytorch_model.safetensors",
        }
    }

    fn class(self) -> &'static str {
        match self {
            Self::TextEncoder => "CLIPTextModel",
            Self::UNet => "UNet2DConditionModel",
            Self::Vae => "AutoencoderKL",
        }
    }
}

/// `model_index.json`: which components a folder has.
#[derive(Clone, Debug)]
pub struct ModelIndex {
    /// The entries with a folder of their own, and their classes.
    pub components: BTreeMap<String, String>,
}

impl ModelIndex {
    /// Reads `dir/model_index.json` and checks that it describes a Stable Diffusion 1 or 2 pipeline.
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join("model_index.json");
        if !path.is_file() {
            let reason = "not a model folder in the diffusers layout: it has no model_index.json";
            return Err(Error::invalid_file(dir, reason));
        }
        let fields: BTreeMap<String, Value> = read_json(&path)?;
        let unsupported = |field: &str, value: String, supported: &str| Error::Unsupported {
            path: path.clone(),
            field: field.into(),
            value,
            supported: supported.into(),
        };
        match fields.get("_class_name").and_then(Value::as_str) {
            None | Some("StableDiffusionPipeline" | "StableDiffusionImg2ImgPipeline") => {}
            Some(other) => {
                return Err(unsupported("_class_name", other.into(), "only StableDiffusionPipeline"));
            }
        }
        let mut components = BTreeMap::new();
        for (name, value) in &fields {
            if let Some([library, class]) = value.as_array().map(Vec::as_slice)
                && let (Some(_), Some(class)) = (library.as_str(), class.as_str())
            {
                components.insert(name.clone(), class.to_owned());
            }
        }
        for component in Component::ALL {
            let (name, class) = (component.folder(), component.class());
            match components.get(name) {
                Some(found) if found == class => {}
                Some(found) => return Err(unsupported(name, found.clone(), &format!("only {class}"))),
                None => return Err(Error::invalid_file(&path, format!("{name}: missing"))),
            }
        }
        // A second text encoder, an image encoder and the like condition the UNet, too.
        let known = ["text_encoder", "unet", "vae", "tokenizer", "scheduler", "safety_checker", "feature_extractor"];
        if let Some((name, class)) = components.iter().find(|(name, _)| !known.contains(&name.as_str())) {
            return Err(unsupported(name, class.clone(), "a pipeline without this component is"));
        }
        Ok(Self { components })
    }
}

/// Maps the weights of `component`: the plain file, or else the `.fp16` variant.
pub fn open_weights(dir: &Path, component: Component) -> Result<Arc<WeightFile>> {
    let folder = dir.join(component.folder());
    let plain = component.weight_file();
    let half = plain.replace(".safetensors", ".fp16.safetensors");
    for name in [plain, &half] {
        let path = folder.join(name);
        if path.is_file() {
            return WeightFile::open(path);
        }
    }
    let reason = format!(
        "no weights: neither {plain} nor {half} is there; sharded and .bin weights must be saved again as one \
         safetensors file (diffusers: pipeline.save_pretrained(dir, max_shard_size=\"100GB\"))"
    );
    Err(Error::invalid_file(folder, reason))
}

/// The config of `component`.
pub fn config_file(dir: &Path, component: Component) -> PathBuf {
    dir.join(component.folder()).join("config.json")
}
