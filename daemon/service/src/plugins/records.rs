//! What is known about libraries from before: digests of files, results of scans, quarantines. One JSON file, keyed by
//! the digest of the library, so that another build of a plugin starts anew.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use blocklora_engine::weights::hex;
use rustix::fs::{FlockOperation, Mode, OFlags, flock};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

/// What a scan of a library found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Scanned {
    /// `<kind>-<id>`.
    pub name: String,
    /// The plugin's version.
    pub version: String,
    /// The manifest that it was built with.
    pub manifest: String,
    /// JSON Schema of its settings.
    pub schema: Value,
    /// Its settings if none are given.
    pub defaults: Value,
}

/// One library's record.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// The result of its scan, if it went well.
    pub scanned: Option<Scanned>,
    /// Why it must not be loaded.
    pub quarantine: Option<String>,
    /// How often it crashed, hung or took too much memory.
    pub crashes: u32,
    /// How many processes in a row died in its code.
    #[serde(default)]
    pub deaths: u32,
}

/// What changes when a file is replaced or written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Looks {
    bytes: u64,
    modified: (i64, i64),
    inode: u64,
}

impl Looks {
    fn of(path: &Path) -> std::io::Result<Self> {
        let meta = std::fs::metadata(path)?;
        Ok(Self { bytes: meta.len(), modified: (meta.mtime(), meta.mtime_nsec()), inode: meta.ino() })
    }
}

/// A file whose digest is known as long as it looks the same.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Seen {
    #[serde(flatten)]
    looks: Looks,
    digest: String,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct State {
    libraries: BTreeMap<String, Record>,
    files: BTreeMap<PathBuf, Seen>,
}

/// The records, in memory and in their file.
#[derive(Debug)]
pub struct Records {
    path: PathBuf,
    state: Mutex<Known>,
}

/// What is known, and what the file looked like when it was read or written last.
#[derive(Debug, Default)]
struct Known {
    state: State,
    looks: Option<Looks>,
}

impl Records {
    /// The records in `folder`; none if there is no file yet, or a damaged one.
    pub fn open(folder: &Path) -> Self {
        let path = folder.join("plugins.json");
        Self { path, state: Mutex::default() }
    }

    /// SHA-256 of the file in hex; read again only if the file looks different from last time.
    pub fn digest(&self, path: &Path) -> std::io::Result<String> {
        let looks = Looks::of(path)?;
        if let Some(seen) = self.lock().state.files.get(path).filter(|seen| seen.looks == looks) {
            return Ok(seen.digest.clone());
        }
        let digest = digest_of(&mut open_file(path)?)?;
        let seen = Seen { looks, digest: digest.clone() };
        self.change(|state| drop(state.files.insert(path.to_owned(), seen)));
        Ok(digest)
    }

    /// What is known about the library with this digest, to any process.
    pub fn get(&self, digest: &str) -> Record {
        self.lock().state.libraries.get(digest).cloned().unwrap_or_default()
    }

    /// What the library with this digest is called: the plugin's name and version as far as they are known.
    pub fn name(&self, digest: &str) -> String {
        match self.get(digest).scanned {
            Some(scanned) => format!("the plugin {} {}", scanned.name, scanned.version),
            None => format!("the plugin whose library has the digest {digest:.12}"),
        }
    }

    /// How many processes in a row died in the code of the library with this digest.
    pub fn deaths(&self, digest: &str) -> u32 {
        self.lock().state.libraries.get(digest).map_or(0, |record| record.deaths)
    }

    /// Changes the record of the library with this digest.
    pub fn update(&self, digest: &str, change: impl FnOnce(&mut Record)) {
        self.change(|state| change(state.libraries.entry(digest.to_owned()).or_default()));
    }

    /// What is known, read again where another process has written it.
    fn lock(&self) -> std::sync::MutexGuard<'_, Known> {
        let mut known = self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let looks = Looks::of(&self.path).ok();
        if looks.is_some() && looks != known.looks {
            *known = Known { state: read(&self.path), looks };
        }
        known
    }

    /// Changes what is in the file, which other processes change, too; then takes that over. What cannot be written is
    /// known to this process only: a scan is made again, and a quarantine ends with the process.
    fn change(&self, change: impl FnOnce(&mut State)) {
        // Locked first, so that what is read is what is changed.
        let lock = self.lock_file();
        let mut known = self.lock();
        change(&mut known.state);
        if lock.is_none() {
            return;
        }
        if let Ok(text) = serde_json::to_vec(&known.state)
            && let Err(error) = blocklora_spec::write_atomically(&self.path, &text)
        {
            tracing::warn!("{}: {error}", self.path.display());
        }
        known.looks = Looks::of(&self.path).ok();
        drop(lock);
    }

    fn lock_file(&self) -> Option<File> {
        std::fs::create_dir_all(self.path.parent()?).ok()?;
        let file =
            File::options().create(true).truncate(false).write(true).open(self.path.with_extension("lock")).ok()?;
        flock(&file, FlockOperation::LockExclusive).ok()?;
        Some(file)
    }
}

fn read(path: &Path) -> State {
    std::fs::read(path).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default()
}

/// Opens a file for reading; what is no plain file is an error, and is not waited for.
pub fn open_file(path: &Path) -> std::io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
    if !file.metadata()?.is_file() {
        return Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, "it is no plain file"));
    }
    Ok(file)
}

/// SHA-256 of the rest of `file`, in hex.
pub fn digest_of(file: &mut File) -> std::io::Result<String> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            n => hash.update(&buffer[..n]),
        }
    }
    Ok(hex(&hash.finalize()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn records_survive_and_are_shared() {
        let folder = tempfile::tempdir().unwrap();
        let (one, other) = (Records::open(folder.path()), Records::open(folder.path()));
        one.update("a", |r| r.quarantine = Some("crashed".into()));
        other.update("b", |r| r.crashes += 1);
        let again = Records::open(folder.path());
        assert_eq!(again.get("a").quarantine.as_deref(), Some("crashed"));
        assert_eq!(again.get("b").crashes, 1);
        assert_eq!(other.get("a").quarantine.as_deref(), Some("crashed"));
        assert_eq!(again.get("c"), Record::default());
        // What another process changes is seen by those that read only.
        again.update("a", |r| r.quarantine = None);
        assert_eq!(one.get("a").quarantine, None);
    }

    #[test]
    fn a_changed_file_has_another_digest() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("x.so");
        let records = Records::open(folder.path());
        std::fs::write(&file, "one").unwrap();
        let one = records.digest(&file).unwrap();
        assert_eq!(one, "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed");
        assert_eq!(records.digest(&file).unwrap(), one);
        std::fs::write(&file, "other").unwrap();
        assert_ne!(records.digest(&file).unwrap(), one);
    }

    #[test]
    fn a_damaged_file_is_as_good_as_none() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("plugins.json"), "{\"libraries\": [").unwrap();
        let records = Records::open(folder.path());
        records.update("a", |r| r.crashes = 2);
        assert_eq!(Records::open(folder.path()).get("a").crashes, 2);
    }
}
