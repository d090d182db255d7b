//! Work that needs no device: it goes on beside whatever the device does.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use zbus::Variant;

use super::{Outcome, settle};
use crate::catalogue::adapters::Filter;
use crate::daemon::Daemon;
use crate::dbus::library::show_found;
use crate::dbus::value::{dict, own};
use crate::error::{Error, Result};
use crate::jobs::Job;

/// Runs `work` for `job` in a thread of its own, to the job's end.
pub fn spawn(daemon: &Arc<Daemon>, job: &Arc<Job>, work: impl FnOnce(&Job) -> Outcome + Send + 'static) -> Result<()> {
    let (daemon, job) = (daemon.clone(), job.clone());
    let run = move || {
        let outcome = catch_unwind(AssertUnwindSafe(|| work(&job)));
        let outcome = outcome.unwrap_or_else(|_| Err(Error::failed("a bug in the daemon, see its log")));
        settle(&daemon, &job, outcome);
    };
    let thread = std::thread::Builder::new().name("aside".to_owned()).spawn(run);
    thread.map(drop).map_err(|e| Error::io("cannot start a thread", &e))
}

/// Reads every file of the library again.
pub fn validate_library(daemon: &Arc<Daemon>, job: &Arc<Job>) -> Result<()> {
    let library = daemon.clone();
    spawn(daemon, job, move |job| {
        job.set_stage("checking");
        let total = library.catalogue.count_adapters(&Filter::default())?;
        let (mut checked, mut problems) = (0u64, Vec::new());
        loop {
            let page = library.catalogue.adapters(&Filter::default(), checked as u32, 100)?;
            if page.is_empty() {
                break;
            }
            for entry in page {
                if job.stop_requested().is_some() {
                    return Err(job.stop_error());
                }
                let opened = library.catalogue.open_adapter(&entry.digest);
                show_found(&library, &entry.digest);
                if let Err(error) = opened {
                    let state = library.catalogue.find_adapter(&entry.digest).map_or(entry.state, |e| e.state);
                    problems.push((entry.digest, state, error.message));
                }
                checked += 1;
                job.set_step(checked as u32, total as u32, None);
            }
        }
        let details = dict([("checked", own(checked)), ("problems", own(Variant::from(problems)))]);
        Ok((details, Vec::new()))
    })
}

/// Runs a plugin's conformance tests, which have processes of their own.
pub fn validate_plugin(daemon: &Arc<Daemon>, job: &Arc<Job>, id: String, level: u32) -> Result<()> {
    let methods = daemon.methods.clone();
    spawn(daemon, job, move |job| {
        job.set_stage("checking");
        let report = methods.validate(&id, level, &|| job.stop_requested().is_some());
        if job.stop_requested().is_some() {
            return Err(job.stop_error());
        }
        Ok((dict([("report", own(report?))]), Vec::new()))
    })
}
