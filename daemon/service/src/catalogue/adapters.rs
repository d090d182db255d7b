//! The library of adapters.

use blocklora_spec::{Adapter, Partition};
use rusqlite::types::Value;
use rusqlite::{OptionalExtension, Row, params_from_iter};

use super::{Catalogue, scheme_from_name, scheme_name};
use crate::error::{Error, Kind, Result};
use crate::jobs::now_usec;

/// One adapter, as the catalogue knows it without opening its file.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // The fields of the manifest, and QueryLibrary's in the interface description.
pub struct AdapterEntry {
    pub digest: String,
    pub name: String,
    pub kind: String,
    pub class_word: String,
    pub architecture: String,
    pub base_digest: String,
    pub algorithm: String,
    pub algorithm_version: String,
    pub algorithm_digest: String,
    pub rank: u32,
    pub tokens: u32,
    pub partition: Option<Partition>,
    pub licence: String,
    pub size: u64,
    pub added_usec: u64,
    pub state: String,
    pub problem: String,
}

/// Which adapters, and in which order.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// In name, class word or digest; case does not matter.
    pub text: Option<String>,
    /// (column, value) pairs that must be equal.
    pub equal: Vec<(&'static str, Value)>,
    /// What the digest begins with.
    pub digest: Option<String>,
    /// "name", "added" or "size", with "-" in front descending.
    pub sort: Option<String>,
}

const COLUMNS: &str = "digest, name, kind, class_word, architecture, base_digest, algorithm, algorithm_version, rank, \
     tokens, scheme, capacity, partition_seed, slot, licence, size, added_usec, state, problem, algorithm_digest";

impl AdapterEntry {
    /// What `adapter` says; `size` is its file's.
    pub fn of(adapter: &Adapter, size: u64) -> Self {
        let manifest = adapter.manifest();
        Self {
            digest: adapter.digest().to_owned(),
            name: manifest.name.clone(),
            kind: manifest.kind.name().to_owned(),
            class_word: manifest.class_word.clone(),
            architecture: manifest.base.architecture.clone(),
            base_digest: manifest.base.digest.clone(),
            algorithm: manifest.algorithm.id.clone(),
            algorithm_version: manifest.algorithm.version.clone(),
            algorithm_digest: manifest.algorithm.digest.clone().unwrap_or_default(),
            rank: manifest.rank as u32,
            tokens: manifest.tokens.len() as u32,
            partition: manifest.partition,
            licence: manifest.licence.clone().unwrap_or_default(),
            size,
            added_usec: now_usec(),
            state: "ok".to_owned(),
            problem: String::new(),
        }
    }

    fn from_row(row: &Row) -> rusqlite::Result<Self> {
        let scheme: Option<String> = row.get(10)?;
        let partition = match scheme.as_deref().and_then(scheme_from_name) {
            Some(scheme) => Some(Partition {
                scheme,
                capacity: row.get(11)?,
                seed: row.get::<_, i64>(12)? as u64,
                slot: row.get(13)?,
            }),
            None => None,
        };
        Ok(Self {
            digest: row.get(0)?,
            name: row.get(1)?,
            kind: row.get(2)?,
            class_word: row.get(3)?,
            architecture: row.get(4)?,
            base_digest: row.get(5)?,
            algorithm: row.get(6)?,
            algorithm_version: row.get(7)?,
            rank: row.get(8)?,
            tokens: row.get(9)?,
            partition,
            licence: row.get(14)?,
            size: row.get::<_, i64>(15)? as u64,
            added_usec: row.get::<_, i64>(16)? as u64,
            state: row.get(17)?,
            problem: row.get(18)?,
            algorithm_digest: row.get(19)?,
        })
    }
}

