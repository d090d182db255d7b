//! Adding files to the library: whole or not at all.

use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::path::Path;

use blocklora_spec::{Adapter, limits};

use super::Catalogue;
use super::adapters::{AdapterEntry, Filter};
use crate::error::{Error, Kind, Result};
use crate::memfd;

/// What was found in the folder of adapters.
#[derive(Debug, Default)]
pub struct Recovered {
    /// What was done, for the log.
    pub done: Vec<String>,
    /// Digests in the names of files without an entry, for [`Catalogue::adopt`]: checking a file takes long.
    pub strays: Vec<String>,
}

impl Catalogue {
    /// Copies the adapter that a client sent as `fd` into the library, after checking all of it; `what` names it in
    /// errors. The file is in its place, flushed, before the entry is written; the same file twice is one entry.
    pub fn import(&self, fd: impl std::os::fd::AsFd, what: &str) -> Result<AdapterEntry> {
        let bytes = memfd::read_client_file(fd, limits::FILE_BYTES_MAX, what)?;
        self.import_bytes(bytes, what)
    }

    /// As [`Self::import`], with the file's content.
    pub fn import_bytes(&self, bytes: Vec<u8>, what: &str) -> Result<AdapterEntry> {
        let folder = self.folder().join("adapters");
        let io = |e: &std::io::Error| Error::io(folder.display(), e);
        let mut file = tempfile::Builder::new().prefix(".import-").tempfile_in(&folder).map_err(|e| io(&e))?;
        file.write_all(&bytes).map_err(|e| io(&e))?;
        let size = bytes.len() as u64;
        let adapter = Adapter::from_bytes(what, bytes)?;
        let entry = AdapterEntry::of(&adapter, size);
        file.as_file().sync_all().map_err(|e| io(&e))?;
        let path = self.adapter_path(&entry.digest);
        let _whole = self.lock_files();
        let known = path.exists();
        file.persist(&path).map_err(|e| io(&e.error))?;
        let noted = sync_folder(&folder).and_then(|()| self.add_adapter(&entry));
        if noted.is_err() && !known {
            // No entry, no file: the error that is said is this one's cause.
            let _ = std::fs::remove_file(&path);
        }
        noted?;
        self.find_adapter(&entry.digest)
    }

    /// Compares the folder of adapters with the entries, without opening a file: what an interrupted import left is
    /// removed, entries whose file is gone are noted as missing.
    pub fn recover(&self) -> Result<Recovered> {
        let folder = self.folder().join("adapters");
        let mut gone: HashMap<String, String> = self.adapter_states()?.into_iter().collect();
        let mut recovered = Recovered::default();
        for item in std::fs::read_dir(&folder).map_err(|e| Error::io(folder.display(), &e))? {
            let path = item.map_err(|e| Error::io(folder.display(), &e))?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
            if name.starts_with(".import-") {
                std::fs::remove_file(&path).map_err(|e| Error::io(path.display(), &e))?;
                recovered.done.push(format!("{}: an interrupted import, removed", path.display()));
            } else if let Some(digest) = name.strip_suffix(".safetensors")
                && gone.remove(digest).is_none()
            {
                recovered.strays.push(digest.to_owned());
            }
        }
        let gone: Vec<&str> = gone.iter().filter(|(_, state)| *state != "missing").map(|(d, _)| d.as_str()).collect();
        let problem = |digest: &str| missing(&self.adapter_path(digest));
        self.set_adapter_states(&gone, "missing", problem)?;
        if let Some(first) = gone.first() {
            let count = gone.len();
            recovered.done.push(format!("{count} adapters without their files, noted as missing: {}", problem(first)));
        }
        Ok(recovered)
    }

    /// Takes in the file `digest` that has no entry: an import, or a removal, that was interrupted. What was done, for
    /// the log.
    pub fn adopt(&self, digest: &str) -> Result<String> {
        let path = self.adapter_path(digest);
        let _whole = self.lock_files();
        let filter = Filter { digest: Some(digest.to_owned()), ..Filter::default() };
        if self.count_adapters(&filter)? > 0 {
            return Ok(format!("{}: in the library again", path.display()));
        }
        match Adapter::open(&path) {
            Ok(adapter) if adapter.digest() == digest => {
                let size = std::fs::metadata(&path).map_or(0, |m| m.len());
                self.add_adapter(&AdapterEntry::of(&adapter, size))?;
                Ok(format!("{}: an import without its entry, added", path.display()))
            }
            // Not ours to delete: an administrator may have put it there.
            Ok(_) => Ok(format!("{}: not in the library, and not named by its digest", path.display())),
            Err(e) => Ok(format!("not in the library, and not valid: {e}")),
        }
    }

    /// Removes an adapter: first its entry, then its file. After an end in between the next start brings it back.
    pub fn remove_adapter(&self, digest: &str) -> Result<()> {
        let path = self.adapter_path(digest);
        let _whole = self.lock_files();
        self.with(|c| c.execute("DELETE FROM adapters WHERE digest = ?", [digest]))?;
        match std::fs::remove_file(&path) {
            Ok(()) => sync_folder(&self.folder().join("adapters")),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(Error::io(path.display(), &e)),
        }
    }

