//! The catalogue's tables, and how older ones become today's.

use rusqlite::Connection;

use crate::error::{Error, Result};

/// Every step from one version to the next; a catalogue of version n has had the first n applied. Steps that were
/// released are never edited.
const MIGRATIONS: [&str; 1] = ["
    CREATE TABLE meta (key TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT;
    CREATE TABLE models (
        id TEXT PRIMARY KEY, path TEXT NOT NULL, digest TEXT NOT NULL, architecture TEXT NOT NULL,
        width INTEGER NOT NULL, height INTEGER NOT NULL, size_multiple INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE adapters (
        digest TEXT PRIMARY KEY, name TEXT NOT NULL, kind TEXT NOT NULL, class_word TEXT NOT NULL,
        architecture TEXT NOT NULL, base_digest TEXT NOT NULL, algorithm TEXT NOT NULL,
        algorithm_version TEXT NOT NULL, algorithm_digest TEXT NOT NULL, rank INTEGER NOT NULL, tokens INTEGER NOT NULL,
        scheme TEXT, capacity INTEGER, partition_seed INTEGER, slot INTEGER,
        licence TEXT NOT NULL, size INTEGER NOT NULL, added_usec INTEGER NOT NULL,
        state TEXT NOT NULL, problem TEXT NOT NULL, search TEXT NOT NULL
    ) STRICT;
    CREATE INDEX adapters_by_name ON adapters (name, digest);
    CREATE INDEX adapters_by_added ON adapters (added_usec, digest);
    CREATE INDEX adapters_by_size ON adapters (size, digest);
    CREATE INDEX adapters_by_slot ON adapters (base_digest, scheme, capacity, partition_seed, slot);
    CREATE TABLE leases (
        id TEXT PRIMARY KEY, base_digest TEXT NOT NULL, scheme TEXT NOT NULL, capacity INTEGER NOT NULL,
        partition_seed INTEGER NOT NULL, slot INTEGER NOT NULL, name TEXT NOT NULL, uid INTEGER NOT NULL,
        expires_usec INTEGER NOT NULL,
        UNIQUE (base_digest, scheme, capacity, partition_seed, slot)
    ) STRICT;
    CREATE TABLE jobs (
        id TEXT PRIMARY KEY, kind TEXT NOT NULL, state TEXT NOT NULL, priority TEXT NOT NULL, uid INTEGER NOT NULL,
        description TEXT NOT NULL, created_usec INTEGER NOT NULL, started_usec INTEGER NOT NULL,
        finished_usec INTEGER NOT NULL, error TEXT NOT NULL, message TEXT NOT NULL, spec TEXT
    ) STRICT;
    CREATE INDEX jobs_by_created ON jobs (created_usec);
"];

/// Brings the catalogue to today's version, each step whole or not at all.
pub fn migrate(connection: &mut Connection) -> Result<()> {
    let version: usize =
        connection.query_row("PRAGMA user_version", [], |row| row.get::<_, i64>(0))?.try_into().unwrap_or(usize::MAX);
    if version > MIGRATIONS.len() {
        return Err(Error::failed(format!(
            "the catalogue has version {version}, this daemon knows {}: install a newer one, or move the catalogue away",
            MIGRATIONS.len()
        )));
    }
    for (number, step) in (version + 1..).zip(&MIGRATIONS[version..]) {
        let transaction = connection.transaction()?;
        transaction.execute_batch(step)?;
        transaction.pragma_update(None, "user_version", number as i64)?;
        transaction.commit()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_new_catalogue_migrates_once_and_a_newer_one_is_refused() {
        let mut connection = Connection::open_in_memory().unwrap();
        migrate(&mut connection).unwrap();
        connection.execute("INSERT INTO meta VALUES ('boot', 3)", []).unwrap();
        migrate(&mut connection).unwrap();
        let boot: i64 = connection.query_row("SELECT value FROM meta", [], |row| row.get(0)).unwrap();
        assert_eq!(boot, 3);
        connection.pragma_update(None, "user_version", 99).unwrap();
        assert!(migrate(&mut connection).unwrap_err().message.contains("version 99"));
    }

    #[test]
    fn a_step_that_fails_leaves_nothing() {
        let mut connection = Connection::open_in_memory().unwrap();
        // In the way of the last table of the step.
        connection.execute_batch("CREATE TABLE jobs (x)").unwrap();
        migrate(&mut connection).unwrap_err();
        let tables: i64 =
            connection.query_row("SELECT count(*) FROM sqlite_master WHERE name = 'meta'", [], |r| r.get(0)).unwrap();
        assert_eq!(tables, 0);
    }
}
