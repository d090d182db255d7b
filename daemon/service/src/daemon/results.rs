//! What is kept of finished jobs, and for how long.

use std::sync::Arc;

use super::{Daemon, descriptors};
use crate::error::{Error, Kind, Result};
use crate::jobs::{Job, now_usec};

impl Daemon {
    /// Makes room for `wanted` more files of results among those that may be open: the oldest finished jobs go, and what
    /// can never be kept is refused.
    pub fn reserve_files(&self, job: &Job, wanted: usize) -> Result<()> {
        let most = descriptors::for_results();
        if wanted > most {
            let message = format!(
                "{wanted} files of results are more than the {most} that may be kept open ({}); ask for fewer pictures, or \
                 for one format",
                descriptors::CURE
            );
            return Err(Error::new(Kind::NotSupported, message));
        }
        job.reserve_files(wanted);
        self.expire_jobs();
        Ok(())
    }

    /// Takes finished jobs that are kept no longer out of the objects: what is too old, and the oldest of what is too much.
    pub fn expire_jobs(&self) {
        let jobs = self.config().jobs.clone();
        let mut finished: Vec<Arc<Job>> =
            self.jobs().into_iter().filter(|j| j.status(|s| s.state.is_final())).collect();
        finished.sort_by_key(|job| job.status(|s| s.finished_usec));
        let mut bytes: u64 = finished.iter().map(|job| job.result_bytes()).sum();
        let mut count = finished.len();
        let most_files = descriptors::for_results();
        let mut files = finished.iter().map(|job| job.result_files()).sum::<usize>()
            + self.running().iter().map(|job| job.reserved_files()).sum::<usize>();
        let oldest = now_usec().saturating_sub(jobs.results_keep_sec.saturating_mul(1_000_000));
        for job in finished {
            let old = job.status(|s| s.finished_usec) < oldest;
            let fits = count <= jobs.results_keep_max && bytes <= jobs.results_keep_bytes && files <= most_files;
            if !old && fits {
                break;
            }
            // They may be taken meanwhile.
            bytes = bytes.saturating_sub(job.result_bytes());
            files = files.saturating_sub(job.result_files());
            count -= 1;
            self.remove_object(&job.path);
        }
    }
}
