//! Whose code runs in this process right now, written down so that the next process knows in whose code this one died.
//!
//! Each process has a file, which it holds locked: one that nobody holds is a dead process's. A line of it is a library's
//! digest and a mark, which is set and taken back with one write of a byte; what was written survives the process, as
//! the kernel holds it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use rustix::fs::{FlockOperation, flock};

use super::records::Records;

/// After this many processes in a row have died in a library's code, it is quarantined.
pub const DEATHS_MAX: u32 = 3;

const INSIDE: u8 = b'+';
const OUTSIDE: u8 = b'-';
/// A digest in hex, the mark, a line break.
const LINE: usize = 66;

/// What this process has written down.
#[derive(Debug, Default)]
struct Book {
    /// None where it cannot be written: then nothing is known of a crash.
    file: Option<File>,
    /// The line of each library, and how many calls into it are under way.
    lines: BTreeMap<String, (u64, usize)>,
}

/// Which libraries' code runs in this process.
#[derive(Debug, Default)]
pub struct Running(Mutex<Book>);

impl Running {
    /// In `folder`, after looking at what dead processes left there.
    pub fn open(folder: &Path, records: &Records) -> Self {
        let folder = folder.join("running");
        read_the_dead(&folder, records);
        Self(Mutex::new(Book { file: new_file(&folder).ok(), lines: BTreeMap::new() }))
    }

    fn lock(&self) -> MutexGuard<'_, Book> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// A new file that is locked. It stays when the process ends: the next one reads and removes it.
fn new_file(folder: &Path) -> std::io::Result<File> {
    std::fs::create_dir_all(folder)?;
    // Not seen by others before it is locked.
    let file = tempfile::Builder::new().prefix(".new").tempfile_in(folder)?;
    flock(file.as_file(), FlockOperation::LockExclusive)?;
    let name = format!("{}-{}", std::process::id(), crate::jobs::now_usec());
    file.persist_noclobber(folder.join(name)).map_err(|e| e.error)
}

impl Book {
    /// One more (or one less) call into the library; only the first and the last are written.
    fn count(&mut self, digest: &str, enters: bool) {
        let end = self.lines.len() as u64 * LINE as u64;
        let is_new = !self.lines.contains_key(digest);
        let (line, calls) = self.lines.entry(digest.to_owned()).or_insert((end, 0));
        *calls = if enters { *calls + 1 } else { calls.saturating_sub(1) };
        let changes = if enters { *calls == 1 } else { *calls == 0 };
        let Some(file) = self.file.as_ref().filter(|_| changes) else { return };
        let mark = if enters { INSIDE } else { OUTSIDE };
        // What cannot be written is not known after a crash; the call itself need not fail.
        drop(match is_new {
            true => file.write_all_at(&[digest.as_bytes(), &[mark], b"\n"].concat(), *line),
            false => file.write_all_at(&[mark], *line + LINE as u64 - 2),
        });
    }
}

/// A library's place among what runs.
#[derive(Clone, Debug)]
pub struct Place {
    running: Arc<Running>,
    digest: String,
}

impl Place {
    pub fn new(running: Arc<Running>, digest: &str) -> Self {
        Self { running, digest: digest.to_owned() }
    }

    /// Runs code of the library.
    pub fn inside<T>(&self, code: impl FnOnce() -> T) -> T {
        self.running.lock().count(&self.digest, true);
        let result = code();
        self.running.lock().count(&self.digest, false);
        result
    }

    /// Runs the host's own code, which the library's has called.
    pub fn outside<T>(&self, code: impl FnOnce() -> T) -> T {
        self.running.lock().count(&self.digest, false);
        let result = code();
        self.running.lock().count(&self.digest, true);
        result
    }
}

/// Runs code of a library that has a place; of one that has none in this process it runs elsewhere.
pub fn inside<T>(place: Option<&Place>, code: impl FnOnce() -> T) -> T {
    match place {
        Some(place) => place.inside(code),
        None => code(),
    }
}

/// Runs the host's own code, which the library's has called.
pub fn outside<T>(place: Option<&Place>, code: impl FnOnce() -> T) -> T {
    match place {
        Some(place) => place.outside(code),
        None => code(),
    }
}

/// The libraries that a process has written down, by digest, and whether it is (or has ended) in the code of each.
fn lines(text: &[u8]) -> impl Iterator<Item = (&str, bool)> {
    text.chunks_exact(LINE).filter_map(|line| {
        let (digest, rest) = line.split_at(LINE - 2);
        Some((std::str::from_utf8(digest).ok()?, rest[0] == INSIDE))
    })
}

/// Digests of the libraries in whose code `process` has ended. What it left in `folder` stays there: the next process
/// counts it.
pub fn ended_in(folder: &Path, process: u32) -> Vec<String> {
    let entries = folder.join("running").read_dir().into_iter().flatten().flatten();
    let own = format!("{process}-");
    let files = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(&own));
    let texts = files.filter_map(|entry| std::fs::read(entry.path()).ok());
    let inside = |text: Vec<u8>| -> Vec<String> {
        lines(&text).filter(|(_, inside)| *inside).map(|(digest, _)| digest.to_owned()).collect()
    };
    texts.flat_map(inside).collect()
}

