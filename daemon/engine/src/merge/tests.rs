//! The merge laws, bit for bit.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use tempfile::TempDir;

use super::strategy::{AdapterView, Coefficients, LayerInfo, LayerPlan, MergeStrategy, Plan, Sum, Term, Tile};
use super::*;
use crate::error::Result;
use crate::rng::{Rng, Stream};
use crate::weights::WeightFile;

pub(super) const TYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];
/// Widths with and without whole cache lines, and layers with fewer rows than slots.
pub(super) const SHAPES: [(usize, usize); 6] = [(64, 128), (48, 320), (33, 77), (20, 1), (7, 31), (96, 96)];
const CAPACITY: usize = 16;

fn infos() -> Vec<LayerInfo> {
    SHAPES.iter().map(|&(rows, columns)| LayerInfo { name: format!("layer{rows}x{columns}"), rows, columns }).collect()
}

/// A random model of `SHAPES` in a mapped file of `stored` type, live in `live` type.
pub(super) struct Model {
    pub(super) targets: Vec<Target>,
    _folder: TempDir,
}

pub(super) fn model(stored: DType, live: DType) -> Model {
    let mut rng = Rng::new(1, Stream::Test, 0, 0);
    let tensors: BTreeMap<String, Tensor> = infos()
        .into_iter()
        .map(|info| {
            let values = rng.normals(info.rows * info.columns);
            let tensor = Tensor::from_vec(values, (info.rows, info.columns), &Device::Cpu).unwrap();
            (info.name, tensor.to_dtype(stored).unwrap())
        })
        .collect();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    safetensors::serialize_to_file(tensors, None, &path).unwrap();
    let file = WeightFile::open(path).unwrap();
    let target = |info: LayerInfo| {
        let pristine = file.view(&info.name).unwrap();
        Target { live: pristine.load(live, &Device::Cpu).unwrap(), pristine, info }
    };
    Model { targets: infos().into_iter().map(target).collect(), _folder: folder }
}

impl Model {
    /// Every bit of the live weights, layer by layer, row by row.
    pub(super) fn bits(&self) -> Vec<Vec<Vec<u32>>> {
        let layer = |target: &Target| {
            let rows = target.live.to_dtype(DType::F32).unwrap().to_vec2::<f32>().unwrap();
            rows.iter().map(|row| row.iter().map(|x| x.to_bits()).collect()).collect()
        };
        self.targets.iter().map(layer).collect()
    }
    pub(super) fn merger(&self) -> Merger {
        Merger::new(self.targets.clone()).unwrap()
    }
}

pub(super) fn block(slot: usize, m: usize) -> Vec<u32> {
    (slot * m / CAPACITY..(slot + 1) * m / CAPACITY).map(|p| p as u32).collect()
}

pub(super) fn strided(slot: usize, m: usize) -> Vec<u32> {
    (slot..m).step_by(CAPACITY).map(|p| p as u32).collect()
}

pub(super) fn adapter(name: &str, seed: u64, rank: usize, rows_of: impl Fn(usize) -> Vec<u32>) -> Arc<AdapterFactors> {
    let mut rng = Rng::new(seed, Stream::Test, 1, 0);
    let layers = infos().into_iter().map(|LayerInfo { name, rows: outputs, columns }| {
        let rows = rows_of(outputs);
        let (a, b) = (rng.normals(rank * columns), rng.normals(rows.len() * rank));
        AdapterLayer { name, outputs, columns, rank, rows, a, b }
    });
    Arc::new(AdapterFactors::new(name, 0.37, layers.collect()).unwrap())
}

pub(super) fn disjoint(count: usize, rank: usize) -> Vec<Arc<AdapterFactors>> {
    (0..count).map(|s| adapter(&format!("concept{s}"), 100 + s as u64, rank, |m| block(s, m))).collect()
}

pub(super) fn at_one(adapters: &[Arc<AdapterFactors>]) -> Vec<(Arc<AdapterFactors>, f32)> {
    adapters.iter().map(|adapter| (adapter.clone(), 1.0)).collect()
}

