//! Factors with a rank and an alpha for each layer, as factors with one of each for all.

use std::collections::BTreeMap;
use std::path::Path;

use super::source::Source;
use super::words::Bundle;
use super::{Key, Module, Name, Role, Unmatched, fail};
use crate::dtype::Storage;
use crate::error::{Error, Result, shortened};
use crate::limits;
use crate::manifest::Delta;

/// A tensor and how its key names the module.
struct Piece<'a> {
    source: &'a Source,
    key: &'a str,
    module: Name,
}

/// What was found for one layer.
pub(super) struct Found<'a> {
    module: &'a Module,
    down: Option<Piece<'a>>,
    up: Option<Piece<'a>>,
    alpha: Option<Piece<'a>>,
}

impl<'a> Found<'a> {
    pub(super) fn new(module: &'a Module) -> Self {
        Self { module, down: None, up: None, alpha: None }
    }

    /// Adds a tensor; fails where another file or another name has another one for the same. The same one under two names
    /// is what PEFT's text encoder is written as, for transformers of before and after a change of its names.
    pub(super) fn add(&mut self, source: &'a Source, key: &'a str, parsed: &Key) -> Result<()> {
        let place = match parsed.role {
            Role::Down => &mut self.down,
            Role::Up => &mut self.up,
            Role::Alpha => &mut self.alpha,
        };
        if let Some(other) = place {
            if std::ptr::eq(other.source, source) && source.file.is_same(other.key, key) {
                return Ok(());
            }
            let (one, other) = (shortened(other.key), shortened(key));
            let reason = format!("tensors {one:?} and {other:?} both say what {} is: leave one out", self.module.name);
            return fail(&source.file.path, reason);
        }
        *place = Some(Piece { source, key, module: parsed.module.clone() });
        Ok(())
    }
}

/// A layer with both factors.
pub(super) struct Pair<'a> {
    module: &'a Module,
    down: Piece<'a>,
    up: Piece<'a>,
    alpha: Option<Piece<'a>>,
}

/// Puts factors together; those without the other one go to `unmatched`.
pub(super) fn pair<'a>(found: BTreeMap<&str, Found<'a>>, unmatched: &mut Vec<Unmatched>) -> Result<Vec<Pair<'a>>> {
    let mut pairs = Vec::new();
    for Found { module, down, up, alpha } in found.into_values() {
        match (down, up) {
            (Some(down), Some(up)) => pairs.push(Pair { module, down, up, alpha }),
            (down, up) => {
                let missing = match (&down, &up) {
                    (None, None) => "both of its factors are",
                    (None, _) => "the factor A (down) beside it is",
                    _ => "the factor B (up) beside it is",
                };
                for piece in [down, up, alpha].into_iter().flatten() {
                    unmatched.push(Unmatched { key: piece.key.into(), reason: format!("{missing} missing") });
                }
            }
        }
    }
    Ok(pairs)
}

/// A layer's factors, read: A [rank, inputs], B [outputs, rank].
pub(super) struct Factors {
    pub(super) name: String,
    pub(super) outputs: usize,
    pub(super) a: Vec<f32>,
    pub(super) b: Vec<f32>,
    rank: usize,
    /// delta = alpha / rank B A.
    alpha: f64,
}

/// Factors of one rank whose delta is `alpha` and `delta`'s.
pub(super) struct Fitted {
    pub(super) layers: Vec<Factors>,
    pub(super) rank: usize,
    pub(super) alpha: f32,
    pub(super) delta: Delta,
    /// The types in the file; none where numbers are not those of the file.
    types: Option<Vec<Storage>>,
}

