//! Applies compositions of adapters to the live weights, exactly and reversibly.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
#[cfg(feature = "cuda")]
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use serde::Serialize;

use super::adapter::{AdapterFactors, Place, Placed};
use super::composition::{Composition, Marked};
use super::dense::rewrite_dense;
use super::kernel::{Isa, Rewrite, prefetch};
#[cfg(feature = "cuda")]
use super::kernel_cuda::Card;
use super::strategy::{AdapterView, LayerInfo, MergeStrategy};
use crate::error::{Error, Result};
use crate::weights::WeightView;

/// One Linear that adapters may change.
#[derive(Clone, Debug)]
pub struct Target {
    /// Its name and size.
    pub info: LayerInfo,
    /// Its live weight [m, n], sharing the Linear's storage; equal to `pristine` when the merger is made.
    pub live: Tensor,
    /// Its weight in the model file.
    pub pristine: WeightView,
}

/// What applying a composition did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct MergeReport {
    /// Rows written.
    pub rows_rewritten: u64,
    /// Bytes of live weights written.
    pub bytes_written: u64,
    /// Linears with at least one row written.
    pub layers_touched: usize,
    /// Wall time, planning included.
    pub seconds: f64,
}

/// Owns what is merged into the live weights of a model.
///
/// A row's bits depend on the pristine row and its terms only, so neither order nor history of compositions matters,
/// and a row without terms has the file's value.
#[derive(Debug)]
pub struct Merger {
    targets: Vec<Target>,
    infos: Vec<LayerInfo>,
    index_of: BTreeMap<String, usize>,
    current: Composition,
    /// Where the layers are of adapters that were merged before. A pointer that is held here is no other adapter's.
    places: Vec<(Weak<AdapterFactors>, Arc<Place>)>,
    isa: Isa,
    /// Rows are computed aside and copied to the live weight, also where that is in main memory.
    staged: bool,
    /// What writes rows where the live weights are on a card.
    #[cfg(feature = "cuda")]
    card: Option<Card>,
}

impl Merger {
    /// A merger for `targets`, whose live weights are pristine. Fails, naming the tensor, where a shape, type or
    /// layout does not fit or two Linears share one weight.
    pub fn new(targets: Vec<Target>) -> Result<Self> {
        let mut storages = BTreeSet::new();
        let mut index_of = BTreeMap::new();
        for (index, Target { info, live, pristine }) in targets.iter().enumerate() {
            let supported = |dtype| matches!(dtype, DType::F32 | DType::F16 | DType::BF16);
            let values = info.rows.saturating_mul(info.columns);
            let reason = if live.dims() != [info.rows, info.columns] {
                Some(format!("the live weight is {:?}, not {} x {}", live.dims(), info.rows, info.columns))
            } else if pristine.shape().first() != Some(&info.rows)
                || pristine.shape().iter().product::<usize>() != values
            {
                Some(format!("shape {:?}, not {} x {}", pristine.shape(), info.rows, info.columns))
            } else if values == 0 {
                Some("it has no values".into())
            } else if !supported(live.dtype()) || !supported(pristine.dtype()) {
                Some(format!(
                    "stored as {:?}, live as {:?}; merging takes F32, F16 and BF16",
                    pristine.dtype(),
                    live.dtype()
                ))
            } else if pristine.bytes().len() != values * pristine.dtype().size_in_bytes() {
                Some(format!("{} bytes for {values} values", pristine.bytes().len()))
            } else if !live.is_contiguous() {
                Some("the live weight is not contiguous".into())
            } else if !storages.insert(std::ptr::from_ref(&*live.storage_and_layout().0).addr()) {
                Some("the live weight is shared with another Linear".into())
            } else if index_of.insert(info.name.clone(), index).is_some() {
                Some(format!("two Linears are named {:?}", info.name))
            } else {
                None
            };
            if let Some(reason) = reason {
                return Err(pristine.error(reason));
            }
        }
        let infos: Vec<LayerInfo> = targets.iter().map(|target| target.info.clone()).collect();
        #[cfg(feature = "cuda")]
        let card = Card::new(&targets)?;
        Ok(Self {
            targets,
            infos,
            index_of,
            current: Composition::default(),
            places: Vec::new(),
            isa: Isa::detect(),
            staged: false,
            #[cfg(feature = "cuda")]
            card,
        })
    }

    /// The same with the kernel of `isa`, which must be one of [`Isa::available`]; others are ignored.
    pub fn with_isa(mut self, isa: Isa) -> Self {
        if Isa::available().contains(&isa) {
            self.isa = isa;
        }
        self
    }

