//! What the last daemon left.

use std::sync::Arc;

use crate::catalogue::jobs::JobEntry;
use crate::daemon::Daemon;
use crate::error::{Error, Kind, Result};
use crate::jobs::now_usec;
use crate::jobs::work::Train;

/// Takes in interrupted imports, goes on with interrupted trainings, and notes the end of other jobs.
pub fn recover(daemon: &Arc<Daemon>) -> Result<()> {
    let recovered = daemon.catalogue.recover()?;
    for line in recovered.done {
        tracing::warn!("{line}");
    }
    adopt(daemon.clone(), recovered.strays)?;
    let history_max = daemon.config().jobs.history_max;
    let tmp = daemon.catalogue.folder().join("tmp");
    if tmp.is_dir() {
        std::fs::remove_dir_all(&tmp).map_err(|e| Error::io(tmp.display(), &e))?;
    }
    let unfinished = daemon.catalogue.unfinished_jobs()?;
    for entry in &unfinished {
        if let Err(error) = go_on(daemon, entry) {
            tracing::warn!("job {}: {error}", entry.id);
            let ended = JobEntry {
                state: "failed".to_owned(),
                finished_usec: now_usec(),
                error: error.name(),
                message: error.message,
                spec: None,
                ..entry.clone()
            };
            daemon.catalogue.put_jobs(&[ended], history_max)?;
        }
    }
    // Folders of jobs that nobody knows any more.
    let jobs = daemon.catalogue.folder().join("jobs");
    for item in std::fs::read_dir(&jobs).into_iter().flatten().flatten() {
        let name = item.file_name();
        let known = daemon.jobs().iter().any(|job| job.id.as_str() == name);
        if !known {
            let path = item.path();
            std::fs::remove_dir_all(&path).map_err(|e| Error::io(path.display(), &e))?;
            tracing::info!("{}: a job that ended, removed", path.display());
        }
    }
    Ok(())
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

fn go_on(daemon: &Arc<Daemon>, entry: &JobEntry) -> Result<()> {
    let ended = || Error::new(Kind::ShuttingDown, "the daemon ended before the job had finished");
    let spec = entry.spec.as_deref().filter(|_| entry.kind == "train").ok_or_else(ended)?;
    let work: Train =
        serde_json::from_str(spec).map_err(|e| Error::failed(format!("what it needs is damaged: {e}")))?;
    if !work.folder.is_dir() {
        return Err(Error::failed(format!("{}: its folder is missing", work.folder.display())));
    }
    daemon.resume_training(entry.id.clone(), entry.uid, &entry.priority, work)?;
    tracing::info!("job {}: the training of {:?} goes on", entry.id, entry.description);
    Ok(())
}
