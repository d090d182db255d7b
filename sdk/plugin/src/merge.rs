//! Merge strategies: which multiples of which adapters make the weights.
//!
//! A strategy sees the model's adaptable Linears and the adapters' low-rank factors, and says for each layer either
//! *factored* terms, `W[p] = W0[p] + sum_i c_ip scale_i B_i[p] A_i`, which the engine applies at the speed of memory, or
//! *dense*: then it is asked for the change of the weight itself, in tiles of rows.

use std::fmt;
use std::ops::Range;

use abi_stable::std_types::ROption;

use crate::abi::types::{RawAdapter, RawFactors};
use crate::config::Config;
use crate::error::{Code, Error, Result};
use crate::job::Job;

/// One Linear of the model that adapters may change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layer {
    /// Its module path with its part in front: `unet.down_blocks.0...to_q`, `text_encoder.text_model...q_proj`.
    pub name: String,
    /// Outputs m.
    pub rows: usize,
    /// Inputs n.
    pub columns: usize,
}

impl Layer {
    /// Whether it belongs to a text encoder, and not to the UNet.
    pub fn is_text_encoder(&self) -> bool {
        self.name.starts_with("text_encoder")
    }

    /// Whether it is one of the projections q, k, v and out of an attention module.
    pub fn is_attention(&self) -> bool {
        const ENDS: [&str; 8] = [".to_q", ".to_k", ".to_v", ".to_out.0", ".q_proj", ".k_proj", ".v_proj", ".out_proj"];
        ENDS.iter().any(|end| self.name.ends_with(end))
    }
}

/// One adapter's factors on one layer: delta = scale * scatter(B, rows) A, an [m, n] matrix.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Factors<'a> {
    /// A, [rank, columns], row-major.
    pub a: &'a [f32],
    /// The owned rows of B, [rows.len(), rank], row-major.
    pub b: &'a [f32],
    /// The owned output rows, ascending, each below the layer's m.
    pub rows: &'a [u32],
    /// r.
    pub rank: usize,
    /// The file's own delta scale: alpha, or alpha / r, as its formula says.
    pub scale: f32,
}

impl Factors<'_> {
    /// n.
    pub fn columns(&self) -> usize {
        self.a.len() / self.rank.max(1)
    }

    /// Adds `factor` times the rows `rows` of the delta to `out`, [rows.len(), columns] row-major. Sums over the rank in
    /// its order, in f32, so that the result does not depend on how rows are cut into tiles.
    pub fn add_delta(&self, factor: f32, rows: Range<usize>, out: &mut [f32]) {
        let n = self.columns();
        let first = self.rows.partition_point(|&row| (row as usize) < rows.start);
        for (local, &row) in self.rows.iter().enumerate().skip(first) {
            if row as usize >= rows.end {
                break;
            }
            let out = &mut out[(row as usize - rows.start) * n..][..n];
            for (a, &b) in self.a.chunks_exact(n).zip(&self.b[local * self.rank..][..self.rank]) {
                let w = factor * self.scale * b;
                out.iter_mut().zip(a).for_each(|(out, a)| *out += w * a);
            }
        }
    }

    /// The rows `rows` of the delta, [rows.len(), columns] row-major; zero where the adapter owns nothing.
    pub fn delta(&self, rows: Range<usize>) -> Vec<f32> {
        let mut out = vec![0.0; rows.len() * self.columns()];
        self.add_delta(1.0, rows, &mut out);
        out
    }
}

/// An adapter as a strategy sees it.
#[derive(Clone)]
pub struct Adapter<'a> {
    /// Its concept's name.
    pub name: &'a str,
    /// SHA-256 of its file in hex. Adapters come ascending by it, so that what a strategy does cannot depend on the
    /// order in which the caller named them; random choices of a strategy are keyed by it.
    pub digest: &'a str,
    /// The caller's weight for it; 1 is "as trained", never 0.
    pub weight: f32,
    factors: FactorList<'a>,
}

/// Factors by layer in the form in which they cross the boundary: a model has thousands of them, and what is not copied
/// costs nothing.
#[derive(Clone)]
enum FactorList<'a> {
    Own(Vec<ROption<RawFactors<'a>>>),
    Lent(&'a [ROption<RawFactors<'a>>]),
}

