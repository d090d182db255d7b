//! Adding files to the library: whole or not at all.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use blocklora_spec::{Adapter, limits};

use super::Catalogue;
use super::adapters::{AdapterEntry, Filter};
use crate::error::{Error, Kind, Result};
use crate::memfd;

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

    /// Takes what an interrupted import left: a complete file becomes an entry, an incomplete one goes. Returns what was
    /// done, for the log.
    pub fn recover(&self) -> Result<Vec<String>> {
        let folder = self.folder().join("adapters");
        let mut done = Vec::new();
        for item in std::fs::read_dir(&folder).map_err(|e| Error::io(folder.display(), &e))? {
            let path = item.map_err(|e| Error::io(folder.display(), &e))?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
            if name.starts_with(".import-") {
                std::fs::remove_file(&path).map_err(|e| Error::io(path.display(), &e))?;
                done.push(format!("{}: an interrupted import, removed", path.display()));
                continue;
            }
            let Some(digest) = name.strip_suffix(".safetensors") else { continue };
            let filter = Filter { digest: Some(digest.to_owned()), ..Filter::default() };
            if self.count_adapters(&filter)? > 0 {
                continue;
            }
            match Adapter::open(&path) {
                Ok(adapter) if adapter.digest() == digest => {
                    let size = std::fs::metadata(&path).map_or(0, |m| m.len());
                    self.add_adapter(&AdapterEntry::of(&adapter, size))?;
                    done.push(format!("{}: an import without its entry, added", path.display()));
                }
                // Not ours to delete: an administrator may have put it there.
                Ok(_) => done.push(format!("{}: not in the library, and not named by its digest", path.display())),
                Err(e) => done.push(format!("not in the library, and not valid: {e}")),
            }
        }
        Ok(done)
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

    /// Opens an adapter of the library. A missing or damaged file is noted in the catalogue.
    pub fn open_adapter(&self, digest: &str) -> Result<Adapter> {
        let path = self.adapter_path(digest);
        let (state, error) = match Adapter::open(&path) {
            Ok(adapter) if adapter.digest() == digest => return Ok(adapter),
            Ok(adapter) => {
                let reason = format!("{}: its digest is {}; it was altered", path.display(), adapter.digest());
                ("corrupt", Error::new(Kind::InvalidAdapter, reason))
            }
            Err(_) if !path.exists() => {
                let reason = format!("{}: the library's file is missing; register the adapter again", path.display());
                ("missing", Error::new(Kind::AdapterNotFound, reason))
            }
            Err(e) => ("corrupt", e.into()),
        };
        // The first error is the one to report.
        if let Err(e) = self.set_adapter_state(digest, state, &error.message) {
            tracing::warn!("{e}");
        }
        Err(error)
    }
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
}
