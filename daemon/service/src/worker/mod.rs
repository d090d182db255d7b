//! The worker: one thread that owns the device, its models and what is merged into them. It runs jobs one after another;
//! between two steps of a job it lets those with a higher priority go first, and puts everything back as it was.

mod aside;
mod bake;
mod cache;
mod generate;
mod resident;
mod train;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use blocklora_engine::merge::MergeReport;

use crate::daemon::Daemon;
use crate::dbus::value::{Dict, dict, own};
use crate::error::{Error, Kind, Result};
use crate::jobs::queue::{Control, Next};
use crate::jobs::work::{Set, Work};
use crate::jobs::{Job, ResultFile};
use crate::memfd;
use crate::plugins::artefacts::Artefacts;
use crate::plugins::stop;
use resident::Residents;

/// How often the worker looks for models to unload when nothing else happens.
const IDLE_LOOK: Duration = Duration::from_secs(1);

/// What a job gives: details, and files.
type Outcome = Result<(Dict, Vec<ResultFile>)>;

/// The thread's state.
struct Worker {
    daemon: Arc<Daemon>,
    residents: Residents,
}

/// Starts the worker's thread. It ends when the queue stops.
pub fn start(daemon: Arc<Daemon>) -> std::io::Result<std::thread::JoinHandle<()>> {
    let builder = std::thread::Builder::new().name(format!("device-{}", daemon.device.name));
    builder.spawn(move || {
        let residents = Residents::new(daemon.clone());
        Worker { daemon, residents }.serve();
    })
}

/// Where a job that is at a step stands: what must be merged when it goes on.
struct Restore<'a> {
    model: &'a str,
    set: &'a Set,
}

impl Worker {
    fn serve(&mut self) {
        loop {
            match self.daemon.queue.next(IDLE_LOOK) {
                Next::Job(job) => self.run(&job),
                Next::Control(control) => self.control(control),
                Next::Idle => {}
                Next::Stop => break,
            }
            self.residents.unload_idle();
        }
    }

