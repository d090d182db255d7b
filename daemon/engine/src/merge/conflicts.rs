//! How much adapters get in each other's way: cosines, sign conflicts, norms and shared rows of their deltas.
//!
//! Inner products come from the factors, `<s B A, s' B' A'> = s s' sum_p B[p] (A A'^T) B'[p]^T` over the shared rows p.
//! Signs need the deltas' entries, of which one row per adapter exists at a time.
//! These are the quantities of BlockLoRA's figure 4; sums are in f64.

use std::collections::BTreeSet;

use rayon::prelude::*;
use serde::Serialize;

use super::adapter::{AdapterFactors, AdapterLayer};
use crate::error::{Error, Result};

/// What two adapters have in common.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Pair {
    /// Index of the one.
    pub one: usize,
    /// Index of the other, larger than `one`.
    pub other: usize,
    /// Cosine of their deltas; 0 where either is zero.
    pub cosine: f64,
    /// The fraction of the entries of all Linears that both change in which their deltas' signs are opposite.
    pub sign_conflicts: f64,
    /// Output rows that both own.
    pub shared_rows: usize,
}

/// One Linear's, or all Linears', figures.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Conflicts {
    /// The Linear; empty for all together.
    pub layer: String,
    /// The Frobenius norm of each adapter's delta; 0 where it has none.
    pub norms: Vec<f64>,
    /// Every pair, (0, 1), (0, 2) ... (1, 2) ...
    pub pairs: Vec<Pair>,
    /// The fraction of entries in which at least two deltas have opposite signs.
    pub sign_conflicts: f64,
}

/// The figures of every Linear that an adapter changes, and of all together.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// The adapters' names, in the order given.
    pub adapters: Vec<String>,
    /// All Linears together.
    pub overall: Conflicts,
    /// Each Linear, sorted by name.
    pub layers: Vec<Conflicts>,
}

/// Sums that add up over Linears.
#[derive(Clone, Debug, Default)]
struct Sums {
    /// Squared norms.
    squares: Vec<f64>,
    /// Per pair: inner product, conflicting entries, entries, shared rows.
    pairs: Vec<(f64, u64, u64, usize)>,
    conflicts: u64,
    entries: u64,
}

/// Compares `adapters` as trained (weight 1) on every Linear. Fails where two of them are for Linears of unequal size.
pub fn conflicts(adapters: &[&AdapterFactors]) -> Result<Report> {
    let names: BTreeSet<&str> = adapters.iter().flat_map(|a| a.layers()).map(|layer| layer.name.as_str()).collect();
    let names: Vec<&str> = names.into_iter().collect();
    let sums = names.par_iter().map(|name| layer_sums(name, adapters)).collect::<Result<Vec<_>>>()?;
    let mut overall = Sums::new(adapters.len());
    sums.iter().for_each(|layer| overall.add(layer));
    Ok(Report {
        adapters: adapters.iter().map(|adapter| adapter.name().to_owned()).collect(),
        overall: overall.conflicts(""),
        layers: names.iter().zip(&sums).map(|(name, sums)| sums.conflicts(name)).collect(),
    })
}

impl Sums {
    fn new(adapters: usize) -> Self {
        let pairs = adapters * adapters.saturating_sub(1) / 2;
        Self { squares: vec![0.0; adapters], pairs: vec![(0.0, 0, 0, 0); pairs], conflicts: 0, entries: 0 }
    }

    fn add(&mut self, other: &Self) {
        self.squares.iter_mut().zip(&other.squares).for_each(|(sum, x)| *sum += x);
        for (sum, x) in self.pairs.iter_mut().zip(&other.pairs) {
            *sum = (sum.0 + x.0, sum.1 + x.1, sum.2 + x.2, sum.3 + x.3);
        }
        self.conflicts += other.conflicts;
        self.entries += other.entries;
    }

    fn conflicts(&self, layer: &str) -> Conflicts {
        let norms: Vec<f64> = self.squares.iter().map(|square| square.sqrt()).collect();
        let ratio = |part: u64, whole: u64| if whole == 0 { 0.0 } else { part as f64 / whole as f64 };
        let pair =
            |((one, other), &(dot, conflicts, entries, shared_rows)): ((usize, usize), &(f64, u64, u64, usize))| {
                let norm = norms[one] * norms[other];
                let cosine = if norm == 0.0 { 0.0 } else { dot / norm };
                Pair { one, other, cosine, sign_conflicts: ratio(conflicts, entries), shared_rows }
            };
        Conflicts {
            layer: layer.to_owned(),
            pairs: pairs(norms.len()).zip(&self.pairs).map(pair).collect(),
            norms: norms.clone(),
            sign_conflicts: ratio(self.conflicts, self.entries),
        }
    }
}

fn pairs(count: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..count).flat_map(move |one| (one + 1..count).map(move |other| (one, other)))
}

