//! The one queue: bounded, by priority, fair between clients.
//!
//! A job below the highest priority that has waited for `jobs.wait_max_sec` is overdue: it goes next, whatever else
//! waits. Once it runs, others go first between its steps, one at a time, so that both go on under constant load.

use std::cmp::Reverse;
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::{Job, Priority};
use crate::error::{Error, Kind, Result};

/// What the worker is asked to do between two steps of whatever it does.
pub enum Control {
    /// Free memory on a device; the answer is the number of bytes.
    Reclaim {
        /// How many; 0: all that can be freed.
        bytes: u64,
        /// Who gets the answer.
        reply: oneshot::Sender<u64>,
    },
    /// Free one model.
    Unload {
        /// Its id.
        model: String,
        /// Who gets the answer.
        reply: oneshot::Sender<Result<()>>,
    },
    /// The machine goes to sleep: nothing runs until `until` is dropped.
    Suspend {
        /// Answered when the device is at rest.
        reply: oneshot::Sender<()>,
        /// Closed when the machine is awake again.
        until: std::sync::mpsc::Receiver<()>,
    },
}

/// What the worker gets.
pub enum Next {
    /// A job to run.
    Job(Arc<Job>),
    /// Something to do in between.
    Control(Control),
    /// Nothing came for the time given.
    Idle,
    /// The daemon ends.
    Stop,
}

/// How many may wait.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// In all.
    pub all: usize,
    /// Of one client.
    pub per_client: usize,
}

impl Limits {
    /// For what was accepted before: a promise is kept, however many wait.
    pub const NONE: Self = Self { all: usize::MAX, per_client: usize::MAX };
}

#[derive(Default)]
struct Inner {
    /// In the order of arrival.
    waiting: Vec<Arc<Job>>,
    /// By client the turn at which it was served last: the one who waits longest comes next.
    served: HashMap<String, u64>,
    turn: u64,
    control: VecDeque<Control>,
    /// Jobs that were taken, and are not yet known to run or to have ended.
    taken: usize,
    stopping: bool,
    /// How long a job waits for those of a higher priority; none: for ever.
    wait_max: Option<Duration>,
}

/// Jobs that wait, between the control plane and the worker. No lock is held longer than a look at the list takes.
#[derive(Default)]
pub struct Queue {
    inner: Mutex<Inner>,
    changed: Condvar,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a job.
    pub fn push(&self, job: Arc<Job>, limits: Limits) -> Result<()> {
        let mut inner = self.lock();
        if inner.stopping {
            return Err(Error::new(Kind::ShuttingDown, "the daemon is stopping and takes no new work"));
        }
        if inner.waiting.len() >= limits.all {
            let message = format!("{} jobs are waiting already; try again later", limits.all);
            return Err(Error::new(Kind::QueueFull, message));
        }
        let own = inner.waiting.iter().filter(|other| other.owner.client == job.owner.client).count();
        if own >= limits.per_client {
            let message = format!("{own} jobs of this client are waiting already; wait for some of them");
            return Err(Error::new(Kind::QueueFull, message));
        }
        inner.waiting.push(job.clone());
        // At once: one that waits has a place. Those behind it learn of theirs with the next look at all.
        job.set_queue_position(inner.position(&job.id));
        self.changed.notify_all();
        Ok(())
    }

    /// How long a job waits for those of a higher priority, from now on; zero: for ever.
    pub fn set_wait_max(&self, span: Duration) {
        self.lock().wait_max = (!span.is_zero()).then_some(span);
    }

    /// Asks the worker for something in between.
    pub fn control(&self, control: Control) {
        self.lock().control.push_back(control);
        self.changed.notify_all();
    }

    /// Takes a waiting job out.
    pub fn remove(&self, id: &str) -> Option<Arc<Job>> {
        let mut inner = self.lock();
        let at = inner.waiting.iter().position(|job| job.id == id)?;
        Some(inner.waiting.remove(at))
    }