impl Filter {
    fn sql(&self) -> (String, Vec<Value>) {
        let (mut sql, mut values) = (String::new(), Vec::new());
        let mut and = |condition: &str, value: Value| {
            sql += if sql.is_empty() { " WHERE " } else { " AND " };
            sql += condition;
            values.push(value);
        };
        let escaped = |text: &str| text.replace('\\', "\\\\").replace('%', "\\%").replace('_', "\\_");
        if let Some(text) = &self.text {
            and("search LIKE ? ESCAPE '\\'", Value::Text(format!("%{}%", escaped(&text.to_lowercase()))));
        }
        if let Some(digest) = &self.digest {
            // As a range, which the index finds: "g" comes after every hexadecimal digit.
            and("digest >= ?", Value::Text(digest.to_lowercase()));
            and("digest < ?", Value::Text(format!("{}g", digest.to_lowercase())));
        }
        for (column, value) in &self.equal {
            and(&format!("{column} IS ?"), value.clone());
        }
        (sql, values)
    }

    fn order(&self) -> Result<&'static str> {
        Ok(match self.sort.as_deref() {
            None | Some("name") => "name, digest",
            Some("-name") => "name DESC, digest DESC",
            Some("added") => "added_usec, digest",
            Some("-added") => "added_usec DESC, digest DESC",
            Some("size") => "size, digest",
            Some("-size") => "size DESC, digest DESC",
            Some(other) => {
                return Err(Error::option(format!("option \"sort\": {other:?} is not name, added or size")));
            }
        })
    }

    /// Only adapters with this division of the rows, and this slot if one is given.
    pub fn in_partition(&mut self, partition: &Partition, slot: Option<u32>) {
        self.equal.push(("scheme", scheme_name(partition.scheme).to_owned().into()));
        self.equal.push(("capacity", partition.capacity.into()));
        if partition.scheme == blocklora_spec::Scheme::Permuted {
            self.equal.push(("partition_seed", (partition.seed as i64).into()));
        }
        if let Some(slot) = slot {
            self.equal.push(("slot", slot.into()));
        }
    }
}

impl Catalogue {
    /// Adds `entry`; one that is there becomes sound again, and keeps when it was added. Whether it is new.
    pub fn add_adapter(&self, entry: &AdapterEntry) -> Result<bool> {
        let partition = entry.partition.as_ref();
        let search = format!("{}\n{}\n{}", entry.name, entry.class_word, entry.digest).to_lowercase();
        self.with(|c| {
            let transaction = c.transaction()?;
            let known = transaction
                .query_row("SELECT 1 FROM adapters WHERE digest = ?", [&entry.digest], |_| Ok(()))
                .optional()?
                .is_some();
            if known {
                let sql = "UPDATE adapters SET state = 'ok', problem = '' WHERE digest = ? AND state <> 'ok'";
                transaction.execute(sql, [&entry.digest])?;
            } else {
                transaction.execute(
                    &format!("INSERT INTO adapters ({COLUMNS}, search) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"),
                    rusqlite::params![
                        entry.digest,
                        entry.name,
                        entry.kind,
                        entry.class_word,
                        entry.architecture,
                        entry.base_digest,
                        entry.algorithm,
                        entry.algorithm_version,
                        entry.rank,
                        entry.tokens,
                        partition.map(|p| scheme_name(p.scheme)),
                        partition.map(|p| p.capacity),
                        partition.map(|p| p.seed as i64),
                        partition.map(|p| p.slot),
                        entry.licence,
                        entry.size as i64,
                        entry.added_usec as i64,
                        entry.state,
                        entry.problem,
                        entry.algorithm_digest,
                        search
                    ],
                )?;
            }
            transaction.commit()?;
            Ok(!known)
        })
    }

    /// A page of the library.
    pub fn adapters(&self, filter: &Filter, offset: u32, limit: u32) -> Result<Vec<AdapterEntry>> {
        let (condition, mut values) = filter.sql();
        let order = filter.order()?;
        values.extend([Value::Integer(limit.into()), Value::Integer(offset.into())]);
        self.with(|c| {
            let sql = format!("SELECT {COLUMNS} FROM adapters{condition} ORDER BY {order} LIMIT ? OFFSET ?");
            let mut statement = c.prepare_cached(&sql)?;
            statement.query_map(params_from_iter(values), AdapterEntry::from_row)?.collect()
        })
    }

