//! What a merge strategy costs beyond the merge itself.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Instant;

use candle_core::{DType, Device};
use rayon::prelude::*;
use serde::Serialize;

use super::Shape;
use super::merge::{check_range, median, random_adapter, thread_pool, write_random};
use crate::error::{Error, Result};
use crate::merge::strategy::{AdapterView, LayerInfo, MergeStrategy, Plan, Tile};
use crate::merge::{AdapterFactors, Merger, Target};
use crate::weights::WeightFile;

/// What [`strategy`] measured. Times are medians in milliseconds.
#[derive(Clone, Debug, Serialize)]
pub struct BenchStrategy {
    /// The strategy.
    pub strategy: String,
    /// Whose shapes.
    pub shape: Shape,
    /// How many adapters were merged, in slots of a contiguous partition.
    pub adapters: usize,
    /// Their rank.
    pub rank: usize,
    /// Threads.
    pub threads: usize,
    /// Repeats, in turns.
    pub repeats: usize,
    /// Planning alone.
    pub plan_ms: f64,
    /// Merging all adapters into the pristine model by the plan that the engine already has.
    pub planned_ms: f64,
    /// The same by the strategy.
    pub merge_ms: f64,
    /// `1 + difference_ms / planned_ms`: what disturbs a turn disturbs both of its merges.
    pub merge_over_planned: f64,
    /// Median of the differences between the two merges of a turn.
    pub difference_ms: f64,
    /// Whether the strategy left no row to write where its plan had been applied.
    pub same_weights: bool,
}

/// Gives a plan that is there already; dense layers are filled by the strategy that made it.
struct Planned {
    plan: Plan,
    strategy: Arc<dyn MergeStrategy>,
}

impl MergeStrategy for Planned {
    fn id(&self) -> &str {
        self.strategy.id()
    }
    fn fingerprint(&self) -> &str {
        self.strategy.fingerprint()
    }
    fn plan(&self, _: &[LayerInfo], _: &[&dyn AdapterView]) -> Result<Plan> {
        Ok(self.plan.clone())
    }
    fn fill(&self, tile: Tile<'_>, delta: &mut [f32]) -> Result<()> {
        self.strategy.fill(tile, delta)
    }
}

/// Notes what a strategy plans first, and how long each plan takes.
struct Noted {
    strategy: Arc<dyn MergeStrategy>,
    first: OnceLock<Plan>,
    seconds: Mutex<f64>,
}

impl MergeStrategy for Noted {
    fn id(&self) -> &str {
        self.strategy.id()
    }
    fn fingerprint(&self) -> &str {
        self.strategy.fingerprint()
    }
    fn plan(&self, layers: &[LayerInfo], adapters: &[&dyn AdapterView]) -> Result<Plan> {
        let start = Instant::now();
        let plan = self.strategy.plan(layers, adapters)?;
        let seconds = start.elapsed().as_secs_f64();
        self.first.get_or_init(|| plan.clone());
        *self.seconds.lock().unwrap_or_else(PoisonError::into_inner) = seconds;
        Ok(plan)
    }
    fn fill(&self, tile: Tile<'_>, delta: &mut [f32]) -> Result<()> {
        self.strategy.fill(tile, delta)
    }
}

/// Merges `adapters` random adapters of `rank` on random f32 weights of `shape`, in turns by `strategy` and by the plan
/// that it made, known beforehand, on `threads` threads.
pub fn strategy(
    strategy: Arc<dyn MergeStrategy>,
    shape: Shape,
    adapters: usize,
    rank: usize,
    threads: usize,
    repeats: usize,
) -> Result<BenchStrategy> {
    check_range("adapters", adapters, 4096)?;
    check_range("rank", rank, 1024)?;
    check_range("threads", threads, 1024)?;
    check_range("repeats", repeats, 10_000)?;
    let pool = thread_pool(threads)?;
    let layers = shape.attention_layers();
    let folder = tempfile::tempdir().map_err(|e| Error::io(std::env::temp_dir(), e))?;
    let path = folder.path().join("model.safetensors");
    write_random(&layers, DType::F32, &path)?;
    let file = WeightFile::open(path)?;
    let target = |info: &LayerInfo| {
        let pristine = file.view(&info.name)?;
        Ok(Target { info: info.clone(), live: pristine.load(DType::F32, &Device::Cpu)?, pristine })
    };
    let targets = layers.iter().map(target).collect::<Result<Vec<_>>>()?;
    let capacity = adapters.next_power_of_two().max(16) as u32;
    let concepts = (0..adapters)
        .into_par_iter()
        .map(|i| Ok((random_adapter(&layers, rank, capacity, i as u32, i as u64)?, 1.0)))
        .collect::<Result<Vec<(Arc<AdapterFactors>, f32)>>>()?;

    let mut merger = Merger::new(targets)?;
    let noted = Arc::new(Noted { strategy: strategy.clone(), first: OnceLock::new(), seconds: Mutex::default() });
    let by_strategy: Arc<dyn MergeStrategy> = noted.clone();
    let mut times = [const { Vec::new() }; 4];
    let mut same_weights = true;
    pool.install(|| -> Result<()> {
        // The first merge warms up and makes the plan.
        merger.apply(&concepts, &by_strategy)?;
        let plan = noted.first.get().cloned().unwrap_or_default();
        let planned: Arc<dyn MergeStrategy> = Arc::new(Planned { plan, strategy: strategy.clone() });
        for repeat in 0..repeats {
            let mut seconds = [0.0; 2];
            // Whatever the machine does meanwhile must not always meet the same one.
            for which in if repeat % 2 == 0 { [0, 1] } else { [1, 0] } {
                merger.apply(&[], &planned)?;
                seconds[which] = merger.apply(&concepts, [&planned, &by_strategy][which])?.seconds;
            }
            same_weights &= merger.apply(&concepts, &planned)?.rows_rewritten == 0;
            same_weights &= merger.apply(&concepts, &by_strategy)?.rows_rewritten == 0;
            let ([planned_s, merge_s], plan_s) =
                (seconds, *noted.seconds.lock().unwrap_or_else(PoisonError::into_inner));
            let turn = [plan_s, planned_s, merge_s, merge_s - planned_s];
            times.iter_mut().zip(turn).for_each(|(times, seconds)| times.push(1e3 * seconds));
        }
        Ok(())
    })?;
    let [plan_ms, planned_ms, merge_ms, difference_ms] = times.map(median);
    Ok(BenchStrategy {
        strategy: strategy.id().to_owned(),
        shape,
        adapters,
        rank,
        threads,
        repeats,
        plan_ms,
        planned_ms,
        merge_ms,
        merge_over_planned: 1.0 + difference_ms / planned_ms,
        difference_ms,
        same_weights,
    })
}
