//! What the daemon remembers: models, the library of adapters, who holds which slots, and jobs.
//!
//! One SQLite file in the state folder; adapters' files lie beside it, named by their digests. A file is complete before
//! its entry is written, and an entry is never dropped silently.

pub mod adapters;
pub mod import;
pub mod jobs;
pub mod leases;
pub mod models;
mod schema;

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rusqlite::Connection;

use crate::error::{Error, Kind, Result};

/// The catalogue of one state folder.
pub struct Catalogue {
    connection: Mutex<Connection>,
    /// Held while an adapter's file and its entry come or go, so that no other thread sees one without the other.
    files: Mutex<()>,
    folder: PathBuf,
    /// Whether it is only in memory, because the folder cannot be written.
    volatile: bool,
}

impl Catalogue {
    /// Opens the catalogue of `folder`, which exists, and makes it if there is none.
    pub fn open(folder: &Path) -> Result<Self> {
        let path = folder.join("catalogue.sqlite");
        let mut connection = Connection::open(&path)?;
        connection.pragma_update(None, "journal_mode", "WAL")?;
        // A finished transaction survives a power failure, too.
        connection.pragma_update(None, "synchronous", "FULL")?;
        connection.busy_timeout(std::time::Duration::from_secs(5))?;
        schema::migrate(&mut connection).map_err(|e| e.context(path.display()))?;
        let adapters = folder.join("adapters");
        std::fs::create_dir_all(&adapters).map_err(|e| Error::io(adapters.display(), &e))?;
        Ok(Self {
            connection: Mutex::new(connection),
            files: Mutex::default(),
            folder: folder.to_owned(),
            volatile: false,
        })
    }

    /// A catalogue that is gone with the process, for a folder that cannot be written; it begins with what is there.
    pub fn in_memory(folder: &Path) -> Result<Self> {
        let mut connection = Connection::open_in_memory()?;
        schema::migrate(&mut connection)?;
        let path = folder.join("catalogue.sqlite");
        if path.is_file() {
            // Where no file can be made beside it, SQLite reads it only as one that nobody changes.
            let known = ["mode=ro", "immutable=1"].into_iter().map(|how| copy_from(&mut connection, &path, how));
            if let Err(error) = known.reduce(|one, other| one.or(other)).unwrap_or(Ok(())) {
                tracing::error!("{}: cannot be read: {error}", path.display());
            }
        }
        Ok(Self {
            connection: Mutex::new(connection),
            files: Mutex::default(),
            folder: folder.to_owned(),
            volatile: true,
        })
    }

    /// The state folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The file of the adapter `digest`.
    pub fn adapter_path(&self, digest: &str) -> PathBuf {
        self.folder.join("adapters").join(format!("{digest}.safetensors"))
    }

    fn lock(&self) -> MutexGuard<'_, Connection> {
        // SQLite rolls an unfinished transaction back by itself.
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `work` on the database. A disk that is full or read-only is named as such, which SQLite often reports as a
    /// mere input or output error.
    fn with<T>(&self, work: impl FnOnce(&mut Connection) -> rusqlite::Result<T>) -> Result<T> {
        work(&mut self.lock()).map_err(|e| {
            let error = Error::from(e);
            match self.probe() {
                Err(cause) if error.kind == Kind::Failed && !self.volatile => cause,
                _ => error,
            }
        })
    }

    /// Whether the state folder can be written.
    pub fn probe(&self) -> Result<()> {
        let probe = tempfile::Builder::new().prefix(".probe-").tempfile_in(&self.folder);
        let written = probe.and_then(|mut file| std::io::Write::write_all(&mut file, &[0; 4096]));
        written.map_err(|e| Error::io(self.folder.display(), &e))
    }

    /// How often a daemon has started on this state, this start included.
    pub fn next_boot(&self) -> Result<u64> {
        self.with(|c| {
            c.query_row(
                "INSERT INTO meta VALUES ('boot', 1) ON CONFLICT (key) DO UPDATE SET value = value + 1 RETURNING value",
                [],
                |row| row.get::<_, i64>(0),
            )
        })
        .map(|boot| boot as u64)
    }
}

/// Copies the catalogue in the file `path`, if it has today's tables.
fn copy_from(connection: &mut Connection, path: &Path, how: &str) -> rusqlite::Result<()> {
    let uri = format!("file:{}?{how}", path.display().to_string().replace('%', "%25").replace('?', "%3f"));
    connection.execute("ATTACH ? AS old", [uri])?;
    let copied = (|| {
        let transaction = connection.transaction()?;
        for table in ["meta", "models", "adapters", "leases", "jobs"] {
            transaction.execute(&format!("INSERT OR REPLACE INTO main.{table} SELECT * FROM old.{table}"), [])?;
        }
        transaction.commit()
    })();
    connection.execute("DETACH old", [])?;
    copied
}

/// The columns of a partition: scheme's name, capacity, seed.
fn scheme_name(scheme: blocklora_spec::Scheme) -> &'static str {
    match scheme {
        blocklora_spec::Scheme::Contiguous => "contiguous",
        blocklora_spec::Scheme::Strided => "strided",
        blocklora_spec::Scheme::Permuted => "permuted",
    }
}

/// The scheme called `name`.
pub fn scheme_from_name(name: &str) -> Option<blocklora_spec::Scheme> {
    use blocklora_spec::Scheme::{Contiguous, Permuted, Strided};
    [Contiguous, Strided, Permuted].into_iter().find(|scheme| scheme_name(*scheme) == name)
}
