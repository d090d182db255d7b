//! The services that a running job gives to any plugin.

use crate::error::{Error, Result};
use crate::rng::{Rng, Stream};

/// How important a line of a job's log is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
pub enum LogLevel {
    /// Something that the user should know.
    Warning = 1,
    /// What the job is doing.
    Info = 2,
    /// For whoever writes the plugin.
    Debug = 3,
}

/// The services of one job. They belong to the call that they were given to and end with it: keep no copy.
///
/// Threads: every method may be called from any thread while the call lasts, also from several at once.
pub trait Job: Sync {
    /// Tells how far the work is: `done` of `total` units, in any unit. Cheap; call it as often as you like. The daemon
    /// counts the steps of samplers and trainers itself and shows those.
    fn progress(&self, done: u64, total: u64);

    /// Whether the caller has cancelled. A plugin asks at least once in a step and then returns
    /// [`Error::cancelled`](crate::Error::cancelled); [`check_cancelled`](Self::check_cancelled) does both. Samplers and
    /// trainers learn it from the first call of their host that fails for it.
    fn is_cancelled(&self) -> bool;

    /// Writes a line to the job's log.
    fn log(&self, level: LogLevel, message: &str);

    /// The job's seed: it decides every random number.
    fn seed(&self) -> u64;

    /// Keeps `bytes` beside the job's result under `name`: pictures, tables, whatever helps to understand a run. A name is
    /// 1 to 64 letters, digits, `_`, `-` and dots, the first one no dot; of equal names the last one wins. A resumed
    /// training has those from before. Fails with [`Code::Host`](crate::Code::Host) where it cannot be kept, such as
    /// more than 32 of them or 64 MiB in all, and with [`Code::NotSupported`](crate::Code::NotSupported) where the
    /// plugin does not run for a job of the daemon.
    fn artefact(&self, name: &str, bytes: &[u8]) -> Result<()>;

    /// The random numbers of `stream` at `step`; `lane` tells layers, pictures or the like apart (16 bits of it count).
    /// Nothing is carried from call to call, so that a resumed job gets the numbers of an uninterrupted one.
    fn rng(&self, stream: Stream, step: usize, lane: usize) -> Rng {
        Rng::new(self.seed(), stream, step as u32, lane as u16)
    }

    /// [`Error::cancelled`](crate::Error::cancelled) once the caller has cancelled.
    fn check_cancelled(&self) -> Result<()> {
        if self.is_cancelled() { Err(Error::cancelled()) } else { Ok(()) }
    }
}