impl Fitted {
    /// The smallest type that holds all numbers, also those of `words`, as they are.
    pub(super) fn storage(&self, words: &[Bundle<'_>]) -> Storage {
        let Some(types) = &self.types else { return Storage::F32 };
        let mut all = types.iter().copied().map(Some).chain(words.iter().map(|word| word.file.storage(word.key)));
        match all.next() {
            Some(Some(first)) if all.all(|other| other == Some(first)) => first,
            _ => Storage::F32,
        }
    }
}

/// Reads the factors and gives them one rank and one scale. Smaller ranks are filled up with zeros. Where all layers
/// have one scale it becomes the adapter's, and the factors keep their bits; else each goes into its B, rounded once.
pub(super) fn fit(path: &Path, pairs: Vec<Pair<'_>>) -> Result<Fitted> {
    let ranks = pairs.iter().map(Pair::rank).collect::<Result<Vec<_>>>()?;
    let rank = ranks.iter().copied().max().unwrap_or(1);
    // Before anything is filled up.
    let width = |pair: &Pair<'_>| pair.module.shape.iter().fold(0u64, |sum, d| sum.saturating_add(*d as u64));
    let numbers = pairs.iter().fold(0u64, |sum, pair| sum.saturating_add(width(pair).saturating_mul(rank as u64)));
    if numbers.saturating_mul(4) > limits::FILE_BYTES_MAX {
        let reason = format!("with rank {rank} in all {} layers it would be larger than any adapter", pairs.len());
        return fail(path, format!("{reason}: resize it to one rank"));
    }
    let mut types = Vec::new();
    let mut layers = Vec::new();
    for (pair, rank) in pairs.iter().zip(ranks) {
        layers.push(pair.read(rank)?);
        let of = |piece: &Piece<'_>| piece.source.file.storage(piece.key).unwrap_or(Storage::F32);
        types.extend([of(&pair.down), of(&pair.up)]);
    }
    let (alpha, delta) = match common_scale(&layers, rank) {
        Some(scale) => scale,
        None => {
            types.clear();
            for layer in &mut layers {
                layer.fold(path)?;
            }
            (1.0, Delta::Alpha)
        }
    };
    let folded = !layers.is_empty() && types.is_empty();
    layers.iter_mut().for_each(|layer| layer.fill_up(rank));
    Ok(Fitted { layers, rank, alpha, delta, types: (!folded).then_some(types) })
}

/// The alpha and the formula that all layers have in common, if they do.
fn common_scale(layers: &[Factors], rank: usize) -> Option<(f32, Delta)> {
    let Some(first) = layers.first() else { return Some((1.0, Delta::Alpha)) };
    let usable = |alpha: f64| Some(alpha as f32).filter(|alpha| alpha.is_normal() && *alpha > 0.0);
    if layers.iter().all(|layer| layer.rank == rank && layer.alpha == first.alpha) {
        return Some((usable(first.alpha)?, Delta::AlphaOverRank));
    }
    let scale = first.scale();
    layers.iter().all(|layer| layer.scale() == scale).then(|| usable(scale)).flatten().map(|s| (s, Delta::Alpha))
}

impl Pair<'_> {
    /// The rank of its factors, whose shapes fit each other and the module.
    fn rank(&self) -> Result<usize> {
        let [down, up] = [&self.down, &self.up].map(Piece::matrix);
        let ([rank, inputs], [outputs, rank_up]) = (down?, up?);
        let (m, n) = match self.module.shape[..] {
            [m, n] => (m, n),
            _ => (0, 0),
        };
        let (name, path) = (&self.module.name, &self.down.source.file.path);
        if rank != rank_up {
            let (down, up) = (shortened(self.down.key), shortened(self.up.key));
            return fail(path, format!("tensor {down:?} has rank {rank}, but {up:?} has {rank_up}"));
        }
        if (inputs, outputs) != (n, m) {
            let reason =
                format!("{name} changes {outputs} outputs of {inputs} inputs, the base model's has {m} of {n}");
            return fail(path, format!("{reason}: give the base model that it was trained on"));
        }
        if rank == 0 || rank > limits::RANK_MAX {
            return fail(path, format!("{name} has rank {rank}, an adapter's is 1 to {}", limits::RANK_MAX));
        }
        Ok(rank)
    }

    fn read(&self, rank: usize) -> Result<Factors> {
        let [outputs, inputs] = [0, 1].map(|i| self.module.shape.get(i).copied().unwrap_or_default());
        let Self { module, down, up, alpha } = self;
        let alpha = match alpha {
            Some(alpha) => alpha.source.file.scalar(alpha.key)?,
            None => down.source.alpha(down.key, &down.module, &module.name, rank)?,
        };
        Ok(Factors {
            name: module.name.clone(),
            outputs,
            a: down.source.file.numbers(down.key, rank * inputs)?,
            b: up.source.file.numbers(up.key, outputs * rank)?,
            rank,
            alpha,
        })
    }
}

impl Piece<'_> {
    /// Its shape as that of a matrix. A Linear may be written as a convolution of one pixel.
    fn matrix(&self) -> Result<[usize; 2]> {
        let shape = self.source.file.tensors.get(self.key).map_or(&[][..], |tensor| &tensor.shape);
        match *shape {
            [rows, columns] | [rows, columns, 1, 1] => Ok([rows, columns]),
            _ => Err(Error::Shape {
                path: self.source.file.path.clone(),
                tensor: shortened(self.key),
                shape: shape.iter().take(8).map(|d| *d as u64).collect(),
                reason: "the base model's module is a Linear: must have two dimensions, or four that end in 1, 1"
                    .into(),
            }),
        }
    }
}

impl Factors {
    fn scale(&self) -> f64 {
        self.alpha / self.rank as f64
    }

    /// Puts the scale into B.
    fn fold(&mut self, path: &Path) -> Result<()> {
        let scale = self.scale();
        self.b.iter_mut().for_each(|x| *x = (f64::from(*x) * scale) as f32);
        if self.b.iter().all(|x| x.is_finite()) {
            return Ok(());
        }
        fail(path, format!("{} has a scale of {scale}, with which its numbers are too large", self.name))
    }

    /// Makes the rank `to` with zeros, which change nothing.
    fn fill_up(&mut self, to: usize) {
        let from = self.rank;
        if from == to {
            return;
        }
        let inputs = self.a.len() / from.max(1);
        self.a.resize(inputs * to, 0.0);
        let mut b = vec![0.0; self.outputs * to];
        for (row, values) in b.chunks_exact_mut(to).zip(self.b.chunks_exact(from)) {
            row[..from].copy_from_slice(values);
        }
        (self.b, self.rank, self.alpha) = (b, to, self.alpha * to as f64 / from as f64);
    }
}
