//! `bench merge`: a merge of many adapters against a plain copy of the same bytes.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use blocklora_spec::{Partition, Scheme};
use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::Dtype;
use serde::Serialize;

use super::{Shape, memory};
use crate::error::{Error, Result};
use crate::merge::strategy::{LayerInfo, MergeStrategy, Sum};
use crate::merge::{AdapterFactors, AdapterLayer, Isa, Merger, Target, copy_rows};
use crate::rng::{Rng, Stream};
use crate::weights::WeightFile;

/// Swaps between a merge and the removal of everything.
const SWAPS: usize = 3;

/// What [`merge`] measured. Times are medians in milliseconds.
#[derive(Clone, Debug, Serialize)]
pub struct BenchMerge {
    /// Whose shapes.
    pub shape: Shape,
    /// How many adapters were merged, in slots of a contiguous partition.
    pub adapters: usize,
    /// Their rank.
    pub rank: usize,
    /// The partition's capacity.
    pub capacity: u32,
    /// f32, f16 or bf16, in the file and live.
    pub precision: &'static str,
    /// Threads.
    pub threads: usize,
    /// Repeats, interleaved.
    pub repeats: usize,
    /// The instruction set of the kernel.
    pub kernel: String,
    /// Bytes of the Linears' live weights.
    pub model_bytes: u64,
    /// Bytes of the adapters' factors in memory.
    pub adapter_bytes: u64,
    /// Bytes that merging all adapters writes.
    pub bytes_written: u64,
    /// Copying the rows that a merge writes from the mapped file to the live weights.
    pub copy_ms: f64,
    /// Merging all adapters into the pristine model.
    pub merge_ms: f64,
    /// `merge_ms / copy_ms`.
    pub merge_over_copy: f64,
    /// Exchanging one adapter for another of the same slot, for three slots in a row: rows that are not in the caches.
    pub swap_one_ms: f64,
    /// `swap_one_ms / merge_ms`.
    pub swap_over_merge: f64,
    /// Removing all adapters.
    pub remove_all_ms: f64,
    /// Whether removing all adapters gave back the file's bits in every repeat.
    pub remove_all_exact: bool,
    /// Whether the merged weights on a card have the bits that the same merge in main memory gives; none where they are
    /// in main memory.
    pub same_as_cpu: Option<bool>,
    /// The most memory that the first merge took beyond the model and the adapters given to it; none where the
    /// system does not tell.
    pub peak_bytes_over_model: Option<u64>,
    /// `peak_bytes_over_model / model_bytes`.
    pub peak_over_model: Option<f64>,
}