fn layer_sums(name: &str, adapters: &[&AdapterFactors]) -> Result<Sums> {
    let mut sums = Sums::new(adapters.len());
    let present: Vec<(usize, f64, &AdapterLayer)> = adapters
        .iter()
        .enumerate()
        .filter_map(|(index, adapter)| Some((index, adapter.scale() as f64, adapter.layer(name)?)))
        .collect();
    let Some(&(_, _, first)) = present.first() else { return Ok(sums) };
    let (m, n) = (first.outputs, first.columns);
    for &(index, scale, layer) in &present {
        if (layer.outputs, layer.columns) != (m, n) {
            return Err(Error::Incompatible {
                adapter: adapters[index].name().to_owned(),
                reason: format!(
                    "layer {name:?} is {} x {}, but {m} x {n} in another adapter; compare adapters of one base model",
                    layer.outputs, layer.columns
                ),
            });
        }
        sums.squares[index] = scale * scale * dot(layer, layer).0;
    }
    for (at, (one, other)) in pairs(adapters.len()).enumerate() {
        let find = |index| present.iter().find(|(present, _, _)| *present == index);
        if let (Some(&(_, s, x)), Some(&(_, t, y))) = (find(one), find(other)) {
            let (dot, shared_rows) = dot(x, y);
            sums.pairs[at] = (if shared_rows == 0 { 0.0 } else { s * t * dot }, 0, (m * n) as u64, shared_rows);
        }
    }
    sums.entries = (m * n) as u64;
    count_sign_conflicts(&present, adapters.len(), n, &mut sums);
    Ok(sums)
}

/// <B A, B' A'> over the rows that both own, and how many those are.
fn dot(x: &AdapterLayer, y: &AdapterLayer) -> (f64, usize) {
    let row = |values: &[f32], at: usize, width: usize| -> Vec<f64> {
        values[at * width..][..width].iter().map(|&v| v as f64).collect()
    };
    let shared: Vec<(usize, usize)> =
        x.rows.iter().enumerate().filter_map(|(i, p)| Some((i, y.rows.binary_search(p).ok()?))).collect();
    if shared.is_empty() {
        return (0.0, 0);
    }
    let mut gram = vec![0.0; x.rank * y.rank];
    for k in 0..x.rank {
        let a = row(&x.a, k, x.columns);
        for l in 0..y.rank {
            gram[k * y.rank + l] = a.iter().zip(&row(&y.a, l, y.columns)).map(|(p, q)| p * q).sum();
        }
    }
    let mut sum = 0.0;
    for &(i, j) in &shared {
        let (b, c) = (row(&x.b, i, x.rank), row(&y.b, j, y.rank));
        for (k, b) in b.iter().enumerate() {
            sum += b * c.iter().zip(&gram[k * y.rank..]).map(|(c, g)| c * g).sum::<f64>();
        }
    }
    (sum, shared.len())
}

/// The signs of one row of a delta, a bit per column.
#[derive(Clone, Default)]
struct Signs {
    positive: Vec<u64>,
    negative: Vec<u64>,
}

/// Counts opposite signs row by row, for each pair and for the whole set.
fn count_sign_conflicts(present: &[(usize, f64, &AdapterLayer)], adapters: usize, n: usize, sums: &mut Sums) {
    let rows: BTreeSet<u32> = present.iter().flat_map(|(_, _, layer)| layer.rows.iter().copied()).collect();
    let position = |one: usize, other: usize| one * adapters - one * (one + 1) / 2 + other - one - 1;
    let mut delta = vec![0.0; n];
    let mut signs: Vec<(usize, Signs)> = Vec::new();
    for row in rows {
        let owners = present
            .iter()
            .filter_map(|&(index, scale, layer)| Some((index, scale, layer, layer.rows.binary_search(&row).ok()?)));
        let owners: Vec<_> = owners.collect();
        if owners.len() < 2 {
            continue;
        }
        signs.clear();
        for (index, scale, layer, local) in owners {
            delta.fill(0.0);
            for (k, &b) in layer.b[local * layer.rank..][..layer.rank].iter().enumerate() {
                let w = b as f64 * scale;
                delta.iter_mut().zip(&layer.a[k * n..]).for_each(|(sum, &a): (&mut f64, _)| *sum += w * a as f64);
            }
            signs.push((index, signs_of(&delta)));
        }
        let (mut positive, mut negative) = (vec![0; n.div_ceil(64)], vec![0; n.div_ceil(64)]);
        for (at, (one, x)) in signs.iter().enumerate() {
            positive.iter_mut().zip(&x.positive).for_each(|(all, bits)| *all |= bits);
            negative.iter_mut().zip(&x.negative).for_each(|(all, bits)| *all |= bits);
            for (other, y) in &signs[at + 1..] {
                sums.pairs[position(*one, *other)].1 +=
                    opposite(&x.positive, &y.negative) + opposite(&x.negative, &y.positive);
            }
        }
        sums.conflicts += opposite(&positive, &negative);
    }
}

fn opposite(x: &[u64], y: &[u64]) -> u64 {
    x.iter().zip(y).map(|(x, y)| (x & y).count_ones() as u64).sum()
}

fn signs_of(delta: &[f64]) -> Signs {
    let bits = |is: fn(f64) -> bool| {
        let word = |chunk: &[f64]| chunk.iter().rev().fold(0, |word, &x| word << 1 | u64::from(is(x)));
        delta.chunks(64).map(word).collect()
    };
    Signs { positive: bits(|x| x > 0.0), negative: bits(|x| x < 0.0) }
}
