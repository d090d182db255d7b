//! What trainings hold while they are not over, and what stays of them: checkpoints, kept for when the same training is
//! asked for again.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use blocklora_engine::weights::hex;
use sha2::{Digest, Sha256};

use super::Daemon;
use crate::catalogue::jobs::JobEntry;
use crate::error::{Error, Result};
use crate::jobs::queue::Limits;
use crate::jobs::work::{Train, Work};
use crate::jobs::{Job, Lifetime, Owner, Priority, State, Stop, Ticket, now_usec};

/// The adapter in a training's folder.
pub const ADAPTER: &str = "adapter.safetensors";
/// Likewise its checkpoint, where the engine writes it.
const CHECKPOINT: &str = "adapter.safetensors.checkpoint";
/// Likewise the name under which the checkpoint is kept.
const KEPT_AS: &str = "kept-as";

impl Daemon {
    /// The folder of the training `id`.
    pub fn training_folder(&self, id: &str) -> PathBuf {
        self.catalogue.folder().join("jobs").join(id)
    }

    fn checkpoints(&self) -> PathBuf {
        self.catalogue.folder().join("checkpoints")
    }

    /// Queues a training that an earlier daemon left unfinished.
    pub fn resume_training(self: &Arc<Self>, entry: &JobEntry, work: Train) -> Result<Arc<Job>> {
        let left = |deadline: u64| Duration::from_micros(deadline.saturating_sub(now_usec()));
        let ticket = Ticket {
            owner: Owner { client: String::new(), uid: entry.uid },
            priority: Priority::from_name(&entry.priority)?,
            lifetime: Lifetime::Daemon,
            token: None,
            timeout: work.deadline_usec.map(left),
            created_usec: Some(entry.created_usec),
        };
        self.submit_as(entry.id.clone(), &ticket, Work::Train(Box::new(work)), Limits::NONE)
    }

    /// Before a training's first step: takes the checkpoint that is kept of one like it, and notes in its folder under
    /// which name its own is kept, so that the next daemon can do so after this one's sudden end.
    pub fn take_checkpoint(&self, work: &Train, data_digest: &str) -> Result<()> {
        let name = kept_name(work, data_digest)?;
        let (note, checkpoint) = (work.folder.join(KEPT_AS), work.folder.join(CHECKPOINT));
        let kept = self.checkpoints().join(&name);
        let begun = note.is_file() || checkpoint.is_file();
        if work.resume && !begun && !kept.is_file() {
            let message = "option \"resume\": no checkpoint of this training is kept: leave it out to begin anew";
            return Err(Error::option(message));
        }
        blocklora_spec::write_atomically(&note, name.as_bytes())?;
        if kept.is_file() && !checkpoint.is_file() {
            std::fs::rename(&kept, &checkpoint).map_err(|e| Error::io(kept.display(), &e))?;
        }
        Ok(())
    }

    /// Keeps the checkpoint in a training's folder, if there is one.
    pub fn keep_checkpoint(&self, folder: &Path) -> Result<()> {
        let checkpoint = folder.join(CHECKPOINT);
        let name = std::fs::read_to_string(folder.join(KEPT_AS)).unwrap_or_default();
        if !checkpoint.is_file() || !is_kept_name(&name) {
            return Ok(());
        }
        let folder = self.checkpoints();
        let kept = std::fs::create_dir_all(&folder)
            .and_then(|()| std::fs::rename(&checkpoint, folder.join(name)))
            .and_then(|()| File::open(&folder)?.sync_all());
        kept.map_err(|e| Error::io(folder.display(), &e))?;
        self.drop_old_checkpoints()
    }

    /// Removes the oldest of the kept checkpoints where there are more than the configuration allows.
    pub fn drop_old_checkpoints(&self) -> Result<()> {
        let folder = self.checkpoints();
        let name = |path: &Path| path.file_name().and_then(|name| name.to_str()).is_some_and(is_kept_name);
        let mut kept: Vec<(SystemTime, PathBuf)> = std::fs::read_dir(&folder)
            .into_iter()
            .flatten()
            .flatten()
            .map(|item| item.path())
            .filter(|path| name(path))
            .filter_map(|path| Some((path.metadata().ok()?.modified().ok()?, path)))
            .collect();
        kept.sort();
        let old = kept.len().saturating_sub(self.config().jobs.checkpoints_max);
        for (_, path) in &kept[..old] {
            std::fs::remove_file(path).map_err(|e| Error::io(path.display(), &e))?;
            tracing::info!("{}: nobody went on from it, removed (jobs.checkpoints_max)", path.display());
        }
        Ok(())
    }

    /// A training is over, unless the next daemon goes on with it: what it held is given back, and its end is noted at
    /// once, so that the next daemon does not train again what is done.
    pub(super) fn end_training(&self, job: &Job) {
        let Some(held) = job.held.as_ref().filter(|_| !job.goes_on()) else { return };
        // Whoever repeats what failed or was interrupted need not begin anew.
        let is_over = job.stop_requested() == Some(Stop::Discard) || job.status(|s| s.state == State::Done);
        if !is_over && let Err(error) = self.keep_checkpoint(&held.folder) {
            tracing::warn!("job {}: its checkpoint is lost: {error}", job.id);
        }
        let note = || self.note_end(JobEntry::of(job), held.lease.as_deref());
        let noted = note();
        if let Err(error) = std::fs::remove_dir_all(&held.folder) {
            tracing::warn!("{}: {error}", held.folder.display());
        }
        // On a full disk what was removed makes room for it.
        if let Err(error) = noted.or_else(|_| note()) {
            tracing::error!("job {}: {error}", job.id);
        }
    }

    /// Notes the end of a training and gives back the lease on its rows.
    pub fn note_end(&self, entry: JobEntry, lease: Option<&str>) -> Result<()> {
        self.catalogue.put_jobs(&[entry], self.config().jobs.history_max)?;
        lease.map_or(Ok(()), |lease| self.catalogue.release(lease))
    }
}

/// The name under which the checkpoint of a training is kept: by everything that decides its result, but not by what is
/// only said in the file, nor by how its numbers are stored there.
fn kept_name(work: &Train, data_digest: &str) -> Result<String> {
    let plain = Train {
        folder: PathBuf::new(),
        lease: None,
        ends_with_client: false,
        resume: false,
        deadline_usec: None,
        storage: blocklora_spec::Storage::F32,
        licence: None,
        created: None,
        ..work.clone()
    };
    let text = serde_json::to_string(&plain).map_err(|e| Error::failed(e.to_string()))?;
    let mut hash = Sha256::new();
    hash.update(data_digest);
    hash.update(text);
    Ok(format!("{}.checkpoint", hex(&hash.finalize())))
}

fn is_kept_name(name: &str) -> bool {
    let key = name.strip_suffix(".checkpoint");
    key.is_some_and(|key| key.len() == 64 && key.bytes().all(|b| b.is_ascii_hexdigit()))
}
