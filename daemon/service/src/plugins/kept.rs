//! Methods that are ready for the next job: making one checks its settings, and starts a process where plugins have their
//! own. What a method gives depends on its settings and what it is called with, so that any job may have it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// How many of a kind are kept.
const KEPT_MAX: usize = 8;

/// Methods of a kind, the last used one last.
pub struct Kept<T: ?Sized> {
    list: Mutex<Vec<Entry<T>>>,
    /// Whether several may use one at once. A sampler's process is busy until the picture is done, and another picture may
    /// be drawn between two of its steps.
    shared: bool,
}

struct Entry<T: ?Sized> {
    key: String,
    method: Arc<T>,
    gone: Option<Arc<AtomicBool>>,
}

impl<T: ?Sized> Kept<T> {
    /// None yet.
    pub fn new(shared: bool) -> Self {
        Self { list: Mutex::default(), shared }
    }

    fn list(&self) -> std::sync::MutexGuard<'_, Vec<Entry<T>>> {
        self.list.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// One that was made for `key`.
    pub fn get(&self, key: &str) -> Option<Arc<T>> {
        let mut list = self.list();
        list.retain(|entry| !entry.gone.as_ref().is_some_and(|gone| gone.load(Ordering::Relaxed)));
        let is_free = |entry: &Entry<T>| self.shared || Arc::strong_count(&entry.method) == 1;
        let at = list.iter().position(|entry| entry.key == key && is_free(entry))?;
        let entry = list.remove(at);
        let method = entry.method.clone();
        list.push(entry);
        Some(method)
    }

    /// Keeps `method`, made for `key`; `gone` is set when its process has ended.
    pub fn put(&self, key: String, method: &Arc<T>, gone: Option<Arc<AtomicBool>>) {
        let mut list = self.list();
        list.push(Entry { key, method: method.clone(), gone });
        let surplus = list.len().saturating_sub(KEPT_MAX);
        list.drain(..surplus);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_is_in_use_is_shared_or_not() {
        for shared in [true, false] {
            let kept = Kept::<str>::new(shared);
            let made: Arc<str> = "method".into();
            kept.put("key".to_owned(), &made, None);
            assert_eq!(kept.get("key").is_some(), shared);
            drop(made);
            let got = kept.get("key").unwrap();
            assert_eq!(&*got, "method");
            assert!(kept.get("other").is_none());
            assert_eq!(kept.get("key").is_some(), shared);
        }
    }

    #[test]
    fn the_least_recently_used_goes_and_so_does_one_whose_process_has_ended() {
        let kept = Kept::<str>::new(true);
        let gone = Arc::new(AtomicBool::new(false));
        kept.put("0".to_owned(), &"0".into(), None);
        kept.put("1".to_owned(), &"1".into(), Some(gone.clone()));
        for key in 2..=KEPT_MAX {
            assert!(kept.get("0").is_some() && kept.get("1").is_some());
            kept.put(key.to_string(), &"x".into(), None);
        }
        assert!(kept.get("0").is_some() && kept.get("1").is_some() && kept.get("2").is_none());
        gone.store(true, Ordering::Relaxed);
        assert!(kept.get("1").is_none());
    }
}