    /// Takes the waiting jobs out for which `which` holds.
    pub fn remove_all(&self, which: impl Fn(&Job) -> bool) -> Vec<Arc<Job>> {
        let mut inner = self.lock();
        let (out, kept) = std::mem::take(&mut inner.waiting).into_iter().partition(|job| which(job));
        inner.waiting = kept;
        out
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.lock().waiting.len()
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The worker ends as soon as it may; waiting jobs stay for the caller to settle.
    pub fn stop(&self) {
        self.lock().stopping = true;
        self.changed.notify_all();
    }

    /// A job that was taken is known to run, or has ended.
    pub fn noted(&self) {
        let mut inner = self.lock();
        inner.taken = inner.taken.saturating_sub(1);
    }

    /// Whether [`Self::stop`] was called, and nothing that was taken before is under way unnoticed.
    pub fn is_over(&self) -> bool {
        let inner = self.lock();
        inner.stopping && inner.taken == 0
    }

    /// Waits at most `patience` for something to do.
    pub fn next(&self, patience: Duration) -> Next {
        let mut inner = self.lock();
        loop {
            if let Some(control) = inner.control.pop_front() {
                return Next::Control(control);
            }
            if inner.stopping {
                return Next::Stop;
            }
            if let Some(job) = inner.take(|_| true) {
                return Next::Job(job);
            }
            let (guard, timeout) = self.changed.wait_timeout(inner, patience).unwrap_or_else(PoisonError::into_inner);
            inner = guard;
            if timeout.timed_out() {
                return Next::Idle;
            }
        }
    }

    /// Without waiting: something in between, if there is.
    pub fn next_control(&self) -> Option<Control> {
        self.lock().control.pop_front()
    }

    /// Without waiting: the next job above `priority` for which `eligible` holds.
    pub fn next_above(&self, priority: Priority, eligible: impl Fn(&Job) -> bool) -> Option<Arc<Job>> {
        let mut inner = self.lock();
        if inner.stopping {
            return None;
        }
        inner.take(|job| job.priority > priority && eligible(job))
    }

    /// Tells every waiting job its place.
    pub fn update_positions(&self) {
        let order = self.lock().order();
        for (position, job) in (1..).zip(&order) {
            job.set_queue_position(position);
        }
    }
}

impl Inner {
    fn take(&mut self, eligible: impl Fn(&Job) -> bool) -> Option<Arc<Job>> {
        let served = |job: &Job| self.served.get(&job.owner.client).copied().unwrap_or(0);
        let now = Instant::now();
        let candidates = self.waiting.iter().enumerate().filter(|(_, job)| eligible(job));
        let best = candidates.min_by_key(|(at, job)| match self.is_overdue(job, now) {
            // Whoever waits longest.
            true => (None, 0, *at),
            false => (Some(Reverse(job.priority)), served(job), *at),
        });
        let at = best?.0;
        let job = self.waiting.remove(at);
        self.turn += 1;
        self.taken += 1;
        self.served.insert(job.owner.client.clone(), self.turn);
        if self.served.len() > 4096 {
            let waiting = &self.waiting;
            self.served.retain(|client, _| waiting.iter().any(|job| job.owner.client == *client));
        }
        Some(job)
    }

    fn is_overdue(&self, job: &Job, now: Instant) -> bool {
        job.priority < Priority::Interactive
            && self.wait_max.is_some_and(|most| now.saturating_duration_since(job.created) >= most)
    }

    /// What the waiting jobs are sorted by for the order in which [`Self::take`] would give them if none came.
    fn keys(&self) -> Vec<Key> {
        let mut rounds: HashMap<(Priority, &str), u32> = HashMap::new();
        let now = Instant::now();
        let mut keys = Vec::with_capacity(self.waiting.len());
        for (at, job) in self.waiting.iter().enumerate() {
            if self.is_overdue(job, now) {
                keys.push((None, 0, 0, at));
                continue;
            }
            let client = job.owner.client.as_str();
            let round = rounds.entry((job.priority, client)).or_default();
            *round += 1;
            keys.push((Some(Reverse(job.priority)), *round, self.served.get(client).copied().unwrap_or(0), at));
        }
        keys
    }

    /// The jobs in that order.
    fn order(&self) -> Vec<Arc<Job>> {
        let mut keys = self.keys();
        keys.sort_unstable();
        keys.into_iter().map(|(.., at)| self.waiting[at].clone()).collect()
    }

    /// The place of a waiting job, 1 being the next; 0 if it does not wait.
    fn position(&self, id: &str) -> u32 {
        let keys = self.keys();
        let own = self.waiting.iter().position(|job| job.id == id).and_then(|at| keys.get(at));
        own.map_or(0, |own| 1 + keys.iter().filter(|key| *key < own).count() as u32)
    }
}

/// Overdue ones first, then by priority, by the client's turn, by when it was served last, by arrival.
type Key = (Option<Reverse<Priority>>, u32, u64, usize);

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::work::Work;
    use super::super::{Lifetime, Owner, Ticket};
    use super::*;

    const LIMITS: Limits = Limits { all: 6, per_client: 3 };

    fn job(id: &str, client: &str, priority: Priority) -> Arc<Job> {
        let owner = Owner { client: client.into(), uid: 0 };
        let lifetime = Lifetime::Daemon;
        let ticket = Ticket { owner, priority, lifetime, token: None, timeout: None, created_usec: None };
        Arc::new(Job::new(id.into(), format!("/{id}"), &ticket, Work::Empty))
    }

    fn drain(queue: &Queue) -> String {
        let mut order = String::new();
        while let Next::Job(job) = queue.next(Duration::ZERO) {
            order += &job.id;
        }
        order
    }

