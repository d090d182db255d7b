//! What a model folder says of how its pictures are best drawn, and how concepts are best taught on it.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::config::read_json;
use crate::error::{Error, Result};

/// Settings for requests that do not say otherwise: `blocklora.json` in the folder, where it is there. Tools that do not
/// know the file leave it alone.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Defaults {
    /// Of classifier-free guidance; 1 is none. What Stable Diffusion is drawn with, 7.5, burns the colours of small models.
    pub guidance_scale: f32,
    /// Settings of trainings on this model, by the trainer's id. Published ones are for models of Stable Diffusion's size.
    pub training: BTreeMap<String, Map<String, Value>>,
}

impl Default for Defaults {
    fn default() -> Self {
        Self { guidance_scale: 7.5, training: BTreeMap::new() }
    }
}

impl Defaults {
    /// The file's name in the model folder.
    pub const FILE: &str = "blocklora.json";

    /// Those of the model folder `dir`. Errors name the file and what is wrong in it.
    pub fn of(dir: &Path) -> Result<Self> {
        let path = dir.join(Self::FILE);
        if !path.is_file() {
            return Ok(Self::default());
        }
        let defaults: Self = read_json(&path)?;
        if !(0.0..=1000.0).contains(&defaults.guidance_scale) {
            let reason = format!("guidance_scale = {}: must be 0 to 1000", defaults.guidance_scale);
            return Err(Error::invalid_file(path, reason));
        }
        Ok(defaults)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_folder_may_say_how_it_is_drawn() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(Defaults::FILE);
        assert_eq!(Defaults::of(dir.path()).unwrap().guidance_scale, 7.5);
        std::fs::write(&path, r#"{"guidance_scale": 2.5}"#).unwrap();
        assert_eq!(Defaults::of(dir.path()).unwrap().guidance_scale, 2.5);
        for (wrong, says) in
            [(r#"{"guidance_scale": -1}"#, "0 to 1000"), (r#"{"guidance": 3}"#, "guidance"), ("", "JSON")]
        {
            std::fs::write(&path, wrong).unwrap();
            let error = Defaults::of(dir.path()).unwrap_err().to_string();
            assert!(error.contains(Defaults::FILE) && error.contains(says), "{error}");
        }
    }
}