pub(super) fn sum() -> Arc<dyn MergeStrategy> {
    Arc::new(Sum)
}

/// A strategy of coefficients: `coefficient(weight, owners of the row)`.
struct PerRow(&'static str, fn(f32, usize) -> f32);

impl MergeStrategy for PerRow {
    fn id(&self) -> &str {
        self.0
    }
    fn fingerprint(&self) -> &str {
        self.0
    }
    fn plan(&self, layers: &[LayerInfo], adapters: &[&dyn AdapterView]) -> Result<Plan> {
        let layer = |index: usize| {
            let owners =
                |row: &u32| adapters.iter().filter(|a| a.factors(index).is_some_and(|f| f.rows.contains(row))).count();
            let term = |(adapter, view): (usize, &&dyn AdapterView)| {
                let rows = view.factors(index)?.rows;
                let coefficients = rows.iter().map(|row| (self.1)(view.weight(), owners(row))).collect();
                Some(Term { adapter, coefficients: Coefficients::PerRow(coefficients) })
            };
            LayerPlan::Factored(adapters.iter().enumerate().filter_map(term).collect())
        };
        Ok((0..layers.len()).map(layer).collect())
    }
    fn fill(&self, _: Tile<'_>, _: &mut [f32]) -> Result<()> {
        unreachable!("nothing is planned dense")
    }
}

/// The owners' mean.
pub(super) fn mean() -> Arc<dyn MergeStrategy> {
    Arc::new(PerRow("mean", |weight, owners| weight / owners as f32))
}

fn tenth() -> Arc<dyn MergeStrategy> {
    Arc::new(PerRow("tenth", |weight, _| 0.1 * weight))
}

#[test]
fn any_order_gives_the_same_bits() {
    for dtype in TYPES {
        let model = model(dtype, dtype);
        // Overlapping rows, so that the order of the sums matters.
        let adapters: Vec<_> = (0..6).map(|s| adapter(&format!("c{s}"), s, 3, |m| (0..m as u32).collect())).collect();
        let mut list: Vec<_> =
            adapters.iter().zip([1.0, 0.5, -0.25, 2.0, 0.1, 0.7]).map(|(a, w)| (a.clone(), w)).collect();
        let mut merger = model.merger();
        merger.apply(&list, &mean()).unwrap();
        let expected = model.bits();
        let mut rng = Rng::new(3, Stream::Test, 0, 0);
        for _ in 0..10 {
            rng.shuffle(&mut list);
            merger.apply(&[], &mean()).unwrap();
            merger.apply(&list, &mean()).unwrap();
            assert_eq!(model.bits(), expected, "{dtype:?}");
        }
    }
}

#[test]
fn a_hundred_random_swaps_equal_the_direct_merge() {
    for (stored, live) in [(0, 0), (1, 1), (2, 2), (0, 1), (1, 0), (0, 2), (2, 1)].map(|(s, l)| (TYPES[s], TYPES[l])) {
        let (swapped, direct) = (model(stored, live), model(stored, live));
        let mut pool = disjoint(15, 4);
        pool.extend((0..5).map(|s| adapter(&format!("other{s}"), 200 + s, 2, |m| strided(s as usize, m))));
        pool.push(adapter("everywhere", 300, 5, |m| (0..m as u32).collect()));
        let mut merger = swapped.merger();
        let mut rng = Rng::new(4, Stream::Test, 0, 0);
        let mut list: Vec<(Arc<AdapterFactors>, f32)> = Vec::new();
        for step in 0..100 {
            match rng.below(3) {
                0 if !list.is_empty() => drop(list.swap_remove(rng.below(list.len()))),
                1 if !list.is_empty() => list.iter_mut().for_each(|(_, weight)| *weight = rng.below(4) as f32 * 0.5),
                _ => {
                    let new = pool[rng.below(pool.len())].clone();
                    list.retain(|(there, _)| there.digest() != new.digest());
                    list.push((new, 1.0));
                }
            }
            merger.apply(&list, &mean()).unwrap();
            if step % 20 == 19 {
                direct.merger_from_scratch(&list);
                assert_eq!(swapped.bits(), direct.bits(), "{stored:?} {live:?} after {step} steps");
            }
        }
    }
}

impl Model {
    /// Resets the live weights to the file's and merges `list` into them.
    fn merger_from_scratch(&self, list: &[(Arc<AdapterFactors>, f32)]) {
        for target in &self.targets {
            let pristine = target.pristine.load(target.live.dtype(), &Device::Cpu).unwrap();
            target.live.inplace_op2(&pristine, &Assign).unwrap();
        }
        self.merger().apply(list, &mean()).unwrap();
    }
}

/// live = other.
struct Assign;

impl candle_core::InplaceOp2 for Assign {
    fn name(&self) -> &'static str {
        "assign"
    }
    fn cpu_fwd(
        &self,
        live: &mut candle_core::CpuStorage,
        _: &candle_core::Layout,
        other: &candle_core::CpuStorage,
        _: &candle_core::Layout,
    ) -> candle_core::Result<()> {
        *live = other.clone();
        Ok(())
    }
}

