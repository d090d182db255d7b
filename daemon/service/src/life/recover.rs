//! What the last daemon left.

use std::sync::Arc;

use crate::catalogue::jobs::JobEntry;
use crate::daemon::Daemon;
use crate::error::{Error, Kind, Result};
use crate::jobs::now_usec;
use crate::jobs::work::Train;

/// Takes in interrupted imports, goes on with interrupted trainings, and notes the end of other jobs. While the state
/// folder cannot be written all of it stays as it is.
pub fn recover(daemon: &Arc<Daemon>) -> Result<()> {
    if daemon.catalogue.is_volatile() {
        return Ok(());
    }
    let tmp = daemon.catalogue.folder().join("tmp");
    if tmp.is_dir() {
        std::fs::remove_dir_all(&tmp).map_err(|e| Error::io(tmp.display(), &e))?;
    }
    take_in(daemon)
}

/// Goes over to the catalogue in the state folder once that can be written, and takes in what waits there.
pub fn late(daemon: &Arc<Daemon>) {
    if daemon.catalogue.reopen().is_err() {
        return;
    }
    // Before anything new is accepted, whose folder would be nobody's.
    if let Err(error) = daemon.count_boot().and_then(|()| take_in(daemon)) {
        tracing::error!("what the last daemon left cannot be taken in: {error}");
    }
    if let Err(error) = daemon.add_known_models() {
        tracing::error!("{error}");
    }
    daemon.catalogue.lasts();
    tracing::info!("the state folder can be written: from now on everything is remembered");
}

fn take_in(daemon: &Arc<Daemon>) -> Result<()> {
    let recovered = daemon.catalogue.recover()?;
    for line in recovered.done {
        tracing::warn!("{line}");
    }
    adopt(daemon.clone(), recovered.strays)?;
    for entry in daemon.catalogue.unfinished_jobs()? {
        let id = entry.id.clone();
        // One that cannot be taken up is not in the way of the others.
        if let Err(error) = take_up(daemon, entry) {
            tracing::error!("job {id}: {error}");
        }
    }
    let alive: Vec<String> = daemon.jobs().iter().map(|job| job.id.clone()).collect();
    // Folders of jobs that nobody knows any more.
    let jobs = daemon.catalogue.folder().join("jobs");
    for item in std::fs::read_dir(&jobs).into_iter().flatten().flatten() {
        let name = item.file_name();
        if !alive.iter().any(|id| id.as_str() == name) {
            let path = item.path();
            std::fs::remove_dir_all(&path).map_err(|e| Error::io(path.display(), &e))?;
            tracing::info!("{}: a job that ended, removed", path.display());
        }
    }
    let leases = daemon.catalogue.release_trainings_but(&alive)?;
    if leases > 0 {
        tracing::warn!("{leases} slots were leased for trainings that are no more, given back");
    }
    daemon.drop_old_checkpoints()
}

/// Takes in files of adapters that have no entry, beside the daemon's start: each is read and checked.
fn adopt(daemon: Arc<Daemon>, strays: Vec<String>) -> Result<()> {
    let run = move || {
        for digest in strays {
            if daemon.is_stopping() {
                break;
            }
            match daemon.catalogue.adopt(&digest) {
                Ok(line) => tracing::info!("{line}"),
                Err(error) => tracing::error!("{error}"),
            }
        }
    };
    let thread = std::thread::Builder::new().name("adopt".to_owned()).spawn(run);
    thread.map(drop).map_err(|e| Error::io("cannot start a thread", &e))
}

/// Goes on with a job that the last daemon left, or notes its end: what a training held is given back, and what it had
/// done is kept for when it is asked for again.
fn take_up(daemon: &Arc<Daemon>, entry: JobEntry) -> Result<()> {
    let folder = daemon.training_folder(&entry.id);
    let work = work_of(&entry).map(|work| Train { folder: folder.clone(), ..work });
    let lease = work.as_ref().ok().and_then(|work| work.lease.clone());
    let Err(error) = work.and_then(|work| go_on(daemon, &entry, work)) else { return Ok(()) };
    tracing::warn!("job {}: {error}", entry.id);
    if let Err(error) = daemon.keep_checkpoint(&folder) {
        tracing::warn!("job {}: its checkpoint is lost: {error}", entry.id);
    }
    let ended = JobEntry {
        state: "failed".to_owned(),
        finished_usec: now_usec(),
        error: error.name(),
        message: error.message,
        spec: None,
        ..entry
    };
    daemon.note_end(ended, lease.as_deref())
}

/// What the training is about; an error for a job of another kind.
fn work_of(entry: &JobEntry) -> Result<Train> {
    let ended = || Error::new(Kind::ShuttingDown, "the daemon ended before the job had finished");
    let spec = entry.spec.as_deref().filter(|_| entry.kind == "train").ok_or_else(ended)?;
    serde_json::from_str(spec).map_err(|e| Error::failed(format!("what it needs is damaged: {e}")))
}

fn go_on(daemon: &Arc<Daemon>, entry: &JobEntry, work: Train) -> Result<()> {
    if work.ends_with_client {
        let message =
            "the daemon ended before the job had finished: the same training goes on from its last checkpoint";
        return Err(Error::new(Kind::ShuttingDown, message));
    }
    if !work.folder.is_dir() {
        return Err(Error::failed(format!("{}: its folder is missing", work.folder.display())));
    }
    daemon.resume_training(entry, work)?;
    tracing::info!("job {}: the training of {:?} goes on", entry.id, entry.description);
    Ok(())
}
