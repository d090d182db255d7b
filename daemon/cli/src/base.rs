//! Which model to work on: `--base`, `$BLOCKLORA_MODEL`, an installed one, or the one in the source tree.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

const VARIABLE: &str = "BLOCKLORA_MODEL";

/// The folder of the base model: `chosen` if given, else the default.
pub fn folder(chosen: Option<&Path>) -> anyhow::Result<PathBuf> {
    if let Some(chosen) = chosen {
        return check(chosen).context("--base");
    }
    if let Some(variable) = std::env::var_os(VARIABLE).filter(|v| !v.is_empty()) {
        return check(Path::new(&variable)).with_context(|| format!("${VARIABLE}"));
    }
    let starter = starter()?;
    check(&starter.join("model"))
}

/// Whether `$BLOCKLORA_MODEL` names a model.
pub fn is_in_environment() -> bool {
    std::env::var_os(VARIABLE).is_some_and(|value| !value.is_empty())
}

/// The folder of the bundled starter: `model`, `clip`, `concepts` and `adapters`.
pub fn starter() -> anyhow::Result<PathBuf> {
    let executable = std::env::current_exe().context("cannot find this executable")?;
    let installed = executable.ancestors().nth(2).map(|prefix| prefix.join("share/blocklora/starter"));
    let from_tree = executable.ancestors().map(|folder| folder.join("daemon/starter"));
    // Built with another target folder, or installed by cargo: the tree that it was built from.
    let built_from = Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("starter");
    let found = installed.into_iter().chain(from_tree).chain([built_from]).find(|f| f.join("model").is_dir());
    found.with_context(|| format!("the bundled model was not found: give a model folder with --base or ${VARIABLE}"))
}

/// `folder` if it looks like a model in the diffusers layout.
fn check(folder: &Path) -> anyhow::Result<PathBuf> {
    if !folder.is_dir() {
        bail!("{} is not a folder: give the folder of a model in the diffusers layout", folder.display());
    }
    for part in ["unet", "vae", "text_encoder", "tokenizer", "scheduler"] {
        if !folder.join(part).is_dir() {
            bail!(
                "{} is not a model in the diffusers layout: it has no folder {part:?} (a model folder has unet, vae, \
                 text_encoder, tokenizer and scheduler)",
                folder.display()
            );
        }
    }
    Ok(folder.to_path_buf())
}
