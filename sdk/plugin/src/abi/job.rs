//! A job's services across the boundary.

use std::marker::PhantomData;

use abi_stable::StableAbi;
use abi_stable::prefix_type::WithMetadata;
use abi_stable::staticref;
use abi_stable::std_types::{RResult, RSlice, RStr};

use super::guard::{guard, guard_quietly};
use super::types::RawError;
use crate::error::Result;
use crate::job::{Job, LogLevel};

/// The host's functions for every job. `context` is that of the [`RawJob`] they came with, and all of them may be
/// called from any thread while the call that it was given to lasts.
#[repr(C)]
#[derive(StableAbi)]
#[sabi(kind(Prefix(prefix_ref = JobTableRef, prefix_fields = JobTableFields)))]
#[sabi(missing_field(panic))]
pub struct JobTable {
    /// [any] `done` of `total` units.
    pub progress: extern "C" fn(context: *const (), done: u64, total: u64),
    /// [any] Whether the caller has cancelled.
    pub is_cancelled: extern "C" fn(context: *const ()) -> bool,
    /// [any] A line for the log; `level` as [`LogLevel`]; unknown levels are debugging.
    pub log: extern "C" fn(context: *const (), level: u32, message: RStr<'_>),
    /// [any] The seed of every random number.
    pub seed: extern "C" fn(context: *const ()) -> u64,
    /// [any] Keeps bytes, which are copied, under a name.
    #[sabi(last_prefix_field)]
    pub artefact: extern "C" fn(context: *const (), name: RStr<'_>, bytes: RSlice<'_, u8>) -> RResult<(), RawError>,
}

/// A job, lent for a call.
#[repr(C)]
#[derive(StableAbi, Clone, Copy)]
pub struct RawJob<'a> {
    context: *const (),
    table: JobTableRef,
    call: PhantomData<&'a ()>,
}

/// What the context of a job points to.
pub trait Context {
    /// # Safety
    /// `context` must point to what this type says, alive and not borrowed exclusively for `'a`.
    unsafe fn job<'a>(context: *const ()) -> &'a dyn Job;
}

/// The context is a `&dyn Job`.
pub struct PlainJob;

impl Context for PlainJob {
    unsafe fn job<'a>(context: *const ()) -> &'a dyn Job {
        // SAFETY: by the contract of the trait.
        unsafe { *context.cast::<&'a dyn Job>() }
    }
}

struct Host<C>(PhantomData<C>);

impl<C: Context> Host<C> {
    staticref!(const TABLE: WithMetadata<JobTable> = WithMetadata::new(JobTable {
        progress: Self::progress,
        is_cancelled: Self::is_cancelled,
        log: Self::log,
        seed: Self::seed,
        artefact: Self::artefact,
    }));

    extern "C" fn progress(context: *const (), done: u64, total: u64) {
        // SAFETY: the context is the one of the `RawJob` that came with this function, here and below.
        guard_quietly((), || unsafe { C::job(context) }.progress(done, total));
    }
    extern "C" fn is_cancelled(context: *const ()) -> bool {
        // SAFETY: as above.
        guard_quietly(true, || unsafe { C::job(context) }.is_cancelled())
    }
    extern "C" fn log(context: *const (), level: u32, message: RStr<'_>) {
        let level = match level {
            1 => LogLevel::Warning,
            2 => LogLevel::Info,
            _ => LogLevel::Debug,
        };
        // SAFETY: as above.
        guard_quietly((), || unsafe { C::job(context) }.log(level, message.as_str()));
    }
    extern "C" fn seed(context: *const ()) -> u64 {
        // SAFETY: as above.
        guard_quietly(0, || unsafe { C::job(context) }.seed())
    }
    extern "C" fn artefact(context: *const (), name: RStr<'_>, bytes: RSlice<'_, u8>) -> RResult<(), RawError> {
        // SAFETY: as above.
        guard(|| unsafe { C::job(context) }.artefact(name.as_str(), bytes.as_slice()))
    }
}

impl RawJob<'_> {
    /// A job whose context is what `C` says.
    pub fn with_context<C: Context>(context: *const ()) -> Self {
        Self { context, table: JobTableRef(Host::<C>::TABLE.as_prefix()), call: PhantomData }
    }
}

impl<'a> RawJob<'a> {
    /// Lends `job`.
    pub fn lend(job: &'a &'a dyn Job) -> Self {
        Self::with_context::<PlainJob>(std::ptr::from_ref(job).cast())
    }
}

/// A job of the host's, on the plugin's side.
pub struct JobProxy<'a>(pub RawJob<'a>);

// SAFETY: the host allows every function of the table on any thread.
unsafe impl Send for JobProxy<'_> {}
// SAFETY: as above.
unsafe impl Sync for JobProxy<'_> {}

impl Job for JobProxy<'_> {
    fn progress(&self, done: u64, total: u64) {
        self.0.table.progress()(self.0.context, done, total);
    }
    fn is_cancelled(&self) -> bool {
        self.0.table.is_cancelled()(self.0.context)
    }
    fn log(&self, level: LogLevel, message: &str) {
        self.0.table.log()(self.0.context, level as u32, message.into());
    }
    fn seed(&self) -> u64 {
        self.0.table.seed()(self.0.context)
    }
    fn artefact(&self, name: &str, bytes: &[u8]) -> Result<()> {
        Ok(self.0.table.artefact()(self.0.context, name.into(), bytes.into()).into_result()?)
    }
}

/// Implements [`Job`] for a proxy by its field `job`.
macro_rules! job_by_field {
    ($type:ty) => {
        impl $crate::job::Job for $type {
            fn progress(&self, done: u64, total: u64) {
                self.job.progress(done, total);
            }
            fn is_cancelled(&self) -> bool {
                self.job.is_cancelled()
            }
            fn log(&self, level: $crate::job::LogLevel, message: &str) {
                self.job.log(level, message);
            }
            fn seed(&self) -> u64 {
                self.job.seed()
            }
            fn artefact(&self, name: &str, bytes: &[u8]) -> $crate::error::Result<()> {
                self.job.artefact(name, bytes)
            }
        }
    };
}
pub(super) use job_by_field;
