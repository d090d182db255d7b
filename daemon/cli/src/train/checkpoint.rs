//! Where a private daemon keeps an interrupted training: a folder beside the output, which goes with success.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

/// In the folder: which training it belongs to.
const RUN: &str = "run";

fn path(output: &Path) -> PathBuf {
    let mut name = output.as_os_str().to_owned();
    name.push(".checkpoint");
    PathBuf::from(name)
}

/// How messages call it.
pub fn shown(output: &Path) -> String {
    path(output).display().to_string()
}

/// The folder, absolute.
pub fn folder(output: &Path) -> anyhow::Result<PathBuf> {
    std::path::absolute(path(output)).with_context(|| shown(output))
}

/// Makes the folder for the training `run`, or finds that of an interrupted one. Errors: a checkpoint that the user
/// does not want to go on from, or one of another training.
pub fn begin(output: &Path, run: &str, resume: bool) -> anyhow::Result<()> {
    let (folder, shown) = (path(output), shown(output));
    if folder.exists() {
        let found = std::fs::read_to_string(folder.join(RUN));
        let found = found.with_context(|| format!("{shown}: is not a checkpoint of this version: remove it"))?;
        if !resume {
            bail!("{shown}: a checkpoint of an interrupted run is there: go on from it with --resume, or remove it");
        }
        if found != run {
            bail!(
                "{shown}: the checkpoint of a run with other pictures or settings: remove it, or give that run's own"
            );
        }
        return Ok(());
    }
    let made = std::fs::create_dir(&folder).and_then(|()| std::fs::write(folder.join(RUN), run));
    if made.is_err() {
        // What could not be filled is not left behind; the error of that would hide the cause.
        let _ = std::fs::remove_dir_all(&folder);
    }
    made.with_context(|| format!("{shown}: cannot write"))
}

/// Whether there is a state to go on from.
pub fn is_there(output: &Path) -> bool {
    fn any_below(folder: &Path) -> bool {
        folder.read_dir().into_iter().flatten().flatten().map(|entry| entry.path()).any(|path| {
            if path.is_dir() { any_below(&path) } else { path.extension().is_some_and(|e| e == "checkpoint") }
        })
    }
    any_below(&path(output))
}

/// Removes the folder, if it is there.
pub fn remove(output: &Path) -> anyhow::Result<()> {
    match std::fs::remove_dir_all(path(output)) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e).with_context(|| shown(output)),
        _ => Ok(()),
    }
}
