//! Whether the job that this thread works on is to end, for strategies: while they plan, the engine asks nobody.

use std::cell::RefCell;
use std::sync::Arc;

use super::current;

/// Says whether a job is to end.
pub type Stop = Arc<dyn Fn() -> bool + Send + Sync>;

thread_local! {
    static CURRENT: RefCell<Option<Stop>> = const { RefCell::new(None) };
}

/// That of the job that this thread works on.
pub fn current() -> Option<Stop> {
    CURRENT.with_borrow(Clone::clone)
}

/// Whether the job that this thread works on is to end.
pub fn is_asked_for() -> bool {
    current().is_some_and(|stop| stop())
}

/// Does some work of the job that `stop` speaks of on this thread.
pub fn during<T>(stop: Stop, work: impl FnOnce() -> T) -> T {
    current::during(&CURRENT, stop, work)
}
