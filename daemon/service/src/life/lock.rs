//! One daemon for one state folder, and one for the devices and the socket of one runtime folder.

use std::fs::File;
use std::path::Path;

use rustix::fs::{FlockOperation, flock};

use crate::error::{Error, Kind, Result};

/// Held until it is dropped.
#[derive(Debug)]
pub struct Lock(#[allow(dead_code)] File);

/// Locks a folder, which need not be writable for that. `what` it is for stands in the error.
pub fn folder(path: &Path, what: &str) -> Result<Lock> {
    let file = File::open(path).map_err(|e| Error::io(path.display(), &e))?;
    lock(file, path, what)
}

/// Locks a file, which is made if it is not there.
pub fn file(path: &Path, what: &str) -> Result<Lock> {
    let file = File::options().create(true).truncate(false).write(true).open(path);
    lock(file.map_err(|e| Error::io(path.display(), &e))?, path, what)
}

fn lock(file: File, path: &Path, what: &str) -> Result<Lock> {
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Lock(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let message =
                format!("{}: another blocklorad uses this {what}; stop it first, or give another one", path.display());
            Err(Error::new(Kind::DeviceBusy, message))
        }
        Err(e) => Err(Error::io(path.display(), &e.into())),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn only_one_has_the_lock() {
        let dir = tempfile::tempdir().unwrap();
        let first = folder(dir.path(), "state folder").unwrap();
        let error = folder(dir.path(), "state folder").unwrap_err();
        assert_eq!(error.kind, Kind::DeviceBusy);
        assert!(error.message.contains("another blocklorad uses this state folder"));
        drop(first);
        folder(dir.path(), "state folder").unwrap();
    }
}