    /// The same, writing as it does where the live weights are not in main memory and have no kernel of their own: rows
    /// are computed in main memory, so that they have the same bits, and then copied.
    pub fn with_staging(mut self) -> Self {
        self.staged = true;
        self
    }

    /// The Linears that adapters may change.
    pub fn layers(&self) -> &[LayerInfo] {
        &self.infos
    }

    /// What is merged now, in canonical order: each adapter with the caller's weight.
    pub fn composition(&self) -> impl Iterator<Item = (&Arc<AdapterFactors>, f32)> {
        self.current.adapters().iter().map(|placed| (&placed.factors, placed.weight))
    }

    /// Makes `adapters` (each with its weight; 1 is "as trained", 0 as good as absent) the composition, whatever it
    /// was before, and rewrites only rows whose terms change. None gives back the file's bits.
    ///
    /// Everything is checked before the first write: an adapter's layer that the model lacks, or of another size; the
    /// same adapter twice; weights and coefficients that are not finite; whatever the strategy refuses. If a row
    /// does not stay finite in the live type, or a strategy fails to fill a dense layer, the composition before is
    /// restored (the pristine weights, if that one's strategy fails, too) and the error says why.
    pub fn apply(
        &mut self,
        adapters: &[(Arc<AdapterFactors>, f32)],
        strategy: &Arc<dyn MergeStrategy>,
    ) -> Result<MergeReport> {
        let start = Instant::now();
        let wanted = self.compose(adapters, strategy)?;
        match self.rewrite(&self.current, &wanted, true) {
            Ok(mut report) => {
                self.current = wanted;
                report.seconds = start.elapsed().as_secs_f64();
                Ok(report)
            }
            Err(error) => {
                // What was merged before may itself need a strategy that fails by now; the file never does.
                if self.rewrite(&wanted, &self.current, false).is_err() {
                    let nothing = Composition::default();
                    self.rewrite(&wanted, &nothing, false)?;
                    self.rewrite(&self.current, &nothing, false)?;
                    self.current = nothing;
                }
                Err(error)
            }
        }
    }

    /// Where an adapter's layers are, found once as long as somebody holds the adapter.
    fn place(&mut self, factors: &Arc<AdapterFactors>) -> Result<Arc<Place>> {
        if let Some((_, place)) = self.places.iter().find(|(of, _)| of.as_ptr() == Arc::as_ptr(factors)) {
            return Ok(place.clone());
        }
        let place = Arc::new(Place::new(factors, &self.infos, &self.index_of)?);
        self.places.retain(|(of, _)| of.strong_count() > 0);
        self.places.push((Arc::downgrade(factors), place.clone()));
        Ok(place)
    }

    /// Places, orders, plans and checks.
    pub(super) fn compose(
        &mut self,
        adapters: &[(Arc<AdapterFactors>, f32)],
        strategy: &Arc<dyn MergeStrategy>,
    ) -> Result<Composition> {
        let mut placed = adapters
            .iter()
            .map(|(factors, weight)| Placed::new(factors.clone(), self.place(factors)?, *weight))
            .collect::<Result<Vec<_>>>()?;
        placed.retain(|adapter| adapter.weight != 0.0);
        placed.sort_by(|one, other| one.factors.digest().cmp(other.factors.digest()));
        if let Some(pair) = placed.windows(2).find(|pair| pair[0].factors.digest() == pair[1].factors.digest()) {
            return Err(Error::Incompatible {
                adapter: pair[1].name().to_owned(),
                reason: format!(
                    "it is the same adapter as {:?}, given twice; give it once, with the sum of the weights",
                    pair[0].name()
                ),
            });
        }
        if placed.is_empty() {
            return Ok(Composition::default());
        }
        let views: Vec<&dyn AdapterView> = placed.iter().map(|adapter| adapter as &dyn AdapterView).collect();
        let plan = strategy.plan(&self.infos, &views)?;
        Composition::new(strategy.clone(), &self.infos, placed, plan)
    }