    /// How many adapters `filter` lets through.
    pub fn count_adapters(&self, filter: &Filter) -> Result<u64> {
        let (condition, values) = filter.sql();
        self.with(|c| {
            let mut statement = c.prepare_cached(&format!("SELECT count(*) FROM adapters{condition}"))?;
            statement.query_row(params_from_iter(values), |row| row.get::<_, i64>(0))
        })
        .map(|count| count as u64)
    }

    /// The adapter that `text` names: a digest, 8 or more digits of its beginning, or a name.
    pub fn find_adapter(&self, text: &str) -> Result<AdapterEntry> {
        let hex = text.len() >= 8 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        let mut found = Vec::new();
        if hex {
            let filter = Filter { digest: Some(text.to_owned()), ..Filter::default() };
            found = self.adapters(&filter, 0, 2)?;
        }
        if found.is_empty() {
            let filter = Filter { equal: vec![("name", text.to_owned().into())], ..Filter::default() };
            found = self.adapters(&filter, 0, 2)?;
        }
        let not_found = |message| Err(Error::new(Kind::AdapterNotFound, message));
        match <[AdapterEntry; 1]>::try_from(found) {
            Ok([entry]) => Ok(entry),
            Err(found) if found.is_empty() => not_found(format!("the library has no adapter {text:?}")),
            Err(_) => {
                not_found(format!("{text:?} names more than one adapter of the library; give more of the digest"))
            }
        }
    }

    /// The digest and the state of every adapter.
    pub fn adapter_states(&self) -> Result<Vec<(String, String)>> {
        self.with(|c| {
            let mut statement = c.prepare("SELECT digest, state FROM adapters")?;
            statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?.collect()
        })
    }

    /// The state of one adapter, if the library has it.
    pub fn adapter_state(&self, digest: &str) -> Result<Option<String>> {
        let sql = "SELECT state FROM adapters WHERE digest = ?";
        self.with(|c| c.prepare_cached(sql)?.query_row([digest], |row| row.get(0)).optional())
    }

