//! The services of a job that nobody waits for.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::error::Result;
use crate::job::{Job, LogLevel};

/// A job that remembers what a plugin told it.
#[derive(Debug, Default)]
pub struct TestJob {
    /// Decides every random number.
    pub seed: u64,
    /// What [`Job::is_cancelled`] answers.
    pub cancelled: AtomicBool,
    /// How often the plugin asked.
    pub asked: AtomicU64,
    /// Every (done, total) that it reported.
    pub progress: Mutex<Vec<(u64, u64)>>,
    /// Every line that it logged.
    pub log: Mutex<Vec<(LogLevel, String)>>,
    /// The names of what it kept.
    pub artefacts: Mutex<Vec<String>>,
}

impl TestJob {
    /// A job with this seed.
    pub fn new(seed: u64) -> Self {
        Self { seed, ..Self::default() }
    }
}

fn push<T>(list: &Mutex<Vec<T>>, item: T) {
    list.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(item);
}

impl Job for TestJob {
    fn progress(&self, done: u64, total: u64) {
        push(&self.progress, (done, total));
    }
    fn is_cancelled(&self) -> bool {
        self.asked.fetch_add(1, Ordering::Relaxed);
        self.cancelled.load(Ordering::Relaxed)
    }
    fn log(&self, level: LogLevel, message: &str) {
        push(&self.log, (level, message.to_owned()));
    }
    fn seed(&self) -> u64 {
        self.seed
    }
    fn artefact(&self, name: &str, _bytes: &[u8]) -> Result<()> {
        push(&self.artefacts, name.to_owned());
        Ok(())
    }
}

/// Implements [`Job`] for a type by its field `job`.
macro_rules! delegate_job {
    ($type:ty) => {
        impl $crate::Job for $type {
            fn progress(&self, done: u64, total: u64) {
                self.job.progress(done, total);
            }
            fn is_cancelled(&self) -> bool {
                self.job.is_cancelled()
            }
            fn log(&self, level: $crate::LogLevel, message: &str) {
                self.job.log(level, message);
            }
            fn seed(&self) -> u64 {
                self.job.seed()
            }
            fn artefact(&self, name: &str, bytes: &[u8]) -> $crate::Result<()> {
                self.job.artefact(name, bytes)
            }
        }
    };
}
pub(super) use delegate_job;