    #[test]
    fn clients_take_turns_and_interactive_jobs_go_first() {
        let queue = Queue::default();
        use Priority::{Background, Interactive, Normal};
        for (id, client, priority) in [
            ("a", "x", Normal),
            ("b", "x", Normal),
            ("c", "x", Background),
            ("d", "y", Normal),
            ("e", "z", Interactive),
        ] {
            queue.push(job(id, client, priority), LIMITS).unwrap();
        }
        queue.update_positions();
        let positions: String =
            queue.lock().order().iter().map(|j| format!("{}{}", j.id, j.status(|s| s.queue_position))).collect();
        assert_eq!(positions, "e1a2d3b4c5");
        assert_eq!(drain(&queue), "eadbc");
        // z was served before x and y.
        for (id, client) in [("f", "y"), ("g", "z"), ("h", "x")] {
            queue.push(job(id, client, Normal), LIMITS).unwrap();
        }
        assert_eq!(drain(&queue), "gfh");
    }

    #[test]
    fn whoever_comes_knows_its_place_at_once() {
        let queue = Queue::default();
        use Priority::{Background, Interactive, Normal};
        for (id, client, priority, place) in [
            ("a", "x", Normal, 1),
            ("b", "x", Normal, 2),
            ("c", "y", Normal, 2),
            ("d", "x", Background, 4),
            ("e", "z", Interactive, 1),
        ] {
            let job = job(id, client, priority);
            queue.push(job.clone(), LIMITS).unwrap();
            assert_eq!(job.status(|s| s.queue_position), place, "{id}");
        }
    }

    #[test]
    fn what_was_taken_counts_until_it_is_noted() {
        let queue = Queue::default();
        queue.push(job("a", "x", Priority::Normal), Limits::NONE).unwrap();
        assert!(matches!(queue.next(Duration::ZERO), Next::Job(_)));
        queue.stop();
        assert!(!queue.is_over());
        queue.noted();
        assert!(queue.is_over());
    }

    #[test]
    fn the_bounds_hold_and_name_themselves() {
        let queue = Queue::default();
        for id in ["a", "b", "c"] {
            queue.push(job(id, "x", Priority::Normal), LIMITS).unwrap();
        }
        let error = queue.push(job("d", "x", Priority::Normal), LIMITS).unwrap_err();
        assert_eq!((error.kind, error.message.contains("this client")), (Kind::QueueFull, true));
        for id in ["e", "f", "g"] {
            queue.push(job(id, "y", Priority::Normal), LIMITS).unwrap();
        }
        let error = queue.push(job("h", "z", Priority::Normal), LIMITS).unwrap_err();
        assert_eq!((error.kind, error.message.contains("6 jobs")), (Kind::QueueFull, true));
        queue.remove("b").unwrap();
        queue.push(job("i", "z", Priority::Normal), LIMITS).unwrap();
        queue.stop();
        assert_eq!(queue.push(job("j", "z", Priority::Normal), LIMITS).unwrap_err().kind, Kind::ShuttingDown);
    }

    #[test]
    fn only_higher_priorities_interrupt() {
        let queue = Queue::default();
        queue.push(job("a", "x", Priority::Normal), LIMITS).unwrap();
        queue.push(job("b", "x", Priority::Interactive), LIMITS).unwrap();
        assert!(queue.next_above(Priority::Interactive, |_| true).is_none());
        assert!(queue.next_above(Priority::Normal, |job| job.id != "b").is_none());
        assert_eq!(queue.next_above(Priority::Background, |_| true).unwrap().id, "b");
        assert_eq!(queue.next_above(Priority::Background, |_| true).unwrap().id, "a");
    }

    #[test]
    fn one_that_has_waited_too_long_goes_next_and_others_go_in_between() {
        use Priority::{Background, Interactive, Normal};
        let queue = Queue::default();
        let old = |id: &str, priority: Priority, seconds: u64| {
            let mut job = Arc::into_inner(job(id, id, priority)).unwrap();
            job.created -= Duration::from_secs(seconds);
            Arc::new(job)
        };
        let fill = || {
            for job in [
                old("a", Interactive, 100),
                old("b", Background, 61),
                old("c", Interactive, 0),
                old("d", Normal, 59),
                old("e", Normal, 60),
            ] {
                queue.push(job, LIMITS).unwrap();
            }
        };
        fill();
        assert_eq!(drain(&queue), "acdeb", "without a limit the priority decides");
        queue.set_wait_max(Duration::from_secs(60));
        fill();
        queue.update_positions();
        let positions: String =
            queue.lock().order().iter().map(|j| format!("{}{}", j.id, j.status(|s| s.queue_position))).collect();
        assert_eq!(positions, "b1e2a3c4d5");
        let Next::Job(first) = queue.next(Duration::ZERO) else { panic!("nothing comes") };
        assert_eq!(first.id, "b");
        // While it runs, the others go in between: e, too, which has become overdue itself.
        let between: String =
            std::iter::from_fn(|| queue.next_above(first.priority, |_| true)).map(|j| j.id.clone()).collect();
        assert_eq!(between, "eacd");
        queue.set_wait_max(Duration::ZERO);
        fill();
        // Of equal priority, the client that was served longest ago.
        assert_eq!(drain(&queue), "acedb");
    }
}