    /// Notes what is wrong with these adapters' files ("missing", "corrupt"), or that nothing is ("ok").
    pub fn set_adapter_states(&self, digests: &[&str], state: &str, problem: impl Fn(&str) -> String) -> Result<()> {
        self.with(|c| {
            let transaction = c.transaction()?;
            for digest in digests {
                let sql = "UPDATE adapters SET state = ?, problem = ? WHERE digest = ?";
                transaction.prepare_cached(sql)?.execute([state, problem(digest).as_str(), digest])?;
            }
            transaction.commit()
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use blocklora_spec::Scheme;

    use super::*;

    fn entry(i: u32) -> AdapterEntry {
        AdapterEntry {
            digest: format!("{:064x}", u128::from(i).wrapping_mul(0x9e37_79b9_7f4a_7c15)),
            name: format!("concept-{i:05}"),
            kind: ["subject", "person", "scene", "style"][i as usize % 4].into(),
            class_word: ["dog", "cat", "house"][i as usize % 3].into(),
            architecture: "stable-diffusion/test".into(),
            base_digest: "b".repeat(64),
            algorithm: "method".into(),
            algorithm_version: "0.1.0".into(),
            algorithm_digest: String::new(),
            rank: 4,
            tokens: 2,
            partition: Some(Partition { scheme: Scheme::Contiguous, capacity: 16, seed: 0, slot: i % 16 }),
            licence: String::new(),
            size: 1_000_000 + u64::from(i),
            added_usec: u64::from(i),
            state: "ok".into(),
            problem: String::new(),
        }
    }

    #[test]
    fn ten_thousand_adapters_are_filtered_sorted_and_paged() {
        let folder = tempfile::tempdir().unwrap();
        let catalogue = Catalogue::open(folder.path()).unwrap();
        // The fsync of each import is not what is measured here.
        catalogue.lock().pragma_update(None, "synchronous", "OFF").unwrap();
        for i in 0..10_000 {
            assert!(catalogue.add_adapter(&entry(i)).unwrap());
        }
        assert!(!catalogue.add_adapter(&entry(7)).unwrap());
        let check = |filter: Filter, offset: u32, count: u64, first: &str| {
            let page = catalogue.adapters(&filter, offset, 50).unwrap();
            assert_eq!((page[0].name.as_str(), page.len()), (first, 50), "{filter:?}");
            assert_eq!(catalogue.count_adapters(&filter).unwrap(), count, "{filter:?}");
        };
        check(Filter::default(), 0, 10_000, "concept-00000");
        check(Filter::default(), 9_900, 10_000, "concept-09900");
        let sort = Some("-size".to_owned());
        check(Filter { sort, ..Filter::default() }, 100, 10_000, "concept-09899");
        let text = Some("CEPT-012".to_owned());
        check(Filter { text, ..Filter::default() }, 0, 100, "concept-01200");
        let equal = vec![("kind", "person".to_owned().into()), ("class_word", "cat".to_owned().into())];
        check(Filter { equal, ..Filter::default() }, 0, 834, "concept-00001");
        let mut filter = Filter::default();
        filter.in_partition(&entry(0).partition.unwrap(), Some(3));
        check(filter, 0, 625, "concept-00003");
    }

    #[test]
    fn adapters_are_found_by_digest_beginning_and_name() {
        let folder = tempfile::tempdir().unwrap();
        let catalogue = Catalogue::open(folder.path()).unwrap();
        let one = AdapterEntry { digest: "abcdef01".repeat(8), name: "milo".into(), ..entry(1) };
        let two = AdapterEntry { digest: "abcdef02".repeat(8), name: "zuko".into(), ..entry(2) };
        let three = AdapterEntry { digest: "12345678".repeat(8), name: "zuko".into(), ..entry(3) };
        for entry in [&one, &two, &three] {
            catalogue.add_adapter(entry).unwrap();
        }
        assert_eq!(catalogue.find_adapter("abcdef02").unwrap(), two);
        assert_eq!(catalogue.find_adapter("milo").unwrap(), one);
        assert!(catalogue.find_adapter("zuko").unwrap_err().message.contains("more than one"));
        assert_eq!(catalogue.find_adapter("abcdef0").unwrap_err().kind, Kind::AdapterNotFound);
        let capitals = Filter { digest: Some("ABCDEF0".into()), ..Filter::default() };
        assert_eq!(catalogue.count_adapters(&capitals).unwrap(), 2);
        // By the index, whatever the library's size.
        let (condition, values) = Filter { digest: Some("abcdef02".into()), ..Filter::default() }.sql();
        let sql = format!("EXPLAIN QUERY PLAN SELECT count(*) FROM adapters{condition}");
        let plan: String = catalogue.lock().query_row(&sql, params_from_iter(values), |row| row.get(3)).unwrap();
        assert!(plan.starts_with("SEARCH"), "{plan}");
        // What a filter gives to LIKE is text, not a pattern.
        let filter = Filter { text: Some("%".into()), ..Filter::default() };
        assert_eq!(catalogue.count_adapters(&filter).unwrap(), 0);
        catalogue.set_adapter_states(&[one.digest.as_str()], "corrupt", |_| "x".into()).unwrap();
        assert_eq!(catalogue.find_adapter("milo").unwrap().state, "corrupt");
        catalogue.add_adapter(&one).unwrap();
        assert_eq!(catalogue.find_adapter("milo").unwrap().state, "ok");
    }
}
