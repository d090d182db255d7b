//! Where a private daemon keeps an interrupted training: a folder beside the output, which goes with success.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use blocklora_client::{ResultFile, Trained};
use blocklora_spec::{Adapter, Partition, Storage};
use serde_json::{Map, Value};

use super::Args;
use super::rows::Rows;

/// In the folder: which training it belongs to.
const RUN: &str = "run";
/// In the folder: the partition with the slot that was decided on, as JSON.
const SLOT: &str = "slot";

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

/// Makes the folder for the training `run`, or finds that of an interrupted one; whether there is a state to go on from.
/// Errors: a checkpoint that the user does not want to go on from, one of another training, or none to go on from.
pub fn begin(output: &Path, run: &str, resume: bool) -> anyhow::Result<bool> {
    let (folder, shown) = (path(output), shown(output));
    if folder.join(RUN).is_file() && !is_there(output) {
        // That of a run which was cut off before its first checkpoint, unless it is at work right now.
        match File::open(&folder).with_context(|| shown.clone())?.try_lock() {
            Err(TryLockError::WouldBlock) => bail!("{shown}: a training with this output is running: wait for it"),
            Err(TryLockError::Error(error)) => return Err(error).context(shown),
            Ok(()) => remove(output)?,
        }
        if resume {
            eprintln!("blocklora: {shown}: that run was interrupted before its first checkpoint: it begins anew");
        }
    } else if resume && !folder.exists() {
        bail!("{shown}: there is no checkpoint to go on from: leave --resume out");
    }
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
        return Ok(true);
    }
    let made = std::fs::create_dir(&folder).and_then(|()| std::fs::write(folder.join(RUN), run));
    if made.is_err() {
        // What could not be filled is not left behind; the error of that would hide the cause.
        let _ = std::fs::remove_dir_all(&folder);
    }
    made.with_context(|| format!("{shown}: cannot write"))?;
    Ok(false)
}

/// Notes which slot was decided on, for when the training goes on and for those that begin beside it.
pub fn note_slot(output: &Path, partition: &Partition) -> anyhow::Result<()> {
    let text = serde_json::to_string(partition)?;
    std::fs::write(path(output).join(SLOT), text).with_context(|| format!("{}: cannot write", shown(output)))
}

/// The slot that was noted for the training with this output.
pub fn slot(output: &Path) -> Option<Partition> {
    slot_in(&path(output))
}

/// The slot that is noted in `folder`, if that is one of a training.
pub fn slot_in(folder: &Path) -> Option<Partition> {
    let is_ours = folder.extension().is_some_and(|e| e == "checkpoint");
    let text = is_ours.then(|| std::fs::read_to_string(folder.join(SLOT)).ok()).flatten()?;
    serde_json::from_str(&text).ok().filter(|partition: &Partition| partition.slot < partition.capacity)
}

/// Whether `folder` is where the training with this output is kept.
pub fn is_of(output: &Path, folder: &Path) -> bool {
    path(output).file_name() == folder.file_name()
}

/// Fails where a private daemon left a checkpoint, of which one that runs knows nothing.
pub fn fails_if_there(output: &Path) -> anyhow::Result<()> {
    if is_there(output) {
        bail!(
            "{}: a checkpoint of a run without a daemon is there, and a daemon is running: go on from it with --daemon \
             private --resume, or remove it",
            shown(output)
        );
    }
    Ok(())
}

/// Whether there is a state to go on from, or the adapter itself.
pub fn is_there(output: &Path) -> bool {
    finished(output).is_some() || any_below(&path(output))
}

/// The trained adapter of a run that could not write it to `output`: its daemon had added it to the folder's library.
pub fn finished(output: &Path) -> Option<PathBuf> {
    let entries = path(output).join("adapters").read_dir().into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).find(|path| path.extension().is_some_and(|e| e == "safetensors"))
}

/// What the training gave that `adapter` is the result of. Errors: `args` ask for another licence or storage.
pub fn trained(adapter: &Path, args: &Args) -> anyhow::Result<(Trained, Rows, ResultFile)> {
    let bytes = std::fs::read(adapter).with_context(|| adapter.display().to_string())?;
    let read = Adapter::from_bytes(adapter, bytes.clone())?;
    let manifest = read.manifest();
    let has_licence = manifest.licence == args.licence;
    if !has_licence || storage(&bytes).as_deref() != Some(Storage::from(args.storage).name()) {
        let option = if has_licence { "--storage" } else { "--licence" };
        bail!("{}: was trained with another {option}: give that run's own, or remove it", adapter.display());
    }
    let factors: usize = read.layers().iter().map(|l| l.rank * (l.columns + l.rows.len())).sum();
    let words: usize = read.tokens().iter().map(|t| t.values.len()).sum();
    let steps = u32::try_from(manifest.training.steps).unwrap_or(u32::MAX);
    let trained = Trained {
        adapter: String::new(),
        digest: read.digest().to_owned(),
        name: manifest.name.clone(),
        parameters: (factors + words) as u64,
        usec: 0,
        steps,
        slot: manifest.partition.map(|p| p.slot),
        resumed_at: steps,
    };
    let rows = manifest.partition.map_or(Rows::All, |partition| Rows::Slot(partition, Some(partition.slot)));
    let file = ResultFile {
        media_type: "application/vnd.safetensors".to_owned(),
        index: 0,
        name: format!("{}.safetensors", manifest.name),
        details: serde_json::Map::new(),
        bytes,
    };
    Ok((trained, rows, file))
}

/// How a valid adapter file stores its numbers, as its header calls it.
fn storage(bytes: &[u8]) -> Option<String> {
    let (length, rest) = bytes.split_first_chunk()?;
    let header = rest.get(..usize::try_from(u64::from_le_bytes(*length)).ok()?)?;
    let header: Map<String, Value> = serde_json::from_slice(header).ok()?;
    header.values().find_map(|tensor| Some(tensor.get("dtype")?.as_str()?.to_owned()))
}

fn any_below(folder: &Path) -> bool {
    let mut paths = folder.read_dir().into_iter().flatten().flatten().map(|entry| entry.path());
    paths.any(|path| if path.is_dir() { any_below(&path) } else { path.extension().is_some_and(|e| e == "checkpoint") })
}

/// Removes the folder, if it is there.
pub fn remove(output: &Path) -> anyhow::Result<()> {
    match std::fs::remove_dir_all(path(output)) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e).with_context(|| shown(output)),
        _ => Ok(()),
    }
}
