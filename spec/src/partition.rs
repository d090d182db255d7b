//! Who owns which output rows of a layer.

use serde::{Deserialize, Serialize};

use crate::rng::{Rng, Stream};

/// How a partition deals the rows 0..m of a layer out to its slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scheme {
    /// Slot s owns rows floor(s m / S) .. floor((s + 1) m / S): the paper's block of rows.
    Contiguous,
    /// Slot s owns the rows p with p mod S = s.
    Strided,
    /// Slot s owns the contiguous block s of a permutation of the rows, which the seed and m determine.
    Permuted,
}

/// One slot of one division of every layer's output rows into `capacity` disjoint sets.
///
/// Two adapters with one division (see [`Partition::same_division`]) and different slots own disjoint rows in every
/// layer; with equal slots they own the same rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Partition {
    /// How rows are dealt out.
    pub scheme: Scheme,
    /// The number of slots S, at least 1.
    pub capacity: u32,
    /// Chooses the permutation; without meaning for the other schemes.
    pub seed: u64,
    /// The slot s, below the capacity.
    pub slot: u32,
}

impl Partition {
    /// The number of rows that the slot owns in a layer of `m` outputs: `self.rows(m).len()`, without making them.
    pub fn count(&self, m: usize) -> usize {
        let (capacity, slot) = (self.capacity as u64, self.slot as u64);
        if slot >= capacity {
            return 0;
        }
        match self.scheme {
            Scheme::Contiguous | Scheme::Permuted => self.block(m).len(),
            Scheme::Strided => (m as u64).saturating_sub(slot).div_ceil(capacity) as usize,
        }
    }

    /// The rows that the slot owns in a layer of `m` outputs, ascending. Empty where m is too small for the slot to
    /// get any, and for a slot that is not below the capacity.
    pub fn rows(&self, m: usize) -> Vec<u32> {
        if self.count(m) == 0 {
            return Vec::new();
        }
        match self.scheme {
            Scheme::Contiguous => self.block(m).map(|p| p as u32).collect(),
            Scheme::Strided => (self.slot as usize..m).step_by(self.capacity as usize).map(|p| p as u32).collect(),
            Scheme::Permuted => {
                let mut order: Vec<u32> = (0..m as u32).collect();
                Rng::new(self.seed, Stream::Partition, m as u32, 0).shuffle(&mut order);
                let mut rows = order.drain(self.block(m)).collect::<Vec<_>>();
                rows.sort_unstable();
                rows
            }
        }
    }

    /// Whether two adapters share one division of the rows, so that different slots are disjoint.
    pub fn same_division(&self, other: &Self) -> bool {
        let seeds_agree = self.scheme != Scheme::Permuted || self.seed == other.seed;
        (self.scheme, self.capacity) == (other.scheme, other.capacity) && seeds_agree
    }

    fn block(&self, m: usize) -> std::ops::Range<usize> {
        let bound = |s: u64| (s as u128 * m as u128 / self.capacity as u128) as usize;
        bound(self.slot as u64)..bound(self.slot as u64 + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(scheme: Scheme, capacity: u32, slot: u32, m: usize) -> Vec<u32> {
        Partition { scheme, capacity, seed: 0, slot }.rows(m)
    }

    #[test]
    fn known_rows() {
        assert_eq!(rows(Scheme::Contiguous, 3, 1, 8), [2, 3, 4]);
        assert_eq!(rows(Scheme::Strided, 3, 1, 8), [1, 4, 7]);
        // Fewer rows than slots: some slots own one row, the others none.
        assert_eq!(
            (0..4).map(|s| rows(Scheme::Contiguous, 4, s, 2)).collect::<Vec<_>>(),
            [vec![], vec![0], vec![], vec![1]]
        );
        assert_eq!(
            (0..4).map(|s| rows(Scheme::Strided, 4, s, 2)).collect::<Vec<_>>(),
            [vec![0], vec![1], vec![], vec![]]
        );
        assert!(rows(Scheme::Contiguous, 3, 3, 8).is_empty());
        // Philox and the shuffle are part of the format: these values never change.
        assert_eq!(rows(Scheme::Permuted, 4, 0, 16), [3, 8, 12, 14]);
        let partition = Partition { scheme: Scheme::Permuted, capacity: 3, seed: (1 << 63) + 5, slot: 1 };
        assert_eq!(partition.rows(10), [4, 6, 8]);
    }
}
