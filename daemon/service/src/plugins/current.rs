//! What belongs to the job that a thread works on. Between a job and a plugin that works for it is the engine, which knows
//! neither artefacts nor whether the job is to end.

use std::cell::RefCell;
use std::thread::LocalKey;

/// It, while the thread works on a job.
pub type Current<T> = LocalKey<RefCell<Option<T>>>;

/// Does some work of the job to which `value` belongs; what was there before is put back.
pub fn during<T: 'static, R>(current: &'static Current<T>, value: T, work: impl FnOnce() -> R) -> R {
    struct Restore<T: 'static>(&'static Current<T>, Option<T>);
    impl<T> Drop for Restore<T> {
        fn drop(&mut self) {
            self.0.set(self.1.take());
        }
    }
    let _restore = Restore(current, current.replace(Some(value)));
    work()
}