    /// Runs a job to its end.
    fn run(&mut self, job: &Arc<Job>) {
        if job.stop_requested().is_some() {
            self.daemon.drop_waiting(job);
            return self.daemon.queue.noted();
        }
        let taken = job.work.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        let Some(work) = taken else { return self.daemon.queue.noted() };
        job.start();
        self.daemon.set_running(job, true);
        self.daemon.queue.noted();
        let artefacts = Arc::new(match &work {
            // A training goes on after its process.
            Work::Train(train) => Artefacts::in_folder(train.folder.join("artefacts")),
            _ => Artefacts::default(),
        });
        let stop = {
            let job = job.clone();
            Arc::new(move || job.stop_requested().is_some())
        };
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            let done = stop::during(stop, || artefacts.during(|| self.execute(job, work)))?;
            done.map(|done| with_artefacts(done, &artefacts)).transpose()
        }));
        let outcome = match outcome {
            // It goes on beside the device.
            Ok(Ok(None)) => return,
            Ok(Ok(Some(done))) => Ok(done),
            Ok(Err(error)) => Err(error),
            Err(_) => {
                // What is merged into the models may be anything.
                self.residents.clear();
                Err(Error::failed("a bug in the engine or a method ended the job, see the daemon's log"))
            }
        };
        settle(&self.daemon, job, outcome);
    }

    fn execute(&mut self, job: &Arc<Job>, work: Work) -> Result<Option<(Dict, Vec<ResultFile>)>> {
        for entry in work.set().iter().flat_map(|set| &set.entries) {
            // Its factors may be in memory still; whoever took it out of the library did not mean that.
            self.daemon.find_adapter(&entry.digest).map_err(|error| match error.kind {
                Kind::AdapterNotFound => {
                    let message =
                        format!("adapter {:?} ({:.12}) was removed before the job began", entry.name, entry.digest);
                    Error::new(Kind::AdapterNotFound, message)
                }
                _ => error,
            })?;
        }
        let model = work.model().map(str::to_owned);
        if let Some(model) = &model {
            self.residents.hold(job, model, work.precision())?;
        }
        let done = match work {
            Work::Generate(work) => self.generate(job, &work).map(Some),
            Work::Train(work) => self.train(job, &work).map(Some),
            Work::Merge { model, set, composition, .. } => self.merge(job, &model, &set, &composition).map(Some),
            Work::Bake { model, set, out } => self.bake(job, &model, &set, out).map(|()| None),
            Work::LoadModel { model, .. } => self.loaded(job, &model).map(Some),
            Work::ValidateLibrary => aside::validate_library(&self.daemon, job).map(|()| None),
            Work::ValidatePlugin { id, level } => aside::validate_plugin(&self.daemon, job, id, level).map(|()| None),
            Work::Empty => Ok(Some(Default::default())),
        };
        if let Some(model) = &model {
            self.residents.release(model);
        }
        done
    }

    fn merge(&mut self, job: &Arc<Job>, model: &str, set: &Set, composition: &str) -> Outcome {
        job.set_stage("merging");
        let report = self.residents.apply(model, set)?;
        let details = dict([
            ("composition", own(zbus::Variant::from(crate::objects::object_path(composition)))),
            ("rows_rewritten", own(report.rows_rewritten)),
            ("bytes_written", own(report.bytes_written)),
            ("layers_touched", own(report.layers_touched as u32)),
            ("usec", own(usec_of(&report))),
        ]);
        Ok((details, Vec::new()))
    }

    fn loaded(&mut self, job: &Arc<Job>, model: &str) -> Outcome {
        let object = self.daemon.model(model)?;
        let bytes = object.state().loaded.as_ref().map_or(0, |(_, _, bytes)| *bytes);
        let started = job.status(|s| s.started_usec);
        let details = dict([
            ("model", own(zbus::Variant::from(crate::objects::object_path(&object.object_path())))),
            ("resident_bytes", own(bytes)),
            ("usec", own(crate::jobs::now_usec().saturating_sub(started))),
        ]);
        Ok((details, Vec::new()))
    }

    fn control(&mut self, control: Control) {
        // Whoever asked may have gone.
        match control {
            Control::Reclaim { bytes, reply } => drop(reply.send(self.residents.reclaim(bytes))),
            Control::Unload { model, reply } => drop(reply.send(self.residents.unload(&model))),
            Control::Suspend { reply, until } => {
                self.daemon.set_device_state("suspended", "the machine goes to sleep");
                let _ = reply.send(());
                // The other end is dropped when the machine is awake again.
                let _ = until.recv();
                self.daemon.set_device_state("ready", "");
            }
        }
    }

    /// Between two steps of `job`: whether it is to end, what was asked for in between, and one job that goes first.
    fn pause(&mut self, job: &Arc<Job>, restore: &Restore) -> Result<()> {
        if job.stop_requested().is_some() {
            return Err(job.stop_error());
        }
        while let Some(control) = self.daemon.queue.next_control() {
            self.control(control);
        }
        let residents = &self.residents;
        let runnable = |other: &Job| {
            let work = other.work.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let is_free = |work: &Work| work.model().is_none_or(|model| residents.is_free(model, work.precision()));
            work.as_ref().is_some_and(is_free)
        };
        // One at a time: under constant load this job still gets every other turn.
        if let Some(first) = self.daemon.queue.next_above(job.priority, runnable) {
            let since = Instant::now();
            let stage = job.status(|s| s.stage);
            job.set_stage("yielding");
            self.run(&first);
            if !self.residents.has(restore.model) {
                let message =
                    "a job in between ended by a bug, and what was merged may be anything: start this one again";
                return Err(Error::failed(message));
            }
            self.residents.apply(restore.model, restore.set)?;
            job.set_stage(stage);
            job.add_lent(since.elapsed());
            if job.stop_requested().is_some() {
                return Err(job.stop_error());
            }
        }
        Ok(())
    }
}

/// What a job gives, with what plugins handed over meanwhile behind its own files.
fn with_artefacts((details, mut files): (Dict, Vec<ResultFile>), artefacts: &Artefacts) -> Outcome {
    for (name, bytes) in artefacts.take() {
        let info = dict([
            ("media_type", own("application/octet-stream")),
            ("format", own("artefact")),
            ("name", own(name.clone())),
        ]);
        files.push(result_file("artefact", &name, &bytes, info)?);
    }
    Ok((details, files))
}

/// A file in sealed memory.
fn result_file(format: &'static str, name: &str, bytes: &[u8], mut info: Dict) -> Result<ResultFile> {
    let size = bytes.len() as u64;
    info.insert("size".to_owned(), own(size));
    Ok(ResultFile { fd: memfd::sealed(name, bytes)?, size, format, info })
}

/// Tells what came of a job.
fn settle(daemon: &Arc<Daemon>, job: &Arc<Job>, outcome: Outcome) {
    match outcome {
        Ok((details, files)) => daemon.finish(job, Ok(details), files),
        // Work only knows that it was to end.
        Err(error) if error.kind == Kind::Cancelled && job.stop_requested().is_some() => {
            daemon.finish(job, Err(job.stop_error()), Vec::new());
        }
        Err(error) => daemon.finish(job, Err(error), Vec::new()),
    }
    // Until its end is known a daemon that stops waits for it.
    daemon.set_running(job, false);
}

/// Microseconds that a merge took.
fn usec_of(report: &MergeReport) -> u64 {
    (report.seconds * 1e6) as u64
}

/// Microseconds since `start`.
fn usec_since(start: Instant) -> u64 {
    u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX)
}