/// Merges `adapters` adapters of `rank` on random weights of `shape` in a mapped temporary file, live on `device`, in
/// turns with a copy of the same bytes, on `threads` threads.
#[allow(clippy::too_many_arguments)]
pub fn merge(
    shape: Shape,
    adapters: usize,
    rank: usize,
    capacity: u32,
    precision: DType,
    device: &Device,
    threads: usize,
    repeats: usize,
) -> Result<BenchMerge> {
    let name = match precision {
        DType::F32 => "f32",
        DType::F16 => "f16",
        DType::BF16 => "bf16",
        other => return Err(Error::option("precision", format!("{other:?}"), "it must be f32, f16 or bf16")),
    };
    check_range("capacity", capacity as usize, 4096)?;
    check_range("adapters", adapters, capacity as usize)?;
    check_range("rank", rank, 1024)?;
    check_range("threads", threads, 1024)?;
    check_range("repeats", repeats, 10_000)?;
    let pool = thread_pool(threads)?;
    let layers = shape.attention_layers();
    let folder = tempfile::tempdir().map_err(|e| Error::io(std::env::temp_dir(), e))?;
    let path = folder.path().join("model.safetensors");
    write_random(&layers, precision, &path)?;
    let file = WeightFile::open(path)?;
    let targets = layers
        .iter()
        .map(|info| {
            let pristine = file.view(&info.name)?;
            Ok(Target { info: info.clone(), live: pristine.load(precision, device)?, pristine })
        })
        .collect::<Result<Vec<_>>>()?;
    // The first adapters have a second version, to be swapped in.
    let swaps = adapters.min(SWAPS);
    let concepts = (0..adapters + swaps)
        .into_par_iter()
        .map(|i| random_adapter(&layers, rank, capacity, (i % adapters) as u32, i as u64))
        .collect::<Result<Vec<_>>>()?;
    let all: Vec<(Arc<AdapterFactors>, f32)> = concepts[..adapters].iter().map(|a| (a.clone(), 1.0)).collect();
    let mut swapped = all.clone();
    let after_swaps: Vec<_> = (0..swaps)
        .map(|slot| {
            swapped[slot].0 = concepts[adapters + slot].clone();
            swapped.clone()
        })
        .collect();

    let written: Vec<usize> = layers.iter().map(|info| adapters * info.rows / capacity as usize).collect();
    let mut merger = Merger::new(targets.clone())?;
    let strategy: Arc<dyn MergeStrategy> = Arc::new(Sum);
    let mut times = [const { Vec::new() }; 4];
    let (mut bytes_written, mut peak, mut exact) = (0, None, true);
    pool.install(|| -> Result<()> {
        for repeat in 0..=repeats {
            let start = Instant::now();
            let copies = targets.par_iter().zip(&written).with_max_len(1);
            copies.try_for_each(|(target, &rows)| copy_rows(target, rows))?;
            device.synchronize()?;
            let copy = start.elapsed().as_secs_f64();
            let before = if repeat == 0 { memory::reset_peak().and_then(|()| memory::resident()) } else { None };
            let merge = merger.apply(&all, &strategy)?;
            peak = peak.or_else(|| Some(memory::peak()?.saturating_sub(before?)));
            let swap = |after: &Vec<_>| Ok(merger.apply(after, &strategy)?.seconds);
            let swaps = after_swaps.iter().map(swap).collect::<Result<Vec<f64>>>()?;
            exact &= !is_pristine(&targets)?;
            let remove = merger.apply(&[], &strategy)?;
            exact &= is_pristine(&targets)?;
            bytes_written = merge.bytes_written;
            // The first round warms up.
            if repeat > 0 {
                let round = [&[copy][..], &[merge.seconds], &swaps, &[remove.seconds]];
                times.iter_mut().zip(round).for_each(|(times, round)| times.extend(round.iter().map(|s| 1e3 * s)));
            }
        }
        Ok(())
    })?;
    let same_as_cpu = match device.is_cpu() {
        true => None,
        false => Some(merges_as_on_the_cpu(&targets, &mut merger, &all, &strategy)?),
    };
    let [copy_ms, merge_ms, swap_one_ms, remove_all_ms] = times.map(median);
    let model_bytes = targets.iter().map(|target| target.pristine.bytes().len() as u64).sum::<u64>();
    Ok(BenchMerge {
        shape,
        adapters,
        rank,
        capacity,
        precision: name,
        threads,
        repeats,
        kernel: format!("{:?}", Isa::detect()).to_lowercase(),
        model_bytes,
        adapter_bytes: all.iter().map(|(adapter, _)| adapter.bytes() as u64).sum(),
        bytes_written,
        copy_ms,
        merge_ms,
        merge_over_copy: merge_ms / copy_ms,
        swap_one_ms,
        swap_over_merge: swap_one_ms / merge_ms,
        remove_all_ms,
        remove_all_exact: exact,
        same_as_cpu,
        peak_bytes_over_model: peak,
        peak_over_model: peak.map(|peak| peak as f64 / model_bytes as f64),
    })
}