/// Records in whose code dead processes have ended, in their order, and removes their files.
fn read_the_dead(folder: &Path, records: &Records) {
    let entries = folder.read_dir().into_iter().flatten().flatten();
    let modified = |path: &PathBuf| path.metadata().and_then(|meta| meta.modified()).ok();
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    files.sort_by_cached_key(modified);
    for path in files.iter().filter(|path| !path.file_name().is_some_and(|n| n.to_string_lossy().starts_with('.'))) {
        let Ok(mut file) = File::open(path) else { continue };
        // Held: its process lives.
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            continue;
        }
        let mut text = Vec::new();
        // Removed before it counts: two processes never count one death twice.
        if file.read_to_end(&mut text).is_err() || std::fs::remove_file(path).is_err() {
            continue;
        }
        // Whether it crashed there, or somebody killed it while it was there, is not written down: a row of them counts.
        for (digest, died) in lines(&text) {
            if died || records.deaths(digest) > 0 {
                count(records, digest, died);
            }
        }
    }
}

/// Counts that a process has ended in a library's code, or after it.
fn count(records: &Records, digest: &str, died: bool) {
    if died {
        tracing::warn!("a process before this one ended in the code of {}", records.name(digest));
    }
    records.update(digest, |record| {
        record.deaths = if died { record.deaths + 1 } else { 0 };
        record.crashes += u32::from(died);
        if record.deaths >= DEATHS_MAX {
            record.quarantine = Some(format!("the last {} processes that ran its code died in it", record.deaths));
        }
    });
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn only_the_code_that_a_process_died_in_counts() {
        let folder = tempfile::tempdir().unwrap();
        let records = Arc::new(Records::open(folder.path()));
        let [one, other, third] = [b'1', b'2', b'3'].map(|c| String::from_utf8(vec![c; 64]).unwrap());
        let crashes = || [&one, &other, &third].map(|digest| records.get(digest).crashes);
        for death in 1..=DEATHS_MAX {
            let running = Arc::new(Running::open(folder.path(), &records));
            let place = |digest: &str| Place::new(running.clone(), digest);
            let ended_in = || ended_in(folder.path(), std::process::id());
            place(&third).inside(|| ());
            assert_eq!(ended_in(), Vec::<String>::new());
            place(&one).inside(|| {
                place(&one).inside(|| ());
                place(&other).inside(|| {
                    place(&other).outside(|| {
                        // It lives: nothing counts.
                        drop(Running::open(folder.path(), &records));
                        assert_eq!(crashes(), [death - 1, 0, 0]);
                        // It dies here: the file is closed as it is.
                        running.lock().file = None;
                        assert_eq!(ended_in(), std::slice::from_ref(&one));
                    });
                });
            });
            drop(Running::open(folder.path(), &records));
            assert_eq!(crashes(), [death, 0, 0]);
            assert_eq!(records.get(&one).quarantine.is_some(), death == DEATHS_MAX, "{death}");
        }
    }

    #[test]
    fn who_was_killed_did_not_crash() {
        use std::os::unix::process::ExitStatusExt;
        let state = tempfile::tempdir().unwrap();
        let records = Records::open(state.path());
        let running = Arc::new(Running::open(state.path(), &records));
        let options = super::super::Options { state: state.path().to_owned(), ..Default::default() };
        let crash = |signal| {
            let status = std::process::ExitStatus::from_raw(signal);
            super::super::crash_of(status, std::process::id(), &options).unwrap()
        };
        Place::new(running, &"a".repeat(64)).inside(|| {
            assert!(crash(11).contains("segmentation fault) in the code of the plugin"), "{}", crash(11));
            assert_eq!(crash(9), "was killed (signal 9) by somebody or for want of memory");
        });
    }

    #[test]
    fn a_process_that_ends_well_starts_the_row_anew() {
        let folder = tempfile::tempdir().unwrap();
        let records = Records::open(folder.path());
        let digest = "a".repeat(64);
        for ends_well in [false, false, true, false, false] {
            let running = Arc::new(Running::open(folder.path(), &records));
            Place::new(running.clone(), &digest).inside(|| {
                if !ends_well {
                    running.lock().file = None;
                }
            });
        }
        drop(Running::open(folder.path(), &records));
        let record = records.get(&digest);
        assert_eq!((record.crashes, record.deaths, record.quarantine), (4, 2, None));
        // What was read is gone; one that has just been opened is still there.
        drop(Running::open(folder.path(), &records));
        assert_eq!(folder.path().join("running").read_dir().unwrap().count(), 1);
    }
}
