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
    /// Why it is only in memory, if it is: the folder cannot be written.
    volatile: Mutex<Option<Error>>,
}

impl Catalogue {
    /// Opens the catalogue of `folder`, which exists, and makes it if there is none.
    pub fn open(folder: &Path) -> Result<Self> {
        Ok(Self::new(connect(folder)?, folder, None))
    }

    fn new(connection: Connection, folder: &Path, volatile: Option<Error>) -> Self {
        Self {
            connection: Mutex::new(connection),
            files: Mutex::default(),
            folder: folder.to_owned(),
            volatile: Mutex::new(volatile),
        }
    }

    /// A catalogue in memory, for a folder that cannot be written because of `cause`; it begins with what is there.
    pub fn in_memory(folder: &Path, cause: Error) -> Result<Self> {
        let mut connection = Connection::open_in_memory()?;
        schema::migrate(&mut connection)?;
        let path = folder.join("catalogue.sqlite");
        if path.is_file() {
            // Where no file can be made beside it, SQLite reads it only as one that nobody changes.
            let known = copy_from(&mut connection, &path, "mode=ro");
            if let Err(error) = known.or_else(|_| copy_from(&mut connection, &path, "immutable=1")) {
                tracing::error!("{}: cannot be read: {error}", path.display());
            }
        }
        Ok(Self::new(connection, folder, Some(cause)))
    }

    /// Goes over to the catalogue in the folder, if that can be written now; it counts as one in memory until
    /// [`Self::lasts`]. What was in memory alone was promised to nobody.
    pub fn reopen(&self) -> Result<()> {
        let opened = self.probe().and_then(|()| connect(&self.folder));
        opened.map(|opened| *self.lock() = opened).inspect_err(|error| *self.lock_volatile() = Some(error.clone()))
    }

    /// What it is told is remembered from now on.
    pub fn lasts(&self) {
        *self.lock_volatile() = None;
    }

    /// Whether it is only in memory.
    pub fn is_volatile(&self) -> bool {
        self.lock_volatile().is_some()
    }

    /// Fails while it is only in memory: what is to be remembered is refused rather than forgotten.
    pub fn lasting(&self) -> Result<()> {
        self.lock_volatile().clone().map_or(Ok(()), |cause| {
            let message = format!("{}; nothing is remembered until the state folder can be written", cause.message);
            Err(Error::new(cause.kind, message))
        })
    }

    fn lock_volatile(&self) -> MutexGuard<'_, Option<Error>> {
        self.volatile.lock().unwrap_or_else(PoisonError::into_inner)
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
                Err(cause) if error.kind == Kind::Failed && !self.is_volatile() => cause,
                _ => error,
            }
        })
    }

    /// Whether the state folder can be written.
    pub fn probe(&self) -> Result<()> {
        probe(&self.folder)
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

fn probe(folder: &Path) -> Result<()> {
    let probe = tempfile::Builder::new().prefix(".probe-").tempfile_in(folder);
    let written = probe.and_then(|mut file| std::io::Write::write_all(&mut file, &[0; 4096]));
    written.map_err(|e| Error::io(folder.display(), &e))
}

/// Opens the database of `folder`. A disk that is full or read-only is named as such.
fn connect(folder: &Path) -> Result<Connection> {
    open_database(folder).map_err(|error| match probe(folder) {
        Err(cause) if error.kind == Kind::Failed => cause,
        _ => error,
    })
}

fn open_database(folder: &Path) -> Result<Connection> {
    let path = folder.join("catalogue.sqlite");
    let mut connection = Connection::open(&path)?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    // A finished transaction survives a power failure, too.
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.busy_timeout(std::time::Duration::from_secs(5))?;
    schema::migrate(&mut connection).map_err(|e| e.context(path.display()))?;
    let adapters = folder.join("adapters");
    std::fs::create_dir_all(&adapters).map_err(|e| Error::io(adapters.display(), &e))?;
    Ok(connection)
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