impl<'a> Adapter<'a> {
    /// An adapter with `factors` by layer, in the order of the layers; `None` where it changes nothing.
    pub fn new(
        name: &'a str,
        digest: &'a str,
        weight: f32,
        factors: impl IntoIterator<Item = Option<Factors<'a>>>,
    ) -> Self {
        let factors = factors.into_iter().map(|f| f.map(RawFactors::from).into()).collect();
        Self { name, digest, weight, factors: FactorList::Own(factors) }
    }

    /// Its factors on the layer with this index; `None` where it changes nothing.
    pub fn factors(&self, layer: usize) -> Option<Factors<'a>> {
        self.raw_factors().get(layer)?.into_option().map(Factors::from)
    }

    /// Its factors by layer, in the order of the layers.
    pub fn factors_by_layer(&self) -> impl ExactSizeIterator<Item = Option<Factors<'a>>> {
        self.raw_factors().iter().map(|raw| raw.into_option().map(Factors::from))
    }

    pub(crate) fn lent(raw: &RawAdapter<'a>) -> Self {
        let factors = FactorList::Lent(raw.factors.as_slice());
        Self { name: raw.name.as_str(), digest: raw.digest.as_str(), weight: raw.weight, factors }
    }

    pub(crate) fn raw_factors(&self) -> &[ROption<RawFactors<'a>>] {
        match &self.factors {
            FactorList::Own(factors) => factors,
            FactorList::Lent(factors) => factors,
        }
    }
}

impl fmt::Debug for Adapter<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let changed = self.factors_by_layer().flatten().count();
        let mut shown = f.debug_struct("Adapter");
        shown.field("name", &self.name).field("digest", &self.digest).field("weight", &self.weight);
        shown.field("changed_layers", &changed).finish_non_exhaustive()
    }
}

/// Coefficients c_ip of one adapter's rows in one layer.
#[derive(Clone, Debug, PartialEq)]
pub enum Coefficients {
    /// The same for all of its rows.
    Uniform(f32),
    /// One for each owned row, in the order of its rows.
    PerRow(Vec<f32>),
}

/// One summand of a factored layer: `W[p] += c_ip scale_i B_i[p] A_i` for the adapter's rows p.
#[derive(Clone, Debug, PartialEq)]
pub struct Term {
    /// Index of the adapter in the list given to [`MergeStrategy::plan`].
    pub adapter: usize,
    /// Its coefficients, all finite.
    pub coefficients: Coefficients,
}

/// What happens to one layer.
#[derive(Clone, Debug, PartialEq)]
pub enum LayerPlan {
    /// Terms for the engine's kernel, each adapter at most once and only where it changes the layer; none leave the
    /// layer pristine.
    Factored(Vec<Term>),
    /// The strategy computes the change itself, in [`MergeStrategy::fill`], which gets these numbers back: whatever it
    /// has found out about the whole layer, such as a threshold per adapter.
    Dense(Vec<f32>),
}

/// What happens to each layer, in the order of the layers.
pub type Plan = Vec<LayerPlan>;

/// Some rows of a dense layer.
#[derive(Clone, Debug)]
pub struct Tile<'a> {
    /// Index of the layer in the list given to [`MergeStrategy::plan`].
    pub index: usize,
    /// The layer.
    pub layer: &'a Layer,
    /// All adapters, as in [`MergeStrategy::plan`].
    pub adapters: &'a [Adapter<'a>],
    /// The numbers that the plan gave for this layer.
    pub numbers: &'a [f32],
    /// Which rows.
    pub rows: Range<usize>,
}

impl<'a> Tile<'a> {
    /// The adapters that change this layer, with their index among all.
    pub fn present(&self) -> impl Iterator<Item = (usize, &'a Adapter<'a>, Factors<'a>)> {
        present(self.adapters, self.index)
    }
}

/// The adapters that change layer `index`, with their index among all and their factors there.
pub fn present<'a>(
    adapters: &'a [Adapter<'a>],
    index: usize,
) -> impl Iterator<Item = (usize, &'a Adapter<'a>, Factors<'a>)> {
    adapters.iter().enumerate().filter_map(move |(i, adapter)| Some((i, adapter, adapter.factors(index)?)))
}