    fn lock_files(&self) -> std::sync::MutexGuard<'_, ()> {
        self.files.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Opens an adapter of the library. A missing or damaged file is noted in the catalogue, and one that is sound again.
    pub fn open_adapter(&self, digest: &str) -> Result<Adapter> {
        let path = self.adapter_path(digest);
        let (state, error) = match Adapter::open(&path) {
            Ok(adapter) if adapter.digest() == digest => {
                self.note(digest, "ok", "");
                return Ok(adapter);
            }
            Ok(adapter) => {
                let reason = format!("{}: its digest is {}; it was altered", path.display(), adapter.digest());
                ("corrupt", Error::new(Kind::InvalidAdapter, reason))
            }
            Err(_) if !path.exists() => ("missing", Error::new(Kind::AdapterNotFound, missing(&path))),
            Err(e) => ("corrupt", e.into()),
        };
        self.note(digest, state, &error.message);
        Err(error)
    }

    /// Notes how a file was found, if the entry says otherwise. Whoever opened the file has its own result to report.
    fn note(&self, digest: &str, state: &str, problem: &str) {
        let noted = self.adapter_state(digest).and_then(|known| match known {
            Some(known) if known != state => self.set_adapter_states(&[digest], state, |_| problem.to_owned()),
            _ => Ok(()),
        });
        if let Err(e) = noted {
            tracing::warn!("{e}");
        }
    }
}

/// What is said of a file that is not there.
fn missing(path: &Path) -> String {
    format!("{}: the library's file is missing; register the adapter again", path.display())
}

/// Makes what was renamed or removed in `folder` survive a power failure.
fn sync_folder(folder: &Path) -> Result<()> {
    File::open(folder).and_then(|f| f.sync_all()).map_err(|e| Error::io(folder.display(), &e))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn an_adapter_that_comes_and_goes_at_once_is_whole_or_gone() {
        let folder = tempfile::tempdir().unwrap();
        let catalogue = Catalogue::open(folder.path()).unwrap();
        let starter = Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("starter");
        let bytes = std::fs::read(starter.join("adapters/poodle.safetensors")).unwrap();
        let digest = catalogue.import_bytes(bytes.clone(), "poodle").unwrap().digest;
        for _ in 0..20 {
            std::thread::scope(|scope| {
                scope.spawn(|| catalogue.import_bytes(bytes.clone(), "poodle").unwrap());
                scope.spawn(|| catalogue.remove_adapter(&digest).unwrap());
            });
            let known = catalogue.count_adapters(&Filter::default()).unwrap() == 1;
            assert_eq!(catalogue.adapter_path(&digest).exists(), known);
        }
    }
    #[test]
    fn a_start_notes_missing_files_and_takes_in_files_without_entries() {
        let folder = tempfile::tempdir().unwrap();
        let catalogue = Catalogue::open(folder.path()).unwrap();
        let starter = Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("starter");
        let import = |name: &str| {
            let bytes = std::fs::read(starter.join(format!("adapters/{name}.safetensors"))).unwrap();
            catalogue.import_bytes(bytes, name).unwrap()
        };
        let (poodle, teddy) = (import("poodle"), import("teddy"));
        let state = |digest: &str| catalogue.adapter_state(digest).unwrap();

        // As kill -9 leaves it: a file that was not complete, a complete one without its entry, an entry alone.
        let half = folder.path().join("adapters/.import-half");
        std::fs::write(&half, [0; 100]).unwrap();
        catalogue.with(|c| c.execute("DELETE FROM adapters WHERE digest = ?", [&teddy.digest])).unwrap();
        let (path, away) = (catalogue.adapter_path(&poodle.digest), folder.path().join("away"));
        std::fs::rename(&path, &away).unwrap();
        let recovered = catalogue.recover().unwrap();
        assert!(!half.exists());
        assert_eq!(recovered.strays, [teddy.digest.as_str()]);
        assert_eq!(recovered.done.len(), 2, "{:?}", recovered.done);
        assert_eq!(state(&poodle.digest).unwrap(), "missing");
        assert!(catalogue.find_adapter(&poodle.digest).unwrap().problem.contains("register the adapter again"));
        assert_eq!(state(&teddy.digest), None);
        assert!(catalogue.adopt(&teddy.digest).unwrap().ends_with("added"));
        assert_eq!(catalogue.find_adapter("teddy").unwrap().size, teddy.size);
        // What was said once is not said again, and a file that is back is sound once it has been read.
        assert_eq!(catalogue.recover().unwrap().done.len(), 0);
        std::fs::rename(&away, &path).unwrap();
        catalogue.open_adapter(&poodle.digest).unwrap();
        assert_eq!(state(&poodle.digest).unwrap(), "ok");
        // A file that is not what its name says stays where it is, and out of the library.
        let digest = "0".repeat(64);
        std::fs::copy(&path, catalogue.adapter_path(&digest)).unwrap();
        assert_eq!(catalogue.recover().unwrap().strays, [digest.as_str()]);
        assert!(catalogue.adopt(&digest).unwrap().contains("not named by its digest"));
        assert_eq!(state(&digest), None);
        assert!(catalogue.adapter_path(&digest).exists());
    }
}
