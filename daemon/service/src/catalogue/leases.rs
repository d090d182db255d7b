//! The slot registry: who owns which rows.

use blocklora_spec::{Partition, Scheme};
use rusqlite::{OptionalExtension, Transaction, params};

use super::{Catalogue, scheme_from_name, scheme_name};
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
    /// What for.
    pub name: String,
    /// Who has it.
    pub uid: u32,
    /// When it ends; 0: never.
    pub expires_usec: u64,
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
    let lease = transaction.query_row(&format!("SELECT name, uid FROM leases WHERE {WHERE}"), key, |row| {
        let (name, uid): (String, u32) = (row.get(0)?, row.get(1)?);
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

impl Catalogue {
    /// Reserves `slot`, or the lowest free one, of `partition` (whose own slot is not looked at) on the model `base`.
    pub fn lease(
        &self,
        base: &str,
        partition: &Partition,
        slot: Option<u32>,
        name: &str,
        uid: u32,
        expires_usec: u64,
    ) -> Result<Lease> {
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
            let id = format!("lease{number}");
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
        let found = self.slots()?.into_iter().find_map(|slot| match slot.holder {
            Holder::Lease(lease) if lease.id == id => Some(lease),
            _ => None,
        });
        found.ok_or_else(|| Error::option(format!("there is no lease {id:?}; it may have expired")))
    }

    /// Gives a lease back; one that is gone already is no error.
    pub fn release(&self, id: &str) -> Result<()> {
        self.with(|c| c.execute("DELETE FROM leases WHERE id = ?", [id]).map(drop))
    }

    /// Every owned slot: leases, then adapters.
    pub fn slots(&self) -> Result<Vec<SlotEntry>> {
        self.with(|c| {
            let transaction = c.transaction()?;
            drop_expired(&transaction)?;
            let mut list = Vec::new();
            {
                let mut statement = transaction.prepare_cached(
                    "SELECT id, base_digest, scheme, capacity, partition_seed, slot, name, uid, expires_usec FROM leases \
                     ORDER BY base_digest, scheme, capacity, partition_seed, slot",
                )?;
                let rows = statement.query_map([], |row| {
                    let scheme = scheme_from_name(&row.get::<_, String>(2)?).unwrap_or(Scheme::Contiguous);
                    let seed = row.get::<_, i64>(4)? as u64;
                    let partition = Partition { scheme, capacity: row.get(3)?, seed, slot: row.get(5)? };
                    let (id, base_digest) = (row.get(0)?, row.get::<_, String>(1)?);
                    let expires_usec = row.get::<_, i64>(8)? as u64;
                    let base = base_digest.clone();
                    let lease = Lease { id, base_digest, partition, name: row.get(6)?, uid: row.get(7)?, expires_usec };
                    Ok(SlotEntry { base_digest: base, partition, holder: Holder::Lease(lease) })
                })?;
                list.extend(rows.collect::<rusqlite::Result<Vec<_>>>()?);
                let mut statement = transaction.prepare_cached(
                    "SELECT base_digest, scheme, capacity, partition_seed, slot, name, digest FROM adapters \
                     WHERE scheme IS NOT NULL ORDER BY base_digest, scheme, capacity, partition_seed, slot, name",
                )?;
                let rows = statement.query_map([], |row| {
                    let scheme = scheme_from_name(&row.get::<_, String>(1)?).unwrap_or(Scheme::Contiguous);
                    let seed = row.get::<_, i64>(3)? as u64;
                    let partition = canonical(&Partition { scheme, capacity: row.get(2)?, seed, slot: row.get(4)? });
                    let holder = Holder::Adapter(row.get(5)?, row.get(6)?);
                    Ok(SlotEntry { base_digest: row.get(0)?, partition, holder })
                })?;
                list.extend(rows.collect::<rusqlite::Result<Vec<_>>>()?);
            }
            transaction.commit()?;
            Ok(list)
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
        let lease = |slot| catalogue.lease("base", &PARTITION, slot, "milo", 7, 0);
        assert_eq!(lease(Some(1)).unwrap().partition.slot, 1);
        assert_eq!(lease(None).unwrap().partition.slot, 0);
        let error = lease(Some(1)).unwrap_err();
        assert_eq!(error.kind, Kind::SlotConflict);
        assert!(error.message.contains("the lease \"milo\" of user 7"), "{error}");
        let last = lease(None).unwrap();
        assert_eq!(last.partition.slot, 2);
        assert!(lease(None).unwrap_err().message.contains("all 3 slots"));
        // Another model's rows are others.
        assert_eq!(catalogue.lease("other", &PARTITION, None, "", 7, 0).unwrap().partition.slot, 0);
        catalogue.release(&last.id).unwrap();
        assert_eq!(lease(None).unwrap().partition.slot, 2);
        assert_eq!(catalogue.slots().unwrap().len(), 4);
    }

    #[test]
    fn a_lease_expires() {
        let folder = tempfile::tempdir().unwrap();
        let catalogue = Catalogue::open(folder.path()).unwrap();
        let past = catalogue.lease("base", &PARTITION, Some(0), "", 1, 1).unwrap();
        assert!(catalogue.find_lease(&past.id).unwrap_err().message.contains("expired"));
        assert_eq!(catalogue.lease("base", &PARTITION, Some(0), "", 1, 0).unwrap().partition.slot, 0);
    }
}
