//! Which model a daemon is to work on.

use std::path::PathBuf;

use anyhow::Context;
use blocklora_client::{Load, Model, ModelState};
use sha2::{Digest, Sha256};

use super::{Daemon, watch};
use crate::args::ModelArgs;
use crate::base;

/// A model that is loaded.
pub struct ChosenModel {
    /// The model.
    pub model: Model,
    /// What is known of it.
    pub state: ModelState,
}

impl ChosenModel {
    /// Its folder, if this program can read it, too.
    pub fn folder(&self) -> Option<PathBuf> {
        Some(PathBuf::from(&self.state.path)).filter(|folder| folder.join("unet").is_dir())
    }
}

/// Makes the model that `args` name ready: `--base`, `$BLOCKLORA_MODEL`, else the daemon's default or, with a private
/// daemon, the bundled one.
pub async fn choose_model(daemon: &Daemon, args: &ModelArgs) -> anyhow::Result<ChosenModel> {
    let named = args.base.is_some() || base::is_in_environment();
    let model = if named || daemon.is_private() {
        register(daemon, &base::folder(args.base.as_deref())?).await?
    } else {
        default(daemon).await?
    };
    let id = model.state().await?.id;
    let request = Load { precision: args.precision_name(), ..Load::default() };
    let job = daemon.client.load_model(&id, &request).await?;
    watch::quietly(&job, "loading the model").await?;
    let state = model.state().await?;
    Ok(ChosenModel { model, state })
}

async fn default(daemon: &Daemon) -> anyhow::Result<Model> {
    let id = daemon.client.status().await?.default_model;
    for model in daemon.client.models().await? {
        if model.state().await?.id == id {
            return Ok(model);
        }
    }
    anyhow::bail!("the daemon has no default model: register one with `blocklora models add DIR`, or give --base")
}

/// The model in `folder`, which the daemon may know already.
async fn register(daemon: &Daemon, folder: &std::path::Path) -> anyhow::Result<Model> {
    let folder = folder.canonicalize().with_context(|| folder.display().to_string())?;
    let text = folder.to_str().with_context(|| format!("{}: the name is not UTF-8", folder.display()))?;
    for model in daemon.client.models().await? {
        if model.state().await?.path == text {
            return Ok(model);
        }
    }
    Ok(daemon.client.register_model(text, Some(&id_of(&folder))).await?)
}

/// An id for a folder: its name, and enough of a digest of its whole path to tell it from others of that name.
pub fn id_of(folder: &std::path::Path) -> String {
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    let name: String =
        name.chars().map(|c| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '-' }).take(48).collect();
    let digest = Sha256::digest(folder.as_os_str().as_encoded_bytes());
    format!("{name}-{:02x}{:02x}{:02x}{:02x}", digest[0], digest[1], digest[2], digest[3])
}
