//! Whether the job that this thread works on is to end. Between a job and a strategy that plans for it is the engine, which
//! asks nobody meanwhile.

use std::cell::RefCell;
use std::sync::Arc;

/// Says whether a job is to end.
pub type Stop = Arc<dyn Fn() -> bool + Send + Sync>;

thread_local! {
    static CURRENT: RefCell<Option<Stop>> = const { RefCell::new(None) };
}

/// That of the job that this thread works on.
pub fn current() -> Option<Stop> {
    CURRENT.with_borrow(Clone::clone)
}

/// Does some work of the job that `stop` speaks of on this thread.
pub fn during<T>(stop: Stop, work: impl FnOnce() -> T) -> T {
    struct Restore(Option<Stop>);
    impl Drop for Restore {
        fn drop(&mut self) {
            CURRENT.set(self.0.take());
        }
    }
    let _restore = Restore(CURRENT.replace(Some(stop)));
    work()
}
