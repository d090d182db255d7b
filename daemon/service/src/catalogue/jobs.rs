//! The history of jobs, and those that a new daemon goes on with.

use rusqlite::{params, params_from_iter, types::Value};

use super::Catalogue;
use crate::cut::{TEXT_BYTES_MAX, beginning_of, cut};
use crate::error::Result;
use crate::jobs::Job;

/// A job, as the history has it.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // ListJobs in the interface description.
pub struct JobEntry {
    pub id: String,
    pub kind: String,
    pub state: String,
    pub priority: String,
    pub uid: u32,
    pub description: String,
    pub created_usec: u64,
    pub started_usec: u64,
    pub finished_usec: u64,
    pub error: String,
    pub message: String,
    /// What a new daemon needs to go on with it, as JSON.
    pub spec: Option<String>,
}

/// Which jobs of the history.
#[derive(Clone, Debug, Default)]
pub struct JobFilter {
    /// Where it is.
    pub state: Option<String>,
    /// What it does.
    pub kind: Option<String>,
    /// Who asked.
    pub uid: Option<u32>,
}

impl JobEntry {
    /// `job` as it is now.
    pub fn of(job: &Job) -> Self {
        let outcome = job.outcome().and_then(Result::err);
        let (error, message) = outcome.map(|e| (e.name(), e.message)).unwrap_or_default();
        let (state, started_usec, finished_usec) =
            job.status(|s| (s.state.name().to_owned(), s.started_usec, s.finished_usec));
        Self {
            id: job.id.clone(),
            kind: job.kind.to_owned(),
            state,
            priority: job.priority.name().to_owned(),
            uid: job.owner.uid,
            description: job.description.clone(),
            created_usec: job.created_usec,
            started_usec,
            finished_usec,
            error,
            message,
            spec: None,
        }
    }
}

impl Catalogue {
    /// Writes jobs into the history, all in one transaction; what a job had as its spec goes if it has none now.
    pub fn put_jobs(&self, jobs: &[JobEntry], history_max: u64) -> Result<()> {
        self.with(|c| {
            let transaction = c.transaction()?;
            for job in jobs {
                transaction
                    .prepare_cached("INSERT OR REPLACE INTO jobs VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)")?
                    .execute(params![
                        job.id,
                        job.kind,
                        job.state,
                        job.priority,
                        job.uid,
                        job.description,
                        job.created_usec as i64,
                        job.started_usec as i64,
                        job.finished_usec as i64,
                        job.error,
                        job.message,
                        job.spec
                    ])?;
            }
            // What is to go on is never forgotten.
            transaction.execute(
                "DELETE FROM jobs WHERE spec IS NULL AND id NOT IN \
                 (SELECT id FROM jobs ORDER BY created_usec DESC LIMIT ?)",
                [history_max as i64],
            )?;
            transaction.commit()
        })
    }

    /// Takes a job out of the history.
    pub fn forget_job(&self, id: &str) -> Result<()> {
        self.with(|c| c.execute("DELETE FROM jobs WHERE id = ?", [id]).map(drop))
    }

    /// A page of the history, newest first.
    pub fn jobs(&self, filter: &JobFilter, offset: u32, limit: u32) -> Result<Vec<JobEntry>> {
        // Earlier releases kept texts whole, however long.
        let text = |column: &str| beginning_of(column, TEXT_BYTES_MAX);
        let mut sql = format!(
            "SELECT id, kind, state, priority, uid, {}, created_usec, started_usec, finished_usec, error, {}, spec \
             FROM jobs WHERE 1",
            text("description"),
            text("message")
        );
        let mut values: Vec<Value> = Vec::new();
        for (column, value) in [("state", &filter.state), ("kind", &filter.kind)] {
            if let Some(value) = value {
                sql += &format!(" AND {column} = ?");
                values.push(value.clone().into());
            }
        }
        if let Some(uid) = filter.uid {
            sql += " AND uid = ?";
            values.push(uid.into());
        }
        sql += " ORDER BY created_usec DESC, id DESC LIMIT ? OFFSET ?";
        values.extend([limit.into(), offset.into()]);
        self.with(|c| {
            let mut statement = c.prepare_cached(&sql)?;
            let rows = statement.query_map(params_from_iter(values), |row| {
                Ok(JobEntry {
                    id: row.get(0)?,
                    kind: row.get(1)?,
                    state: row.get(2)?,
                    priority: row.get(3)?,
                    uid: row.get(4)?,
                    description: cut(&row.get::<_, String>(5)?, TEXT_BYTES_MAX).into_owned(),
                    created_usec: row.get::<_, i64>(6)? as u64,
                    started_usec: row.get::<_, i64>(7)? as u64,
                    finished_usec: row.get::<_, i64>(8)? as u64,
                    error: row.get(9)?,
                    message: cut(&row.get::<_, String>(10)?, TEXT_BYTES_MAX).into_owned(),
                    spec: row.get(11)?,
                })
            })?;
            rows.collect()
        })
    }

    /// The jobs that the last daemon left unfinished.
    pub fn unfinished_jobs(&self) -> Result<Vec<JobEntry>> {
        let of = |state: &str| JobFilter { state: Some(state.to_owned()), ..JobFilter::default() };
        let mut list = self.jobs(&of("queued"), 0, 100_000)?;
        list.extend(self.jobs(&of("running"), 0, 100_000)?);
        list.sort_by_key(|job| job.created_usec);
        Ok(list)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn long_texts_of_an_earlier_release_are_cut_where_they_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let catalogue = Catalogue::open(folder.path()).unwrap();
        let entry = JobEntry {
            id: "1j1".into(),
            kind: "generate".into(),
            state: "failed".into(),
            priority: "normal".into(),
            uid: 1,
            description: "ü".repeat(64 << 10),
            created_usec: 1,
            started_usec: 2,
            finished_usec: 3,
            error: "x".into(),
            message: "m".repeat(400_000),
            spec: None,
        };
        catalogue.put_jobs(&[entry], 9).unwrap();
        let jobs = catalogue.jobs(&JobFilter::default(), 0, 9).unwrap();
        assert_eq!((jobs[0].description.len(), jobs[0].message.len()), (TEXT_BYTES_MAX - 1, TEXT_BYTES_MAX));
        assert!(jobs[0].description.ends_with("ü...") && jobs[0].message.ends_with("m..."));
    }
}