#[test]
fn removing_all_restores_the_files_bits() {
    for stored in TYPES {
        for live in TYPES {
            let model = model(stored, live);
            let pristine = model.bits();
            let mut merger = model.merger();
            let report = merger.apply(&at_one(&disjoint(15, 4)), &sum()).unwrap();
            assert_ne!(model.bits(), pristine);
            let owned: usize = SHAPES.iter().map(|&(m, _)| 15 * m / CAPACITY).sum();
            assert_eq!(report.rows_rewritten, owned as u64);
            let back = merger.apply(&[], &sum()).unwrap();
            assert_eq!((back.rows_rewritten, back.layers_touched), (owned as u64, report.layers_touched));
            assert_eq!(model.bits(), pristine, "{stored:?} {live:?}");
        }
    }
}

#[test]
fn merged_rows_equal_solo_rows() {
    for dtype in TYPES {
        let (merged, solo) = (model(dtype, dtype), model(dtype, dtype));
        let adapters = disjoint(15, 4);
        merged.merger().apply(&at_one(&adapters), &sum()).unwrap();
        let merged = merged.bits();
        let pristine = solo.bits();
        let mut merger = solo.merger();
        for (slot, adapter) in adapters.iter().enumerate() {
            merger.apply(&[(adapter.clone(), 1.0)], &sum()).unwrap();
            for (layer, bits) in solo.bits().iter().enumerate() {
                let rows = block(slot, bits.len());
                for (p, row) in bits.iter().enumerate() {
                    let owned = rows.contains(&(p as u32));
                    let expected = if owned { &merged[layer][p] } else { &pristine[layer][p] };
                    assert_eq!(row, expected, "{dtype:?} concept {slot} layer {layer} row {p}");
                }
            }
        }
    }
}

/// W0 + sum_i c_i s_i B_i A_i in f64, by layer and row.
fn reference(model: &Model, list: &[(Arc<AdapterFactors>, f64)]) -> Vec<Vec<Vec<f64>>> {
    let layer = |target: &Target| {
        let w0 = target.pristine.load(DType::F64, &Device::Cpu).unwrap();
        let mut w = w0.to_vec2::<f64>().unwrap();
        for (adapter, c) in list {
            let layer = adapter.layer(&target.info.name).unwrap();
            for (local, &p) in layer.rows.iter().enumerate() {
                for k in 0..layer.rank {
                    let b = layer.b[local * layer.rank + k] as f64;
                    for (j, w) in w[p as usize].iter_mut().enumerate() {
                        *w += c * adapter.scale() as f64 * b * layer.a[k * layer.columns + j] as f64;
                    }
                }
            }
        }
        w
    };
    model.targets.iter().map(layer).collect()
}

