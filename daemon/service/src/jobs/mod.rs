//! Jobs: what was asked for, how far it is, and what came of it.

pub mod previews;
pub mod queue;
pub mod work;

use std::borrow::Cow;
use std::os::fd::OwnedFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::sync::watch;

use crate::cut::{TEXT_BYTES_MAX, cut};
use crate::dbus::value::{Dict, clone_dict};
use crate::error::{Error, Kind, Result};
use previews::Previews;
use work::{Held, Work};

/// Microseconds since 1970.
pub fn now_usec() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| u64::try_from(d.as_micros()).unwrap_or(u64::MAX))
}

/// Who goes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Priority {
    /// Long work that yields to everything.
    Background,
    /// Work that nobody stares at.
    Normal,
    /// Somebody waits for it.
    Interactive,
}

impl Priority {
    /// Its name in the interface.
    pub fn name(self) -> &'static str {
        match self {
            Self::Background => "background",
            Self::Normal => "normal",
            Self::Interactive => "interactive",
        }
    }
    /// The priority called `name`.
    pub fn from_name(name: &str) -> Result<Self> {
        let all = [Self::Background, Self::Normal, Self::Interactive];
        let unknown =
            || Error::option(format!("option \"priority\": {name:?} is not interactive, normal or background"));
        all.into_iter().find(|p| p.name() == name).ok_or_else(unknown)
    }
}

/// What ends an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lifetime {
    /// The end of the connection that made it.
    Connection,
    /// Nothing but its own end.
    Daemon,
}

impl Lifetime {
    /// Its name in the interface.
    pub fn name(self) -> &'static str {
        match self {
            Self::Connection => "connection",
            Self::Daemon => "daemon",
        }
    }
    /// The lifetime called `name`; `key` names it in errors.
    pub fn from_name(key: &str, name: &str) -> Result<Self> {
        let all = [Self::Connection, Self::Daemon];
        let unknown = || Error::option(format!("option {key:?}: {name:?} is not connection or daemon"));
        all.into_iter().find(|l| l.name() == name).ok_or_else(unknown)
    }
}

/// Who asked for something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// The connection, by its unique name; empty for the daemon itself.
    pub client: String,
    /// The user.
    pub uid: u32,
}

/// What the method that makes a job says about it.
#[derive(Clone, Debug)]
pub struct Ticket {
    /// Who asked.
    pub owner: Owner,
    /// Who goes first.
    pub priority: Priority,
    /// What ends it.
    pub lifetime: Lifetime,
    /// Chosen by the caller for the object's path.
    pub token: Option<String>,
    /// After this time it fails.
    pub timeout: Option<Duration>,
    /// When it was asked for, microseconds since 1970; none: now.
    pub created_usec: Option<u64>,
}

/// Where a job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Waiting.
    Queued,
    /// On a device.
    Running,
    /// Ended well.
    Done,
    /// Ended with an error.
    Failed,
    /// Ended by a caller.
    Cancelled,
}

impl State {
    /// Its name in the interface.
    pub fn name(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
    /// Whether nothing more will happen.
    pub fn is_final(self) -> bool {
        !matches!(self, Self::Queued | Self::Running)
    }
}

/// Why a job is to end early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Cancelled; nothing is kept.
    Discard,
    /// Cancelled; a training keeps its checkpoint.
    Checkpoint,
    /// Its time is over.
    TimedOut,
    /// The daemon ends: a training is continued by the next one.
    Shutdown,
}

/// How far a job is.
#[derive(Debug)]
pub struct Status {
    /// Where it is.
    pub state: State,
    /// What it is doing.
    pub stage: &'static str,
    /// 0..1, if that is known.
    pub progress: Option<f64>,
    /// Steps done and in all.
    pub step: (u32, u32),
    /// 1 is next; 0: not queued.
    pub queue_position: u32,
    /// Microseconds since 1970; 0: not yet.
    pub started_usec: u64,
    /// Likewise.
    pub finished_usec: u64,
    /// Likewise; 0: unknown.
    pub expected_end_usec: u64,
    /// A training's last loss.
    pub loss: Option<f32>,
    outcome: Option<Result<Dict>>,
    /// When sampling or training began, how many steps were done then, and the time lent to others since.
    pace: Option<(Instant, u32, Duration)>,
}

/// A file of a finished job.
#[derive(Debug)]
pub struct ResultFile {
    /// The file.
    pub fd: OwnedFd,
    /// Its bytes.
    pub size: u64,
    /// "raw" and "png" for pictures; else empty.
    pub format: &'static str,
    /// What the interface says about it.
    pub info: Dict,
}

