//! The control loop: ends of jobs, changes of properties, positions, history, what expires, and the watchdog. Whatever
//! may take long is done elsewhere, so that a watchdog which is not served means that the daemon hangs.

use std::sync::Arc;
use std::time::{Duration, Instant};

use sd_notify::NotifyState;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::catalogue::jobs::JobEntry;
use crate::daemon::Daemon;
use crate::dbus::value::{Dict, dict, own};
use crate::jobs::{Job, State, Stop};
use crate::life::recover;
use crate::objects::Object;

/// How often changes are told: progress comes at most ten times a second.
const TICK: Duration = Duration::from_millis(100);
/// How often it is looked for plugins, in ticks.
const PLUGINS: u64 = 20;
/// Finished jobs that wait to be written into the history, at most.
const PENDING_MAX: usize = 10_000;

/// Runs until `finished` closes or the daemon is told to end.
pub async fn run(daemon: Arc<Daemon>, mut finished: mpsc::UnboundedReceiver<Arc<Job>>) {
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let watchdog = sd_notify::watchdog_enabled().map(|timeout| timeout / 3);
    let mut last_ping = Instant::now();
    let mut ticks = 0u64;
    let (mut opening, mut looking): (Option<JoinHandle<()>>, Option<JoinHandle<()>>) = (None, None);
    let mut history = History { daemon: daemon.clone(), pending: Vec::new(), writing: None };
    loop {
        tokio::select! {
            job = finished.recv() => match job {
                Some(job) => {
                    announce(&daemon, &job);
                    history.add(&job);
                }
                None => break,
            },
            _ = tick.tick() => {
                ticks += 1;
                daemon.tell_all();
                if ticks.is_multiple_of(5) {
                    daemon.queue.update_positions();
                }
                if ticks.is_multiple_of(10) {
                    daemon.expire_jobs();
                    stop_overdue(&daemon);
                    history.write().await;
                    if daemon.catalogue.is_volatile() && opening.as_ref().is_none_or(|opening| opening.is_finished()) {
                        let daemon = daemon.clone();
                        opening = Some(tokio::task::spawn_blocking(move || recover::late(&daemon)));
                    }
                    if ticks.is_multiple_of(PLUGINS) && looking.as_ref().is_none_or(|looking| looking.is_finished()) {
                        let daemon = daemon.clone();
                        looking = Some(tokio::task::spawn_blocking(move || daemon.look_for_plugins()));
                    }
                    let idle = daemon.config().daemon.exit_when_idle_sec;
                    if idle > 0 && daemon.idle_for().as_secs() >= idle {
                        tracing::info!("nobody needed the daemon for {idle} s: it ends");
                        daemon.request_stop();
                    }
                }
                if watchdog.is_some_and(|every| last_ping.elapsed() >= every) {
                    last_ping = Instant::now();
                    // Without a manager there is nobody to tell.
                    let _ = sd_notify::notify(&[NotifyState::Watchdog]);
                }
            }
        }
        if daemon.is_stopping() && daemon.queue.is_over() && daemon.running().is_empty() && finished.is_empty() {
            break;
        }
    }
    while let Ok(job) = finished.try_recv() {
        announce(&daemon, &job);
        history.add(&job);
    }
    daemon.tell_all();
    history.finish().await;
}

/// A job's last signals, in order; then those who wait for it go on.
fn announce(daemon: &Daemon, job: &Arc<Job>) {
    job.take_dirty();
    daemon.tell(&job.path);
    let (result, details) = match job.outcome() {
        Some(Ok(details)) => ("done", details),
        Some(Err(error)) => {
            let result = if job.status(|s| s.state == State::Cancelled) { "cancelled" } else { "failed" };
            (result, dict([("error", own(error.name())), ("message", own(error.message))]))
        }
        None => ("failed", Dict::new()),
    };
    daemon.hub.finished(&job.path, &Object::Job(job.clone()), result, &details);
    job.announce();
}

/// Jobs that wait longer than their time.
fn stop_overdue(daemon: &Arc<Daemon>) {
    let overdue = daemon.queue.remove_all(|job| job.stop_requested() == Some(Stop::TimedOut));
    if !overdue.is_empty() {
        let daemon = daemon.clone();
        // The end of a training is written to the disk.
        tokio::task::spawn_blocking(move || overdue.iter().for_each(|job| daemon.drop_waiting(job)));
    }
}

/// Writes the history beside the loop, many jobs at once.
struct History {
    daemon: Arc<Daemon>,
    pending: Vec<JobEntry>,
    writing: Option<JoinHandle<Result<(), Vec<JobEntry>>>>,
}

impl History {
    fn add(&mut self, job: &Job) {
        // A training that goes on in the next daemon has not ended; one that has ended is written by its worker.
        if job.kind == "train" {
            return;
        }
        self.pending.push(JobEntry::of(job));
        if self.pending.len() > PENDING_MAX {
            self.pending.remove(0);
        }
    }

    async fn write(&mut self) {
        if let Some(writing) = self.writing.take_if(|writing| writing.is_finished()) {
            self.keep(writing.await);
        }
        if self.writing.is_none() && !self.pending.is_empty() {
            let (daemon, jobs) = (self.daemon.clone(), std::mem::take(&mut self.pending));
            self.writing = Some(tokio::task::spawn_blocking(move || {
                let most = daemon.config().jobs.history_max;
                daemon.catalogue.put_jobs(&jobs, most).map_err(|error| {
                    tracing::warn!("the history of jobs cannot be written, it is tried again: {error}");
                    jobs
                })
            }));
        }
    }

    /// What could not be written is tried again.
    fn keep(&mut self, result: Result<Result<(), Vec<JobEntry>>, tokio::task::JoinError>) {
        if let Ok(Err(mut jobs)) = result {
            jobs.append(&mut self.pending);
            self.pending = jobs;
        }
    }

    async fn finish(mut self) {
        if let Some(writing) = self.writing.take() {
            self.keep(writing.await);
        }
        self.write().await;
        if let Some(writing) = self.writing.take() {
            self.keep(writing.await);
        }
    }
}
