//! Work for all cores, without a thread pool of the plugin's own.

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::error::Result;

/// `f(0)`, `f(1)`, ... `f(n - 1)`, computed on all cores, in order; the first error (by index) if there is one. The
/// threads end before this returns: a plugin must leave none behind.
pub fn map<T: Send>(n: usize, f: impl Fn(usize) -> Result<T> + Sync) -> Result<Vec<T>> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from).min(n);
    if cores <= 1 {
        return (0..n).map(f).collect();
    }
    let next = AtomicUsize::new(0);
    let work = || {
        let mut mine = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= n {
                return mine;
            }
            let result = f(index);
            // After an error nobody takes up new work; what has a lower index is already under way.
            if result.is_err() {
                next.store(n, Ordering::Relaxed);
            }
            mine.push((index, result));
        }
    };
    let mut all: Vec<(usize, Result<T>)> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..cores).map(|_| scope.spawn(work)).collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, _>| match thread.join() {
            Ok(results) => results,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        threads.into_iter().flat_map(join).collect()
    });
    all.sort_by_key(|(index, _)| *index);
    all.into_iter().map(|(_, result)| result).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    #[test]
    fn results_come_in_order_and_an_error_ends_the_work() {
        assert_eq!(map(1000, |i| Ok(i * i)), Ok((0..1000).map(|i| i * i).collect()));
        assert_eq!(map(0, Ok), Ok(vec![]));
        let failed = map(1000, |i| if i >= 500 { Err(Error::incompatible(format!("{i}"))) } else { Ok(i) });
        assert_eq!(failed, Err(Error::incompatible("500")));
    }
}
