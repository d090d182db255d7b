//! The slot registry: who owns which rows.

use blocklora_spec::{Partition, Scheme};
use rusqlite::{OptionalExtension, Row, Transaction, params};

use super::{Catalogue, scheme_from_name, scheme_name};
use crate::cut::{NAME_BYTES_MAX, beginning_of, cut};
use crate::error::{Error, Kind, Result};
use crate::jobs::now_usec;

/// A slot that somebody reserved.
#[derive(Clone, Debug, PartialEq)]
pub struct Lease {
    /// Its id.
    pub id: String,
    /// Digest of the model whose rows it is about.
    pub base_digest: String,
    /// Which slot of which division.
    pub partition: Partition,
    /// What for; cut where an earlier release kept a long one.
    pub name: String,
    /// Who has it.
    pub uid: u32,
    /// When it ends; 0: never.
    pub expires_usec: u64,
}

/// Who wants a slot.
#[derive(Clone, Copy, Debug)]
pub struct Claim<'a> {
    /// The job whose training it is for: the lease has its id, and goes when it is over.
    pub training: Option<&'a str>,
    /// What for.
    pub name: &'a str,
    /// Who.
    pub uid: u32,
    /// When it ends; 0: never.
    pub expires_usec: u64,
}

impl<'a> Claim<'a> {
    /// For the training that `job` is.
    pub fn of_training(job: &'a str, name: &'a str, uid: u32) -> Self {
        Self { training: Some(job), name, uid, expires_usec: 0 }
    }
}

/// Who owns a slot.
#[derive(Clone, Debug, PartialEq)]
pub enum Holder {
    /// An adapter: name and digest.
    Adapter(String, String),
    /// A lease.
    Lease(Lease),
}

/// One owned slot.
#[derive(Clone, Debug, PartialEq)]
pub struct SlotEntry {
    /// Digest of the model.
    pub base_digest: String,
    /// Which slot of which division.
    pub partition: Partition,
    /// Who owns it.
    pub holder: Holder,
}

/// Which slots are wanted.
#[derive(Clone, Debug, Default)]
pub struct SlotFilter {
    /// Of the model with this digest.
    pub base_digest: Option<String>,
    /// Of this division of the rows, whatever its slot.
    pub partition: Option<Partition>,
}

impl SlotEntry {
    /// Of base_digest, scheme, capacity, seed, slot, is_adapter, name, digest, lease, uid, expires_usec.
    fn from_row(row: &Row) -> rusqlite::Result<Self> {
        let base_digest: String = row.get(0)?;
        let scheme = scheme_from_name(&row.get::<_, String>(1)?).unwrap_or(Scheme::Contiguous);
        let seed = row.get::<_, i64>(3)? as u64;
        let partition = Partition { scheme, capacity: row.get(2)?, seed, slot: row.get(4)? };
        let holder = match row.get(5)? {
            true => Holder::Adapter(row.get(6)?, row.get(7)?),
            false => Holder::Lease(Lease {
                id: row.get(8)?,
                base_digest: base_digest.clone(),
                partition,
                name: cut(&row.get::<_, String>(6)?, NAME_BYTES_MAX).into_owned(),
                uid: row.get(9)?,
                expires_usec: row.get::<_, i64>(10)? as u64,
            }),
        };
        Ok(Self { base_digest, partition, holder })
    }
}

/// Permutations depend on the seed; for other schemes it means nothing and is kept as 0.
fn canonical(partition: &Partition) -> Partition {
    let seed = if partition.scheme == Scheme::Permuted { partition.seed } else { 0 };
    Partition { seed, ..*partition }
}

fn drop_expired(transaction: &Transaction) -> rusqlite::Result<()> {
    let sql = "DELETE FROM leases WHERE expires_usec <> 0 AND expires_usec < ?";
    transaction.execute(sql, [now_usec() as i64]).map(drop)
}

