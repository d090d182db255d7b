//! Which rows a concept is to own.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::{File, TryLockError};
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use blocklora_client::{Partition as Division, Train};
use blocklora_spec::{Adapter, Partition, Scheme};

use super::{Slot, checkpoint};
use crate::daemon::Daemon;
use crate::failure;

/// The partition where neither settings nor options name one: the paper's blocks, for up to 16 concepts.
const PARTITION: Partition = Partition { scheme: Scheme::Contiguous, capacity: 16, seed: 0, slot: 0 };

/// Rows to own.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rows {
    /// As the method has it.
    Default,
    /// All, although the method would confine itself to a slot.
    All,
    /// This slot, or the lowest free one.
    Slot(Partition, Option<u32>),
}

impl Rows {
    /// The rows that the option `--slot`, the method, which may or may not have slots, and the settings ask for. Errors: a
    /// slot where there is none.
    pub fn asked_for(
        slot: Option<Slot>,
        method: &str,
        has_slots: bool,
        partition: Option<&Partition>,
    ) -> anyhow::Result<Self> {
        if !has_slots {
            return match slot {
                Some(Slot::Number(_)) => {
                    failure::usage(format!("--slot: {method} owns all rows; leave it out or use --method blocklora"))
                }
                _ => Ok(Self::Default),
            };
        }
        let division = partition.copied().unwrap_or(PARTITION);
        match slot {
            Some(Slot::None) => Ok(Self::All),
            Some(Slot::Number(slot)) if slot < division.capacity => Ok(Self::Slot(division, Some(slot))),
            Some(Slot::Number(slot)) => {
                failure::usage(format!("--slot {slot}: the partition has the slots 0 to {}", division.capacity - 1))
            }
            // The settings chose a slot themselves.
            None if partition.is_some() => Ok(Self::Slot(division, Some(division.slot))),
            None => Ok(Self::Slot(division, None)),
        }
    }

    /// With the slot decided: that of the run which goes on, or the lowest one that neither an adapter or a training
    /// beside `output` has nor, in a running daemon, one of the library or a lease. With a private daemon it is noted.
    pub async fn decided(self, output: &Path, daemon: &Daemon, base_digest: &str) -> anyhow::Result<Self> {
        let Self::Slot(partition, slot) = self else { return Ok(self) };
        let folder = output.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let _lock = lock(folder).await;
        let noted = checkpoint::slot(output).filter(|noted| daemon.is_private() && noted.same_division(&partition));
        let slot = match slot.or(noted.map(|noted| noted.slot)) {
            Some(slot) => slot,
            None => free(folder, output, daemon, base_digest, &partition).await?,
        };
        let partition = Partition { slot, ..partition };
        if daemon.is_private() {
            checkpoint::note_slot(output, &partition)?;
        }
        Ok(Self::Slot(partition, Some(slot)))
    }

    /// Asks for them.
    pub fn apply(&self, request: &mut Train) {
        match self {
            Self::Default => {}
            Self::All => request.all_rows = Some(true),
            Self::Slot(partition, slot) => {
                request.partition = Some(division(partition));
                request.slot = *slot;
            }
        }
    }
}

impl fmt::Display for Rows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("the method's rows"),
            Self::All => f.write_str("all rows"),
            Self::Slot(partition, Some(slot)) => write!(f, "slot {slot} of {}", partition.capacity),
            Self::Slot(partition, None) => write!(f, "a slot of {}", partition.capacity),
        }
    }
}

fn division(partition: &Partition) -> Division {
    let scheme = format!("{:?}", partition.scheme).to_lowercase();
    Division { scheme, capacity: partition.capacity, seed: partition.seed }
}

/// A lock on `folder` while a slot is chosen: of two trainings that begin at once, the second one finds what the first
/// one notes. None where folders cannot be locked, or somebody has it for longer than choosing takes.
async fn lock(folder: &Path) -> Option<File> {
    let file = File::open(folder).ok()?;
    for _ in 0..100 {
        match file.try_lock() {
            Ok(()) => return Some(file),
            Err(TryLockError::WouldBlock) => tokio::time::sleep(Duration::from_millis(20)).await,
            Err(TryLockError::Error(_)) => return None,
        }
    }
    None
}

/// The lowest slot of `partition` that nobody has.
async fn free(
    folder: &Path,
    output: &Path,
    daemon: &Daemon,
    base_digest: &str,
    partition: &Partition,
) -> anyhow::Result<u32> {
    let mut taken = taken_beside(folder, output, partition)?;
    if !daemon.is_private() {
        let slots = daemon.client.slots(Some(base_digest), Some(&division(partition))).await?;
        taken.extend(slots.into_iter().map(|slot| slot.slot));
    }
    (0..partition.capacity).find(|slot| !taken.contains(slot)).with_context(|| {
        format!(
            "all {} slots are taken, by adapters and trainings in the output's folder or in the daemon's library: choose \
             one with --slot, or settings with a larger capacity",
            partition.capacity
        )
    })
}

/// The slots of `partition` that other adapters in `folder`, beside `output`, have, and trainings that are to become one.
fn taken_beside(folder: &Path, output: &Path, partition: &Partition) -> anyhow::Result<BTreeSet<u32>> {
    let mut taken = BTreeSet::new();
    for entry in folder.read_dir().with_context(|| folder.display().to_string())? {
        let path = entry.with_context(|| folder.display().to_string())?.path();
        let is_adapter = path.extension().is_some_and(|e| e == "safetensors") && path.file_name() != output.file_name();
        // Other safetensors files may lie there, too: what is not an adapter owns no slot.
        let adapter = if is_adapter { Adapter::open(&path).ok() } else { None };
        let training = if checkpoint::is_of(output, &path) { None } else { checkpoint::slot_in(&path) };
        let owned = adapter.and_then(|adapter| adapter.manifest().partition).or(training);
        taken.extend(owned.filter(|owned| owned.same_division(partition)).map(|owned| owned.slot));
    }
    Ok(taken)
}
