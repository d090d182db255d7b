//! Registered models.

use std::path::PathBuf;

use rusqlite::params;

use super::Catalogue;
use crate::error::Result;

/// A model, as the catalogue knows it without loading it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ModelEntry {
    /// Its id.
    pub id: String,
    /// Its folder.
    pub path: PathBuf,
    /// Of its weights; empty before it was loaded once.
    pub digest: String,
    /// Likewise.
    pub architecture: String,
    /// Pixels; 0 before it was loaded once.
    pub width: u32,
    /// Likewise.
    pub height: u32,
    /// Sides of pictures are multiples of this; likewise.
    pub size_multiple: u32,
}

impl Catalogue {
    /// All models, by id.
    pub fn models(&self) -> Result<Vec<ModelEntry>> {
        self.with(|c| {
            let sql = "SELECT id, path, digest, architecture, width, height, size_multiple FROM models ORDER BY id";
            let mut statement = c.prepare_cached(sql)?;
            let rows = statement.query_map([], |row| {
                Ok(ModelEntry {
                    id: row.get(0)?,
                    path: PathBuf::from(row.get::<_, String>(1)?),
                    digest: row.get(2)?,
                    architecture: row.get(3)?,
                    width: row.get(4)?,
                    height: row.get(5)?,
                    size_multiple: row.get(6)?,
                })
            })?;
            rows.collect()
        })
    }

    /// Adds or changes a model.
    pub fn put_model(&self, model: &ModelEntry) -> Result<()> {
        self.with(|c| {
            c.execute(
                "INSERT OR REPLACE INTO models VALUES (?, ?, ?, ?, ?, ?, ?)",
                params![
                    model.id,
                    model.path.to_string_lossy(),
                    model.digest,
                    model.architecture,
                    model.width,
                    model.height,
                    model.size_multiple
                ],
            )
            .map(drop)
        })
    }

    /// Forgets a model.
    pub fn remove_model(&self, id: &str) -> Result<()> {
        self.with(|c| c.execute("DELETE FROM models WHERE id = ?", [id]).map(drop))
    }
}