/// Who owns `partition`'s slot of the model, as text.
fn holder(transaction: &Transaction, base: &str, partition: &Partition) -> rusqlite::Result<Option<String>> {
    let key = params![base, scheme_name(partition.scheme), partition.capacity, partition.seed as i64, partition.slot];
    const WHERE: &str = "base_digest = ? AND scheme = ? AND capacity = ? AND partition_seed = ? AND slot = ?";
    let name = beginning_of("name", NAME_BYTES_MAX);
    let lease = transaction.query_row(&format!("SELECT {name}, uid FROM leases WHERE {WHERE}"), key, |row| {
        let (name, uid): (String, u32) = (row.get(0)?, row.get(1)?);
        let name = cut(&name, NAME_BYTES_MAX);
        Ok(if name.is_empty() { format!("a lease of user {uid}") } else { format!("the lease {name:?} of user {uid}") })
    });
    if let Some(lease) = lease.optional()? {
        return Ok(Some(lease));
    }
    // The seed of an adapter's partition counts only where it means something.
    let any_seed = partition.scheme != Scheme::Permuted;
    let sql = "SELECT name FROM adapters WHERE base_digest = ? AND scheme = ? AND capacity = ? \
               AND (? OR partition_seed = ?) AND slot = ? LIMIT 1";
    let key = params![
        base,
        scheme_name(partition.scheme),
        partition.capacity,
        any_seed,
        partition.seed as i64,
        partition.slot
    ];
    transaction.query_row(sql, key, |row| Ok(format!("the adapter {:?}", row.get::<_, String>(0)?))).optional()
}

fn no_lease(id: &str) -> Error {
    Error::option(format!("there is no lease {id:?}; it may have expired, or be that of a training already"))
}