    /// Brings the live weights from composition `old` to `new`. On an error some rows may already be those of `new`.
    ///
    /// `certain` says that all rows are those of `old`, so that rows without terms need not be read from the file.
    fn rewrite(&self, old: &Composition, new: &Composition, certain: bool) -> Result<MergeReport> {
        let same = new.same_in(old);
        let (rows_written, bytes_written) = (AtomicU64::new(0), AtomicU64::new(0));
        #[cfg(feature = "cuda")]
        let on_card = Mutex::new(Vec::new());
        let touched = self
            .targets
            .par_iter()
            .enumerate()
            // Layers differ in size a hundredfold: whoever is done takes over one at a time.
            .with_max_len(1)
            .map(|(index, target)| -> Result<usize> {
                let Some(changed) = new.changed_rows(old, &same, index, target.info.rows) else { return Ok(0) };
                let staged = self.staged || !target.live.device().is_cpu();
                let rows = match new.is_dense(index) {
                    true => rewrite_dense(target, index, new, staged)?,
                    #[cfg(feature = "cuda")]
                    false if self.card.is_some() && !self.staged => {
                        let terms = new.row_terms(index, &changed);
                        let rows = terms.rows.len();
                        on_card.lock().unwrap_or_else(PoisonError::into_inner).push((index, terms));
                        rows
                    }
                    false => {
                        let one_type = target.pristine.dtype() == target.live.dtype();
                        let merged = if certain && one_type && !staged { old.merged_rows(index) } else { None };
                        rewrite_rows(self.isa, target, index, new, changed, merged, staged)?
                    }
                };
                let row_bytes = target.info.columns * target.live.dtype().size_in_bytes();
                rows_written.fetch_add(rows as u64, Ordering::Relaxed);
                bytes_written.fetch_add((rows * row_bytes) as u64, Ordering::Relaxed);
                Ok(1)
            })
            .try_reduce(|| 0, |one, other| Ok(one + other))?;
        #[cfg(feature = "cuda")]
        if let Some(card) = &self.card {
            card.rewrite(&self.targets, new, &on_card.into_inner().unwrap_or_else(PoisonError::into_inner))?;
        }
        Ok(MergeReport {
            rows_rewritten: rows_written.into_inner(),
            bytes_written: bytes_written.into_inner(),
            layers_touched: touched,
            seconds: 0.0,
        })
    }
}

/// Writes the rows of layer `index` that are `marked`, as `composition` has them; returns how many. Those outside
/// `merged`, if it is known, have the file's bits.
///
/// With `staged` they are written to a matrix in main memory first, and copied from there run by run; where there are
/// many runs, all rows between the first and the last, which have the same values as before.
fn rewrite_rows(
    isa: Isa,
    target: &Target,
    index: usize,
    composition: &Composition,
    mut marked: Marked,
    merged: Option<Vec<Range<u32>>>,
    staged: bool,
) -> Result<usize> {
    /// Copies of their own.
    const RUNS_MAX: usize = 8;
    if staged && marked.runs().len() > RUNS_MAX {
        marked.fill();
    }
    let marked = &marked;
    let row_bytes = target.info.columns * target.pristine.dtype().size_in_bytes();
    if merged.as_ref().is_none_or(|merged| !merged.is_empty()) {
        prefetch(&target.pristine.bytes()[marked.first() * row_bytes..]);
    }
    let terms = composition.row_terms(index, marked);
    let mut factors = vec![None; composition.adapters().len()];
    for term in terms.all() {
        let (placed, found) = (&composition.adapters()[term.adapter as usize], &mut factors[term.adapter as usize]);
        if found.is_none() {
            *found = placed.layer(index).map(|layer| (layer, placed.factors.scale()));
        }
    }
    let rewrite = Rewrite {
        isa,
        stored: target.pristine.dtype(),
        pristine: target.pristine.bytes(),
        columns: target.info.columns,
        terms: &terms,
        merged,
        factors,
        not_finite: AtomicU32::new(u32::MAX),
    };
    let stage = match staged {
        true => Some(Tensor::zeros(target.live.shape(), target.live.dtype(), &Device::Cpu)?),
        false => None,
    };
    stage.as_ref().unwrap_or(&target.live).inplace_op1(&rewrite)?;
    if let Some(stage) = stage {
        for (first, count) in marked.runs() {
            let rows = stage.narrow(0, first, count)?.contiguous()?.to_device(target.live.device())?;
            target.live.slice_set(&rows, 0, first)?;
        }
    }
    match rewrite.not_finite.into_inner() {
        u32::MAX => Ok(terms.rows.len()),
        row => Err(not_finite(target, index, composition, row)),
    }
}

/// The error about a row that does not stay finite: it names the adapters that own it.
pub(super) fn not_finite(target: &Target, index: usize, composition: &Composition, row: u32) -> Error {
    let names: Vec<&str> = composition
        .adapters()
        .iter()
        .filter(|placed| placed.layer(index).is_some_and(|layer| layer.rows.binary_search(&row).is_ok()))
        .map(|placed| placed.name())
        .collect();
    Error::Incompatible {
        adapter: names.join("\", \""),
        reason: format!(
            "row {row} of {} does not stay finite in {:?}; lower the weight",
            target.info.name,
            target.live.dtype()
        ),
    }
}
