//! What plugins hand over beside a job's result: pictures, tables, whatever helps to understand a run.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};

use blocklora_sdk::{Code, Error, Result};

use super::current;

/// Artefacts of one job.
const COUNT_MAX: usize = 32;
/// Bytes of all artefacts of one job.
const BYTES_MAX: usize = 64 << 20;
/// Bytes of a name.
const NAME_MAX: usize = 64;

/// The artefacts of one job, by name.
#[derive(Debug, Default)]
pub struct Artefacts {
    /// Where they also are, for a job that outlives its process.
    folder: Option<PathBuf>,
    kept: Mutex<BTreeMap<String, Vec<u8>>>,
}

thread_local! {
    /// Those of the job that this thread works on.
    static CURRENT: RefCell<Option<Arc<Artefacts>>> = const { RefCell::new(None) };
}

impl Artefacts {
    /// Kept in `folder`, too, with those that an earlier process left there.
    pub fn in_folder(folder: PathBuf) -> Self {
        let mut kept = BTreeMap::new();
        for entry in folder.read_dir().into_iter().flatten().flatten() {
            let name = entry.file_name().into_string().unwrap_or_default();
            // One that cannot be read, and one that was not finished, are as good as never handed over.
            if let (true, Ok(bytes)) = (is_name(&name), std::fs::read(entry.path())) {
                kept.insert(name, bytes);
            }
        }
        Self { folder: Some(folder), kept: Mutex::new(kept) }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Vec<u8>>> {
        self.kept.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Those of the job that this thread works on.
    pub fn current() -> Option<Arc<Self>> {
        CURRENT.with_borrow(Clone::clone)
    }

    /// Does some work of the job on this thread: what plugins hand over meanwhile is kept here.
    pub fn during<T>(self: &Arc<Self>, work: impl FnOnce() -> T) -> T {
        current::during(&CURRENT, self.clone(), work)
    }

    /// Keeps `bytes` as `name`, instead of those of that name before.
    pub fn keep(&self, name: &str, bytes: &[u8]) -> Result<()> {
        if !is_name(name) {
            let rule = format!("1 to {NAME_MAX} letters, digits, _, - and dots, the first one no dot");
            return Err(Error::contract(format!("artefact {name:?}: its name must be {rule}")));
        }
        let mut kept = self.lock();
        let others = kept.iter().filter(|(other, _)| *other != name);
        let (count, total) = others.fold((1, bytes.len()), |(count, total), (_, b)| (count + 1, total + b.len()));
        if count > COUNT_MAX || total > BYTES_MAX {
            let message =
                format!("artefact {name}: a job keeps at most {COUNT_MAX} artefacts of {BYTES_MAX} bytes in all");
            return Err(Error::new(Code::Host, message));
        }
        if let Some(folder) = &self.folder {
            let write = || {
                std::fs::create_dir_all(folder)?;
                let mut file = tempfile::Builder::new().prefix(".new").tempfile_in(folder)?;
                file.write_all(bytes)?;
                file.as_file().sync_all()?;
                file.persist(folder.join(name)).map(drop).map_err(|e| e.error)
            };
            write().map_err(|e: std::io::Error| Error::new(Code::Host, format!("{}: {e}", folder.display())))?;
        }
        kept.insert(name.to_owned(), bytes.to_owned());
        Ok(())
    }

    /// Takes them out.
    pub fn take(&self) -> BTreeMap<String, Vec<u8>> {
        std::mem::take(&mut *self.lock())
    }
}

fn is_name(name: &str) -> bool {
    let valid = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    (1..=NAME_MAX).contains(&name.len()) && !name.starts_with('.') && name.bytes().all(valid)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_last_one_of_a_name_wins_and_names_stay_in_the_folder() {
        let folder = tempfile::tempdir().unwrap();
        let artefacts = Artefacts::in_folder(folder.path().join("artefacts"));
        artefacts.keep("loss.csv", b"1").unwrap();
        artefacts.keep("loss.csv", b"2").unwrap();
        for wrong in ["", ".", "..", ".hidden", "a/b", "/etc/passwd", "a\0b", "\u{e9}", &"x".repeat(65)] {
            let error = artefacts.keep(wrong, b"").unwrap_err();
            assert!(error.message.contains("its name must be"), "{error}");
        }
        // A process that was killed: the next one has them.
        std::fs::write(folder.path().join("artefacts/.new1"), "half").unwrap();
        let next = Artefacts::in_folder(folder.path().join("artefacts"));
        assert_eq!(next.take(), BTreeMap::from([("loss.csv".to_owned(), b"2".to_vec())]));
        assert!(next.take().is_empty());
    }

    #[test]
    fn too_much_is_refused_and_what_is_there_stays() {
        let artefacts = Artefacts::default();
        let big = vec![0; BYTES_MAX / 2 + 1];
        artefacts.keep("a", &big).unwrap();
        artefacts.keep("a", &big).unwrap();
        assert_eq!(artefacts.keep("b", &big).unwrap_err().code, Code::Host);
        for number in 1..COUNT_MAX {
            artefacts.keep(&number.to_string(), b"").unwrap();
        }
        assert_eq!(artefacts.keep("one-more", b"").unwrap_err().code, Code::Host);
        assert_eq!(artefacts.take().len(), COUNT_MAX);
    }

    #[test]
    fn a_job_in_between_has_its_own() {
        let (outer, inner) = (Arc::new(Artefacts::default()), Arc::new(Artefacts::default()));
        let keep = |name: &str| Artefacts::current().unwrap().keep(name, b"").unwrap();
        outer.during(|| {
            keep("before");
            let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                inner.during(|| {
                    keep("between");
                    panic!("a bug");
                });
            }));
            assert!(panicked.is_err());
            keep("after");
        });
        assert!(Artefacts::current().is_none());
        assert_eq!(outer.take().into_keys().collect::<Vec<_>>(), ["after", "before"]);
        assert_eq!(inner.take().into_keys().collect::<Vec<_>>(), ["between"]);
    }
}