/// The plan that adds every adapter to every layer that it changes, all of its rows with the coefficient `c(index,
/// adapter)`: W = W0 + sum_i c_i s_i B_i A_i.
pub fn weighted_sum(layers: &[Layer], adapters: &[Adapter<'_>], c: impl Fn(usize, &Adapter<'_>) -> f32) -> Plan {
    let term = |(index, adapter, _): (usize, &Adapter<'_>, _)| Term {
        adapter: index,
        coefficients: Coefficients::Uniform(c(index, adapter)),
    };
    (0..layers.len()).map(|layer| LayerPlan::Factored(present(adapters, layer).map(term).collect())).collect()
}

/// The adapters' weights divided by their sum. Fails if the weights cancel each other, be it but for what rounding leaves.
pub fn weights_summing_to_one(adapters: &[Adapter<'_>]) -> Result<Vec<f32>> {
    let sum: f32 = adapters.iter().map(|adapter| adapter.weight).sum();
    let size: f32 = adapters.iter().map(|adapter| adapter.weight.abs()).sum();
    let alphas: Vec<f32> = adapters.iter().map(|adapter| adapter.weight / sum).collect();
    if sum.abs() > 1e-5 * size && alphas.iter().all(|alpha| alpha.is_finite()) {
        return Ok(alphas);
    }
    let message = format!("the weights add up to {sum}, which divides each of them: choose weights with another sum");
    Err(Error::incompatible(message))
}

/// A merge strategy; the struct that implements it holds its settings.
///
/// A strategy is a pure function of its settings, the layers and the adapters: no clock, no global state, random numbers
/// only from a seed among its settings. What it declares in its manifest (`laws`) is verified by
/// `blocklora plugin check`.
pub trait MergeStrategy: Config + Send + Sync {
    /// The plan for `adapters` (at least one) on `layers`.
    ///
    /// Threads: called once per composition, from any thread. [`parallel::map`](crate::parallel::map) spreads costly
    /// work over the machine's cores. Errors name the adapters at fault and the cure.
    fn plan(&self, job: &dyn Job, layers: &[Layer], adapters: &[Adapter<'_>]) -> Result<Plan>;

    /// Writes the change of the rows `tile.rows` of a layer that was planned [`LayerPlan::Dense`] to `delta`,
    /// [rows, columns] row-major, which holds zeros on entry: the engine then sets `W[p] = W0[p] + delta[p]`.
    ///
    /// Threads: called from several at once, for tiles of any height in any order; the result must not depend on how
    /// rows are cut into tiles.
    fn fill(&self, tile: &Tile<'_>, delta: &mut [f32]) -> Result<()> {
        let _ = (tile, delta);
        Err(Error::new(Code::NotSupported, "this strategy plans no dense layers"))
    }
}

/// A [`MergeStrategy`] whatever its settings: what hosts work with.
pub trait AnyMergeStrategy: Send + Sync {
    /// [`MergeStrategy::plan`].
    fn plan(&self, job: &dyn Job, layers: &[Layer], adapters: &[Adapter<'_>]) -> Result<Plan>;
    /// [`MergeStrategy::fill`].
    fn fill(&self, tile: &Tile<'_>, delta: &mut [f32]) -> Result<()>;
}

impl<S: MergeStrategy> AnyMergeStrategy for S {
    fn plan(&self, job: &dyn Job, layers: &[Layer], adapters: &[Adapter<'_>]) -> Result<Plan> {
        MergeStrategy::plan(self, job, layers, adapters)
    }
    fn fill(&self, tile: &Tile<'_>, delta: &mut [f32]) -> Result<()> {
        MergeStrategy::fill(self, tile, delta)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_of_a_delta_are_rows_of_the_whole() {
        let a = [1.0, 2.0, 3.0, -1.0, 0.5, 0.25];
        let b = [1.0, 2.0, 3.0, 4.0, -1.0, 0.0];
        let factors = Factors { a: &a, b: &b, rows: &[1, 2, 4], rank: 2, scale: 0.5 };
        let whole = factors.delta(0..6);
        assert_eq!(whole[..6], [0.0, 0.0, 0.0, -0.5, 1.5, 1.75]);
        assert_eq!(whole[12..15], [-0.5, -1.0, -1.5]);
        for start in 0..6 {
            for end in start..6 {
                assert_eq!(factors.delta(start..end), whole[start * 3..end * 3], "{start}..{end}");
            }
        }
    }
}
