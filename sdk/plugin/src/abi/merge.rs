//! Merge strategies across the boundary.

use std::marker::PhantomData;

use abi_stable::StableAbi;
use abi_stable::prefix_type::WithMetadata;
use abi_stable::staticref;
use abi_stable::std_types::{RResult, RSlice, RSliceMut, RVec};

use super::convert;
use super::guard::guard;
use super::host::Instance;
use super::instance::RawInstance;
use super::job::{JobProxy, RawJob};
use super::types::{RawAdapter, RawError, RawLayer, RawLayerPlan};
use crate::error::{Error, Result};
use crate::job::Job;
use crate::merge::{Adapter, AnyMergeStrategy, Layer, MergeStrategy, Plan, Tile};

/// The functions of a merge strategy.
#[repr(C)]
#[derive(StableAbi)]
#[sabi(kind(Prefix(prefix_ref = MergeTableRef, prefix_fields = MergeTableFields)))]
#[sabi(missing_field(panic))]
pub struct MergeTable {
    /// [any] [`MergeStrategy::plan`]. The plan is the host's.
    pub plan: extern "C" fn(
        RawInstance,
        RawJob<'_>,
        layers: RSlice<'_, RawLayer<'_>>,
        adapters: RSlice<'_, RawAdapter<'_>>,
    ) -> RResult<RVec<RawLayerPlan>, RawError>,
    /// [any, several at once] [`MergeStrategy::fill`] for `rows` rows from `first_row` on; `delta` is [rows, columns].
    #[sabi(last_prefix_field)]
    pub fill: extern "C" fn(
        RawInstance,
        index: usize,
        layer: RawLayer<'_>,
        adapters: RSlice<'_, RawAdapter<'_>>,
        numbers: RSlice<'_, f32>,
        first_row: usize,
        rows: usize,
        delta: RSliceMut<'_, f32>,
    ) -> RResult<(), RawError>,
}

/// The plugin's side.
pub struct Plugin<S>(PhantomData<S>);

impl<S: MergeStrategy + 'static> Plugin<S> {
    staticref!(const TABLE: WithMetadata<MergeTable> = WithMetadata::new(MergeTable {
        plan: Self::plan,
        fill: Self::fill,
    }));
    /// The functions.
    pub const REF: MergeTableRef = MergeTableRef(Self::TABLE.as_prefix());

    extern "C" fn plan(
        instance: RawInstance,
        job: RawJob<'_>,
        layers: RSlice<'_, RawLayer<'_>>,
        adapters: RSlice<'_, RawAdapter<'_>>,
    ) -> RResult<RVec<RawLayerPlan>, RawError> {
        guard(|| {
            // SAFETY: the host gives back what `create` of this plugin made.
            let strategy = unsafe { instance.get::<S>() };
            let (layers, adapters) = (convert::layers(layers), convert::adapters(adapters));
            MergeStrategy::plan(strategy, &JobProxy(job), &layers, &adapters).map(convert::raw_plan)
        })
    }

    extern "C" fn fill(
        instance: RawInstance,
        index: usize,
        layer: RawLayer<'_>,
        adapters: RSlice<'_, RawAdapter<'_>>,
        numbers: RSlice<'_, f32>,
        first_row: usize,
        rows: usize,
        delta: RSliceMut<'_, f32>,
    ) -> RResult<(), RawError> {
        guard(|| {
            // SAFETY: as above.
            let strategy = unsafe { instance.get::<S>() };
            let (layer, adapters) = (convert::layer(&layer), convert::adapters(adapters));
            let rows = first_row..first_row + rows;
            let numbers = numbers.as_slice();
            let tile = Tile { index, layer: &layer, adapters: &adapters, numbers, rows };
            MergeStrategy::fill(strategy, &tile, delta.into_mut_slice())
        })
    }
}

/// The host's side: a strategy in a library.
pub struct Remote {
    pub instance: Instance,
    pub table: MergeTableRef,
}

impl AnyMergeStrategy for Remote {
    fn plan(&self, job: &dyn Job, layers: &[Layer], adapters: &[Adapter<'_>]) -> Result<Plan> {
        let (raw_layers, raw_adapters) = (convert::raw_layers(layers), convert::raw_adapters(adapters));
        let job = RawJob::lend(&job);
        let plan =
            self.table.plan()(self.instance.raw(), job, raw_layers.as_slice().into(), raw_adapters.as_slice().into());
        let plan = convert::plan(plan.into_result().map_err(Error::from)?);
        if plan.len() != layers.len() {
            let (planned, all) = (plan.len(), layers.len());
            return Err(Error::contract(format!("the strategy planned {planned} layers of a model with {all}")));
        }
        Ok(plan)
    }

    fn fill(&self, tile: &Tile<'_>, delta: &mut [f32]) -> Result<()> {
        let (rows, columns) = (tile.rows.len(), tile.layer.columns);
        if delta.len() != rows * columns {
            return Err(Error::contract(format!("a tile of {rows} x {columns} has {} numbers", delta.len())));
        }
        let adapters = convert::raw_adapters(tile.adapters);
        let layer = RawLayer { name: tile.layer.name.as_str().into(), rows: tile.layer.rows, columns };
        let done = self.table.fill()(
            self.instance.raw(),
            tile.index,
            layer,
            adapters.as_slice().into(),
            tile.numbers.into(),
            tile.rows.start,
            rows,
            delta.into(),
        );
        Ok(done.into_result()?)
    }
}