/// Whether `merger` brings its `targets` to the bits that the same merge in main memory gives.
fn merges_as_on_the_cpu(
    targets: &[Target],
    merger: &mut Merger,
    adapters: &[(Arc<AdapterFactors>, f32)],
    strategy: &Arc<dyn MergeStrategy>,
) -> Result<bool> {
    let in_memory = |target: &Target| -> Result<Target> {
        let live = target.pristine.load(target.live.dtype(), &Device::Cpu)?;
        Ok(Target { live, ..target.clone() })
    };
    let in_memory = targets.iter().map(in_memory).collect::<Result<Vec<_>>>()?;
    Merger::new(in_memory.clone())?.apply(adapters, strategy)?;
    merger.apply(adapters, strategy)?;
    let bits = |live: &Tensor| -> Result<Vec<f32>> {
        Ok(live.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
    };
    let same = |(one, other): (&Target, &Target)| -> Result<bool> {
        let (one, other) = (bits(&one.live)?, bits(&other.live)?);
        Ok(one.iter().map(|x| x.to_bits()).eq(other.iter().map(|x| x.to_bits())))
    };
    targets.par_iter().zip(&in_memory).map(same).try_reduce(|| true, |one, other| Ok(one && other))
}

/// Fails unless `value` is 1 to `max`.
pub(super) fn check_range(name: &str, value: usize, max: usize) -> Result<()> {
    let reason = format!("it must be 1 to {max}");
    if (1..=max).contains(&value) { Ok(()) } else { Err(Error::option(name, value, reason)) }
}

pub(super) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// A pool of `threads` threads.
pub(super) fn thread_pool(threads: usize) -> Result<rayon::ThreadPool> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    pool.map_err(|e| Error::option("threads", threads, e.to_string()))
}

/// How a file names `precision`: f16, bf16, else f32.
pub(super) fn stored_as(precision: DType) -> Dtype {
    match precision {
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
        _ => Dtype::F32,
    }
}

/// Appends `value` as it is stored in `precision`: f16, bf16, else f32.
pub(super) fn store(value: f32, precision: DType, to: &mut Vec<u8>) {
    match precision {
        DType::F16 => to.extend(f16::from_f32(value).to_le_bytes()),
        DType::BF16 => to.extend(bf16::from_f32(value).to_le_bytes()),
        _ => to.extend(value.to_le_bytes()),
    }
}

/// Whether the live weights have the file's bits.
fn is_pristine(targets: &[Target]) -> Result<bool> {
    let same = targets.par_iter().map(crate::merge::is_pristine);
    same.try_reduce(|| true, |one, other| Ok(one && other))
}

pub(super) fn random_adapter(
    layers: &[LayerInfo],
    rank: usize,
    capacity: u32,
    slot: u32,
    seed: u64,
) -> Result<Arc<AdapterFactors>> {
    let partition = Partition { scheme: Scheme::Contiguous, capacity, seed: 0, slot };
    let layers = layers.iter().zip(0..).map(|(info, lane)| {
        let mut rng = Rng::new(seed, Stream::Test, 0, lane);
        let rows = partition.rows(info.rows);
        let mut values = |count: usize| (0..count).map(|_| rng.uniform() - 0.5).collect();
        let (a, b) = (values(rank * info.columns), values(rows.len() * rank));
        AdapterLayer { name: info.name.clone(), outputs: info.rows, columns: info.columns, rank, rows, a, b }
    });
    Ok(Arc::new(AdapterFactors::new(format!("concept {seed}"), 1.0, layers.collect())?))
}

/// Random weights, made when they are written.
struct RandomTensor {
    shape: [usize; 2],
    precision: DType,
    lane: u16,
}

impl safetensors::View for RandomTensor {
    fn dtype(&self) -> Dtype {
        stored_as(self.precision)
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        let mut rng = Rng::new(0, Stream::Test, 1, self.lane);
        let mut bytes = Vec::with_capacity(self.data_len());
        for _ in 0..self.shape[0] * self.shape[1] {
            store(rng.uniform() - 0.5, self.precision, &mut bytes);
        }
        bytes.into()
    }
    fn data_len(&self) -> usize {
        self.shape[0] * self.shape[1] * self.precision.size_in_bytes()
    }
}

pub(super) fn write_random(layers: &[LayerInfo], precision: DType, path: &std::path::Path) -> Result<()> {
    let tensor = |(info, lane): (&LayerInfo, u16)| {
        (info.name.clone(), RandomTensor { shape: [info.rows, info.columns], precision, lane })
    };
    let tensors: BTreeMap<String, RandomTensor> = layers.iter().zip(0..).map(tensor).collect();
    safetensors::serialize_to_file(tensors, None, path).map_err(|e| Error::invalid_file(path, e.to_string()))
}
