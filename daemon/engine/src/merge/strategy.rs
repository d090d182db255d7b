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
    /// SHA-256 of its content in hex; adapters come ascending by it.
    fn digest(&self) -> &str;
    /// The caller's weight for it; 1 is "as trained".
    fn weight(&self) -> f32;
    /// Whether it changes layer `layer`: whether it has [`factors`](Self::factors) there, without reading them.
    fn changes(&self, layer: usize) -> bool {
        self.factors(layer).is_some()
    }
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

/// What happens to one layer.
#[derive(Clone, Debug, PartialEq)]
pub enum LayerPlan {
    /// These terms are added, each adapter at most once. None leave the layer pristine.
    Factored(Vec<Term>),
    /// The strategy computes the change of the weight itself, tile by tile, from these numbers of its own and the
    /// adapters.
    Dense(Arc<[f32]>),
}

impl Default for LayerPlan {
    fn default() -> Self {
        Self::Factored(Vec::new())
    }
}

/// What happens to each layer, in the order of the layers given to `plan`.
pub type Plan = Vec<LayerPlan>;

/// Some rows of a layer that is planned dense.
#[derive(Clone, Copy)]
pub struct Tile<'a> {
    /// Index of the layer.
    pub index: usize,
    /// The layer.
    pub layer: &'a LayerInfo,
    /// The adapters given to `plan`.
    pub adapters: &'a [&'a dyn AdapterView],
    /// The numbers that the plan has for this layer.
    pub numbers: &'a [f32],
    /// The first row.
    pub first_row: usize,
    /// How many.
    pub rows: usize,
}

/// Decides how adapters add up.
pub trait MergeStrategy: Send + Sync {
    /// Its id, as users name it.
    fn id(&self) -> &str;
    /// What tells its results from those of another strategy or of other settings, for the same adapters.
    fn fingerprint(&self) -> &str;
    /// The plan for `adapters` (in canonical order) on `layers`. Errors name the adapters at fault and the cure.
    fn plan(&self, layers: &[LayerInfo], adapters: &[&dyn AdapterView]) -> Result<Plan>;
    /// Writes the change of a tile's rows to `delta`, [rows, columns] row-major and zero on entry. Called from several
    /// threads at once; the result must not depend on how rows are cut into tiles.
    fn fill(&self, tile: Tile<'_>, delta: &mut [f32]) -> Result<()>;
}

/// Every adapter at the caller's weight, whoever owns its rows: `W = W0 + sum_i weight_i delta_i`. What measurements and
/// tests of the kernel use.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sum;

impl MergeStrategy for Sum {
    fn id(&self) -> &str {
        "sum"
    }
    fn fingerprint(&self) -> &str {
        "sum"
    }
    fn plan(&self, layers: &[LayerInfo], adapters: &[&dyn AdapterView]) -> Result<Plan> {
        let plan = |layer| {
            let changing = adapters.iter().enumerate().filter(|(_, view)| view.changes(layer));
            let term = |(adapter, view): (usize, &&dyn AdapterView)| Term {
                adapter,
                coefficients: Coefficients::Uniform(view.weight()),
            };
            LayerPlan::Factored(changing.map(term).collect())
        };
        Ok((0..layers.len()).map(plan).collect())
    }
    fn fill(&self, _tile: Tile<'_>, _delta: &mut [f32]) -> Result<()> {
        Ok(())
    }
}