impl Catalogue {
    /// Reserves `slot`, or the lowest free one, of `partition` (whose own slot is not looked at) on the model `base`.
    pub fn lease(&self, base: &str, partition: &Partition, slot: Option<u32>, claim: &Claim) -> Result<Lease> {
        let Claim { training, name, uid, expires_usec } = *claim;
        let partition = canonical(partition);
        let outcome = self.with(|c| {
            let transaction = c.transaction()?;
            drop_expired(&transaction)?;
            let mut taken_by = None;
            let mut chosen = None;
            for slot in slot.map_or(0..partition.capacity, |slot| slot..slot.saturating_add(1)) {
                taken_by = holder(&transaction, base, &Partition { slot, ..partition })?;
                if taken_by.is_none() {
                    chosen = Some(slot);
                    break;
                }
            }
            let Some(chosen) = chosen else { return Ok(Err(taken_by)) };
            let number: i64 = transaction.query_row(
                "INSERT INTO meta VALUES ('lease', 1) ON CONFLICT (key) DO UPDATE SET value = value + 1 RETURNING value",
                [],
                |row| row.get(0),
            )?;
            let id = training.map_or_else(|| format!("lease{number}"), str::to_owned);
            transaction.execute(
                "INSERT INTO leases VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                params![
                    id,
                    base,
                    scheme_name(partition.scheme),
                    partition.capacity,
                    partition.seed as i64,
                    chosen,
                    name,
                    uid,
                    expires_usec as i64
                ],
            )?;
            transaction.commit()?;
            let partition = Partition { slot: chosen, ..partition };
            Ok(Ok(Lease { id, base_digest: base.to_owned(), partition, name: name.to_owned(), uid, expires_usec }))
        })?;
        outcome.map_err(|holder| {
            let message = match (slot, holder) {
                (Some(slot), Some(holder)) => format!("slot {slot} belongs to {holder}; choose another one"),
                _ => format!("all {} slots are taken; choose a partition with a larger capacity", partition.capacity),
            };
            Error::new(Kind::SlotConflict, message)
        })
    }

    /// The lease `id`.
    pub fn find_lease(&self, id: &str) -> Result<Lease> {
        let sql = format!(
            "SELECT base_digest, scheme, capacity, partition_seed, slot, 0, {}, '', id, uid, expires_usec \
             FROM leases WHERE id = ? AND (expires_usec = 0 OR expires_usec >= ?)",
            beginning_of("name", NAME_BYTES_MAX)
        );
        let entry = self.with(|c| c.query_row(&sql, params![id, now_usec() as i64], SlotEntry::from_row).optional())?;
        match entry.map(|entry| entry.holder) {
            Some(Holder::Lease(lease)) => Ok(lease),
            _ => Err(no_lease(id)),
        }
    }

    /// Makes a lease that of the training `job` alone: it has the job's id from now on, and does not expire. One lease is
    /// taken over once.
    pub fn take_over(&self, id: &str, job: &str) -> Result<()> {
        let sql = "UPDATE leases SET id = ?, expires_usec = 0 WHERE id = ? AND (expires_usec = 0 OR expires_usec >= ?)";
        match self.with(|c| c.execute(sql, params![job, id, now_usec() as i64]))? {
            0 => Err(no_lease(id)),
            _ => Ok(()),
        }
    }

    /// Takes [`Self::take_over`] back: `lease` is what it was before.
    pub fn hand_back(&self, lease: &Lease, job: &str) -> Result<()> {
        let sql = "UPDATE leases SET id = ?, expires_usec = ? WHERE id = ?";
        self.with(|c| c.execute(sql, params![lease.id, lease.expires_usec as i64, job]).map(drop))
    }

    /// Gives a lease back; one that is gone already is no error.
    pub fn release(&self, id: &str) -> Result<()> {
        self.with(|c| c.execute("DELETE FROM leases WHERE id = ?", [id]).map(drop))
    }

    /// Gives back the leases of trainings other than `jobs`; how many there were.
    pub fn release_trainings_but(&self, jobs: &[String]) -> Result<usize> {
        let jobs = serde_json::to_string(jobs).map_err(|e| Error::failed(e.to_string()))?;
        let sql = "DELETE FROM leases WHERE id NOT LIKE 'lease%' AND id NOT IN (SELECT value FROM json_each(?))";
        self.with(|c| c.execute(sql, [jobs]))
    }

    /// A page of the owned slots, by model, division and slot; of one slot leases first, then adapters.
    pub fn slots(&self, filter: &SlotFilter, offset: u32, limit: u32) -> Result<Vec<SlotEntry>> {
        let name = beginning_of("name", NAME_BYTES_MAX);
        let sql = format!(
            "SELECT * FROM ( \
                     SELECT base_digest, scheme, capacity, partition_seed AS seed, slot, 0 AS is_adapter, \
                       {name} AS name, \
                       '' AS digest, id, uid, expires_usec FROM leases WHERE expires_usec = 0 OR expires_usec >= ?1 \
                     UNION ALL \
                     SELECT base_digest, scheme, capacity, CASE scheme WHEN 'permuted' THEN partition_seed ELSE 0 END, \
                       slot, 1, name, digest, '', 0, 0 FROM adapters WHERE scheme IS NOT NULL \
                   ) WHERE (?2 IS NULL OR base_digest = ?2) \
                     AND (?3 IS NULL OR (scheme = ?3 AND capacity = ?4 AND seed = ?5)) \
                   ORDER BY base_digest, scheme, capacity, seed, slot, is_adapter, name, digest LIMIT ?6 OFFSET ?7"
        );
        let partition = filter.partition.as_ref().map(canonical);
        let partition = partition.as_ref();
        self.with(|c| {
            let values = params![
                now_usec() as i64,
                filter.base_digest,
                partition.map(|p| scheme_name(p.scheme)),
                partition.map(|p| p.capacity),
                partition.map(|p| p.seed as i64),
                limit,
                offset
            ];
            c.prepare_cached(&sql)?.query_map(values, SlotEntry::from_row)?.collect()
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const PARTITION: Partition = Partition { scheme: Scheme::Contiguous, capacity: 3, seed: 9, slot: 0 };

    #[test]
    fn a_slot_is_leased_once() {
        let folder = tempfile::tempdir().unwrap();
        let catalogue = Catalogue::open(folder.path()).unwrap();
        let claim = Claim { training: None, name: "milo", uid: 7, expires_usec: 0 };
        let lease = |slot| catalogue.lease("base", &PARTITION, slot, &claim);
        assert_eq!(lease(Some(1)).unwrap().partition.slot, 1);
        assert_eq!(lease(None).unwrap().partition.slot, 0);
        let error = lease(Some(1)).unwrap_err();
        assert_eq!(error.kind, Kind::SlotConflict);
        assert!(error.message.contains("the lease \"milo\" of user 7"), "{error}");
        let last = lease(None).unwrap();
        assert_eq!(last.partition.slot, 2);
        assert!(lease(None).unwrap_err().message.contains("all 3 slots"));
        // Another model's rows are others.
        assert_eq!(catalogue.lease("other", &PARTITION, None, &claim).unwrap().partition.slot, 0);
        catalogue.release(&last.id).unwrap();
        assert_eq!(lease(None).unwrap().partition.slot, 2);
        let all = catalogue.slots(&SlotFilter::default(), 0, 100).unwrap();
        assert_eq!(all.len(), 4);
        // Pages are cut out of the whole list.
        let pages = (0..3).map(|page| catalogue.slots(&SlotFilter::default(), 2 * page, 2).unwrap());
        assert_eq!(pages.collect::<Vec<_>>().concat(), all);
        let of = |base: Option<&str>, partition: Option<Partition>| {
            let filter = SlotFilter { base_digest: base.map(str::to_owned), partition };
            catalogue.slots(&filter, 0, 100).unwrap().len()
        };
        let seed = Partition { seed: 1, ..PARTITION };
        let other = Partition { capacity: 4, ..PARTITION };
        assert_eq!((of(Some("base"), None), of(Some("base"), Some(seed)), of(None, Some(other))), (3, 3, 0));
    }

    #[test]
    fn a_long_name_of_an_earlier_release_is_cut_where_it_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let catalogue = Catalogue::open(folder.path()).unwrap();
        let name = "ü".repeat(1 << 20);
        let claim = Claim { training: None, name: &name, uid: 7, expires_usec: 0 };
        let id = catalogue.lease("base", &PARTITION, Some(1), &claim).unwrap().id;
        let shown = format!("{}...", "ü".repeat(30));
        assert_eq!(catalogue.find_lease(&id).unwrap().name, shown);
        let slots = catalogue.slots(&SlotFilter::default(), 0, 9).unwrap();
        assert!(matches!(&slots[0].holder, Holder::Lease(lease) if lease.name == shown), "{:?}", slots[0]);
        let error = catalogue.lease("base", &PARTITION, Some(1), &claim).unwrap_err();
        assert_eq!(error.message, format!("slot 1 belongs to the lease {shown:?} of user 7; choose another one"));
    }

    #[test]
    fn a_lease_expires() {
        let folder = tempfile::tempdir().unwrap();
        let catalogue = Catalogue::open(folder.path()).unwrap();
        let claim = Claim { training: None, name: "", uid: 1, expires_usec: 1 };
        let past = catalogue.lease("base", &PARTITION, Some(0), &claim).unwrap();
        assert!(catalogue.find_lease(&past.id).unwrap_err().message.contains("expired"));
        let claim = Claim { expires_usec: 0, ..claim };
        assert_eq!(catalogue.lease("base", &PARTITION, Some(0), &claim).unwrap().partition.slot, 0);
    }

    #[test]
    fn a_lease_is_one_trainings() {
        let folder = tempfile::tempdir().unwrap();
        let catalogue = Catalogue::open(folder.path()).unwrap();
        let claim = Claim { training: None, name: "", uid: 1, expires_usec: u64::MAX >> 1 };
        let lease = catalogue.lease("base", &PARTITION, Some(2), &claim).unwrap();
        catalogue.take_over(&lease.id, "1j1").unwrap();
        let error = catalogue.take_over(&lease.id, "1j2").unwrap_err();
        assert!(error.message.contains("that of a training already"), "{error}");
        let taken = catalogue.find_lease("1j1").unwrap();
        assert_eq!((taken.partition, taken.expires_usec), (lease.partition, 0));
        catalogue.hand_back(&lease, "1j1").unwrap();
        assert_eq!(catalogue.find_lease(&lease.id).unwrap(), lease);
        assert!(catalogue.find_lease("1j1").is_err());
    }

    #[test]
    fn leases_of_trainings_that_are_no_more_are_given_back() {
        let folder = tempfile::tempdir().unwrap();
        let catalogue = Catalogue::open(folder.path()).unwrap();
        let claims = [None, Some("1j1"), Some("1j2")];
        for training in claims {
            let claim = Claim { training, name: "rex", uid: 1, expires_usec: 0 };
            catalogue.lease("base", &PARTITION, None, &claim).unwrap();
        }
        assert_eq!(catalogue.release_trainings_but(&["1j2".to_owned()]).unwrap(), 1);
        assert!(catalogue.find_lease("1j1").is_err());
        assert!(catalogue.find_lease("1j2").is_ok() && catalogue.find_lease("lease1").is_ok());
    }
}