fn assert_near(model: &Model, expected: &[Vec<Vec<f64>>], live: DType) {
    let unit = match live {
        DType::F32 => 2f64.powi(-24),
        DType::F16 => 2f64.powi(-11),
        _ => 2f64.powi(-8),
    };
    for (bits, expected) in model.bits().iter().zip(expected) {
        for (x, y) in bits.iter().flatten().zip(expected.iter().flatten()) {
            let x = f32::from_bits(*x) as f64;
            // One rounding to the live type, and f32 roundings of a sum of a few values below 50.
            assert!((x - y).abs() <= unit * y.abs() * 1.001 + 2e-5, "{live:?}: {x} is not {y}");
        }
    }
}

#[test]
fn a_merge_is_the_sum_of_the_deltas() {
    for live in TYPES {
        let model = model(DType::F32, live);
        let mut merger = model.merger();
        let adapter = adapter("one", 7, 4, |m| strided(3, m));
        merger.apply(&[(adapter.clone(), 0.8)], &sum()).unwrap();
        assert_near(&model, &reference(&model, &[(adapter, 0.8f32 as f64)]), live);

        let all = disjoint(15, 4);
        merger.apply(&at_one(&all), &sum()).unwrap();
        assert_near(&model, &reference(&model, &all.iter().map(|a| (a.clone(), 1.0)).collect::<Vec<_>>()), live);

        merger.apply(&at_one(&all), &tenth()).unwrap();
        assert_near(&model, &reference(&model, &all.iter().map(|a| (a.clone(), 0.1)).collect::<Vec<_>>()), live);

        let dense: Vec<_> =
            (0..9).map(|s| self::adapter(&format!("d{s}"), s, 4, |m| (0..m as u32).collect())).collect();
        let weights = [1.0, 2.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.5f32];
        let list: Vec<_> = dense.iter().cloned().zip(weights).collect();
        merger.apply(&list, &tenth()).unwrap();
        let list: Vec<_> = dense.iter().cloned().zip(weights.map(|w| w as f64 / 10.0)).collect();
        assert_near(&model, &reference(&model, &list), live);
    }
}

#[test]
fn every_instruction_set_gives_the_same_bits() {
    for stored in TYPES {
        for live in TYPES {
            let mut list = at_one(&disjoint(15, 4));
            list.push((adapter("all", 9, 7, |m| (0..m as u32).collect()), 0.3));
            let merge = |change: &dyn Fn(Merger) -> Merger| {
                let model = model(stored, live);
                let mut merger = change(model.merger());
                merger.apply(&list[3..7], &mean()).unwrap();
                merger.apply(&list, &mean()).unwrap();
                model.bits()
            };
            let expected = merge(&|merger| merger.with_isa(Isa::Portable));
            for &isa in Isa::available() {
                assert!(merge(&|m| m.with_isa(isa)) == expected, "{isa:?} differs in {stored:?} -> {live:?}");
            }
            assert!(merge(&Merger::with_staging) == expected, "staged rows differ in {stored:?} -> {live:?}");
        }
    }
}

#[test]
fn only_changed_rows_are_rewritten() {
    let model = model(DType::F32, DType::F32);
    let mut merger = model.merger();
    let adapters = disjoint(15, 4);
    let mut list = at_one(&adapters);
    merger.apply(&list, &sum()).unwrap();
    assert_eq!(merger.apply(&list, &sum()).unwrap().rows_rewritten, 0);
    let rows_of = |slot| SHAPES.iter().map(|&(m, _)| block(slot, m).len() as u64).sum::<u64>();
    list[3] = (adapter("new", 999, 2, |m| block(3, m)), 1.0);
    assert_eq!(merger.apply(&list, &sum()).unwrap().rows_rewritten, rows_of(3));
    list[5].1 = 0.5;
    assert_eq!(merger.apply(&list, &sum()).unwrap().rows_rewritten, rows_of(5));
    list[5].1 = 0.0;
    assert_eq!(merger.apply(&list, &sum()).unwrap().rows_rewritten, rows_of(5));
    list.remove(5);
    assert_eq!(merger.apply(&list, &sum()).unwrap().rows_rewritten, 0);
    assert_eq!(merger.composition().count(), 14);
}