/// A job.
pub struct Job {
    /// Unique over all runs of the daemon.
    pub id: String,
    /// Its object path.
    pub path: String,
    /// What it does, as in the interface.
    pub kind: &'static str,
    /// Who asked.
    pub owner: Owner,
    /// Who goes first.
    pub priority: Priority,
    /// What ends it.
    pub lifetime: Lifetime,
    /// For people, and not as long as a prompt may be.
    pub description: String,
    /// When it was asked for.
    pub created_usec: u64,
    /// Likewise, by a clock that nobody sets.
    pub created: Instant,
    /// When it is over in any case.
    pub deadline: Option<Instant>,
    /// What the worker needs; taken when it starts.
    pub work: Mutex<Option<Work>>,
    /// What a training holds until it is over, however it ends.
    pub held: Option<Held>,
    /// The path of the composition that a merging is about: it is of no use where that fails.
    pub composition: Option<String>,
    /// Where previews go.
    pub previews: Previews,
    status: Mutex<Status>,
    results: Mutex<Vec<ResultFile>>,
    /// How many files it will have, for as long as it runs.
    reserved_files: AtomicUsize,
    stop: AtomicU8,
    dirty: AtomicBool,
    done: watch::Sender<bool>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // Nothing that holds these locks can leave a value half-changed.
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Job {
    /// A job that waits.
    pub fn new(id: String, path: String, ticket: &Ticket, work: Work) -> Self {
        Self {
            id,
            path,
            kind: work.kind(),
            owner: ticket.owner.clone(),
            priority: ticket.priority,
            lifetime: ticket.lifetime,
            description: cut(&work.description(), TEXT_BYTES_MAX).into_owned(),
            created_usec: ticket.created_usec.unwrap_or_else(now_usec),
            created: Instant::now(),
            deadline: ticket.timeout.and_then(|span| Instant::now().checked_add(span)),
            held: work.held(),
            composition: work.composition(),
            work: Mutex::new(Some(work)),
            previews: Previews::default(),
            status: Mutex::new(Status {
                state: State::Queued,
                stage: "queued",
                progress: None,
                step: (0, 0),
                queue_position: 0,
                started_usec: 0,
                finished_usec: 0,
                expected_end_usec: 0,
                loss: None,
                outcome: None,
                pace: None,
            }),
            results: Mutex::default(),
            reserved_files: AtomicUsize::new(0),
            stop: AtomicU8::new(0),
            dirty: AtomicBool::new(true),
            done: watch::Sender::new(false),
        }
    }

    /// Reads its status.
    pub fn status<T>(&self, read: impl FnOnce(&Status) -> T) -> T {
        read(&lock(&self.status))
    }

    fn change(&self, change: impl FnOnce(&mut Status)) {
        change(&mut lock(&self.status));
        self.dirty.store(true, Ordering::Release);
    }

    /// Whether something changed since the last call.
    pub fn take_dirty(&self) -> bool {
        self.dirty.swap(false, Ordering::AcqRel)
    }

    /// Its place in the queue.
    pub fn set_queue_position(&self, position: u32) {
        if self.status(|s| s.queue_position != position && s.state == State::Queued) {
            self.change(|s| s.queue_position = position);
        }
    }

    /// It runs now.
    pub fn start(&self) {
        self.change(|s| {
            (s.state, s.queue_position, s.started_usec) = (State::Running, 0, now_usec());
        });
    }

    /// What it is doing.
    pub fn set_stage(&self, stage: &'static str) {
        if self.status(|s| s.stage != stage) {
            self.change(|s| s.stage = stage);
        }
    }

    /// `done` of `total` steps are done; `loss` of a training. The expected end follows from the pace so far.
    pub fn set_step(&self, done: u32, total: u32, loss: Option<f32>) {
        self.change(|s| {
            if total != s.step.1 || done < s.step.0 {
                // Steps of another kind have a pace of their own.
                s.pace = None;
            }
            s.step = (done, total);
            s.loss = loss.or(s.loss);
            s.progress = (total > 0).then(|| f64::from(done) / f64::from(total));
            let &mut (since, first, lent) = s.pace.get_or_insert((Instant::now(), done, Duration::ZERO));
            let steps = done.saturating_sub(first);
            if steps > 0 {
                let pace = since.elapsed().saturating_sub(lent) / steps;
                let left = pace * total.saturating_sub(done);
                s.expected_end_usec = now_usec().saturating_add(u64::try_from(left.as_micros()).unwrap_or(0));
            }
        });
    }

    /// It let others run for `span`.
    pub fn add_lent(&self, span: Duration) {
        self.change(|s| {
            if let Some((_, _, lent)) = &mut s.pace {
                *lent += span;
            }
        });
    }

    /// Asks it to end. The first reason stands.
    pub fn request_stop(&self, stop: Stop) {
        let code = match stop {
            Stop::Discard => 1,
            Stop::Checkpoint => 2,
            Stop::TimedOut => 3,
            Stop::Shutdown => 4,
        };
        let _ = self.stop.compare_exchange(0, code, Ordering::AcqRel, Ordering::Acquire);
    }

    /// Why it is to end, if it is.
    pub fn stop_requested(&self) -> Option<Stop> {
        match self.stop.load(Ordering::Acquire) {
            0 if self.deadline.is_some_and(|deadline| Instant::now() >= deadline) => Some(Stop::TimedOut),
            0 => None,
            1 => Some(Stop::Discard),
            2 => Some(Stop::Checkpoint),
            3 => Some(Stop::TimedOut),
            _ => Some(Stop::Shutdown),
        }
    }

    /// The error that a stopped job ends with.
    pub fn stop_error(&self) -> Error {
        match self.stop_requested() {
            Some(Stop::TimedOut) => Error::new(Kind::TimedOut, "the job's timeout_usec passed before it had finished"),
            Some(Stop::Shutdown) => Error::new(Kind::ShuttingDown, "the daemon stopped before the job had finished"),
            _ => Error::cancelled(),
        }
    }

    /// Whether the next daemon goes on with it: a training that this daemon's end interrupts.
    pub fn goes_on(&self) -> bool {
        self.kind == "train"
            && self.lifetime == Lifetime::Daemon
            && self.stop_requested() == Some(Stop::Shutdown)
            && self.status(|s| s.state != State::Done)
    }

    /// It has ended. Only the first end counts; whether this was it.
    pub fn finish(&self, mut outcome: Result<Dict>, results: Vec<ResultFile>) -> bool {
        if let Err(error) = &mut outcome
            && let Cow::Owned(shorter) = cut(&error.message, TEXT_BYTES_MAX)
        {
            error.message = shorter;
        }
        let mut status = lock(&self.status);
        if status.state.is_final() {
            return false;
        }
        status.state = match &outcome {
            Ok(_) => State::Done,
            Err(e) if e.kind == Kind::Cancelled => State::Cancelled,
            Err(_) => State::Failed,
        };
        if outcome.is_ok() && status.progress.is_some() {
            status.progress = Some(1.0);
        }
        (status.stage, status.queue_position, status.expected_end_usec) = ("finished", 0, 0);
        status.finished_usec = now_usec();
        status.outcome = Some(outcome);
        *lock(&self.results) = results;
        // They are counted as kept from here on.
        self.reserve_files(0);
        drop(status);
        lock(&self.work).take();
        self.dirty.store(true, Ordering::Release);
        self.previews.close();
        true
    }

    /// What came of it, once it has ended.
    pub fn outcome(&self) -> Option<Result<Dict>> {
        self.status(|s| match s.outcome.as_ref()? {
            Ok(details) => Some(Ok(clone_dict(details))),
            Err(error) => Some(Err(error.clone())),
        })
    }

    /// Lets those who wait for its end go on; called when its last signals are on their way.
    pub fn announce(&self) {
        self.done.send_replace(true);
    }

    /// Waits until [`Self::announce`].
    pub async fn wait(&self) {
        let mut done = self.done.subscribe();
        // The sender lives as long as the job.
        let _ = done.wait_for(|done| *done).await;
    }

    /// Its files: of those of `formats` (all if empty) at most `limit` behind the first `offset`, removed unless `keep`.
    pub fn take_results(
        &self,
        keep: bool,
        formats: &[String],
        offset: usize,
        limit: usize,
    ) -> Result<Vec<(OwnedFd, Dict)>> {
        let mut results = lock(&self.results);
        let wanted = |file: &ResultFile| formats.is_empty() || formats.iter().any(|f| f == file.format);
        let places = (0..results.len()).filter(|&place| wanted(&results[place]));
        let places: Vec<usize> = places.skip(offset).take(limit).collect();
        let mut taken = Vec::with_capacity(places.len());
        for &place in &places {
            let fd = results[place].fd.try_clone().map_err(|e| Error::io("result", &e))?;
            taken.push((fd, clone_dict(&results[place].info)));
        }
        if !keep {
            for &place in places.iter().rev() {
                results.remove(place);
            }
        }
        Ok(taken)
    }

    /// Its files that are kept.
    pub fn result_files(&self) -> usize {
        lock(&self.results).len()
    }

    /// Notes how many files it will have.
    pub fn reserve_files(&self, files: usize) {
        self.reserved_files.store(files, Ordering::Release);
    }

    /// How many files it will have, if that is known.
    pub fn reserved_files(&self) -> usize {
        self.reserved_files.load(Ordering::Acquire)
    }

    /// Bytes of its files.
    pub fn result_bytes(&self) -> u64 {
        lock(&self.results).iter().map(|file| file.size).sum()
    }
}
