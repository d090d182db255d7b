//! What a merge strategy sees and says. Plain data only: these shapes are what plugins get, too.

use std::sync::Arc;

use crate::error::Result;

/// One Linear of the model that adapters may change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerInfo {
    /// Its module path with its part in front: `unet.down_blocks.0...to_q`, `text_encoder.text_model...q_proj`.
    pub name: String,
    /// Outputs m.
    pub rows: usize,
    /// Inputs n.
    pub columns: usize,
}

/// One adapter's factors on one layer: delta = scale * scatter(B, rows) A.
#[derive(Clone, Copy, Debug)]
pub struct Factors<'a> {
    /// A, [rank, columns], row-major.
    pub a: &'a [f32],
    /// The owned rows of B, [rows.len(), rank], row-major.
    pub b: &'a [f32],
    /// The owned output rows, ascending.
    pub rows: &'a [u32],
    /// r.
    pub rank: usize,
    /// The file's own delta scale (alpha, or alpha / r, as its formula says).
    pub scale: f32,
}

/// An adapter as a strategy sees it.
pub trait AdapterView: Send + Sync {
    /// Its name.
    fn name(&self) -> &str;
    /// The caller's weight for it; 1 is "as trained".
    fn weight(&self) -> f32;
    /// Its factors on layer `layer` (an index into the layers given to `plan`), if it changes that layer.
    fn factors(&self, layer: usize) -> Option<Factors<'_>>;
}

/// Coefficients c_ip of one adapter's rows in one layer.
#[derive(Clone, Debug, PartialEq)]
pub enum Coefficients {
    /// The same for all of its rows.
    Uniform(f32),
    /// One for each owned row, in the order of its rows.
    PerRow(Arc<[f32]>),
}

/// One summand of a factored plan: `W[p] += c_ip * scale_i * B_i[p] A_i` for the adapter's rows p.
#[derive(Clone, Debug, PartialEq)]
pub struct Term {
    /// Index of the adapter in the list given to `plan`.
    pub adapter: usize,
    /// Its coefficients on this layer.
    pub coefficients: Coefficients,
}

/// What happens to each layer, in the order of the layers given to `plan`. An empty list leaves it pristine.
pub type Plan = Vec<Vec<Term>>;

/// Decides the coefficients with which adapters add up.
pub trait MergeStrategy: Send + Sync {
    /// Its id, as users name it.
    fn id(&self) -> &'static str;
    /// The plan for `adapters` (in canonical order) on `layers`. Errors name the adapters at fault and the cure.
    fn plan(&self, layers: &[LayerInfo], adapters: &[&dyn AdapterView]) -> Result<Plan>;
}
