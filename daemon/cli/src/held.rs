//! The temporary files and folders of outputs that have no name yet: a command that is ended at once removes them, whose
//! destructors do not run then.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Where they are.
type List = BTreeSet<PathBuf>;

static LIST: Mutex<List> = Mutex::new(List::new());

/// How often a folder is removed again into which something was written meanwhile.
const TRIES: usize = 100;

/// Keeps a path on the list.
pub struct Held(PathBuf);

impl Drop for Held {
    fn drop(&mut self) {
        list().remove(&self.0);
    }
}

fn list() -> MutexGuard<'static, List> {
    LIST.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What `make` makes. Its path, which `path` tells, is on the list from the first moment on.
pub fn hold<T>(make: impl FnOnce() -> io::Result<T>, path: impl FnOnce(&T) -> &Path) -> io::Result<(T, Held)> {
    let mut list = list();
    let made = make()?;
    let path = path(&made).to_path_buf();
    list.insert(path.clone());
    Ok((made, Held(path)))
}

/// Removes all of them. No other one is made before the result goes.
pub fn remove_all() -> MutexGuard<'static, List> {
    let list = list();
    for path in list.iter() {
        let remove = || if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
        // Nothing can be said about one that stays.
        let _ = (0..TRIES).find(|_| remove().is_ok() || !path.exists());
    }
    list
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// One test, because the list is one.
    #[test]
    fn what_is_held_is_removed_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let make = |name: &str| {
            hold(|| std::fs::create_dir(path(name)).map(|()| path(name)), |made: &PathBuf| made.as_path()).unwrap()
        };
        let ((_, kept), (_, done)) = (make("held"), make("done"));
        drop(done);
        std::fs::write(path("held").join("file"), "").unwrap();
        drop(remove_all());
        assert!(!path("held").exists() && path("done").exists());
        drop(kept);
        assert!(list().is_empty());
    }
}
