//! Layers that a strategy fills itself.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::DType;

use super::strategy::{AdapterView, LayerInfo, LayerPlan, MergeStrategy, Plan, Tile};
use super::tests::{TYPES, adapter, at_one, disjoint, model, sum};
use crate::error::{Error, Result};

/// The sum of the deltas times a factor, computed by the strategy; from the `fails_after`-th tile on it fails.
struct Dense {
    fingerprint: String,
    factor: f32,
    tiles: AtomicUsize,
    fails_after: usize,
}

fn dense(factor: f32, fails_after: usize) -> Arc<Dense> {
    Arc::new(Dense { fingerprint: format!("dense {factor}"), factor, tiles: AtomicUsize::new(0), fails_after })
}

impl MergeStrategy for Dense {
    fn id(&self) -> &str {
        "dense"
    }
    fn fingerprint(&self) -> &str {
        &self.fingerprint
    }
    fn plan(&self, layers: &[LayerInfo], _: &[&dyn AdapterView]) -> Result<Plan> {
        Ok(layers.iter().map(|_| LayerPlan::Dense(Arc::new([self.factor]))).collect())
    }
    fn fill(&self, tile: Tile<'_>, delta: &mut [f32]) -> Result<()> {
        if self.tiles.fetch_add(1, Ordering::Relaxed) >= self.fails_after {
            return Err(Error::option("tile", tile.first_row, "fails"));
        }
        let n = tile.layer.columns;
        for view in tile.adapters {
            let Some(f) = view.factors(tile.index) else { continue };
            for (local, &row) in f.rows.iter().enumerate() {
                let Some(row) = (row as usize).checked_sub(tile.first_row).filter(|&row| row < tile.rows) else {
                    continue;
                };
                for k in 0..f.rank {
                    let w = tile.numbers[0] * view.weight() * f.scale * f.b[local * f.rank + k];
                    delta[row * n..][..n].iter_mut().zip(&f.a[k * n..]).for_each(|(out, a)| *out += w * a);
                }
            }
        }
        Ok(())
    }
}

#[test]
fn a_dense_merge_is_the_factored_one_up_to_rounding_and_goes_without_a_trace() {
    for stored in TYPES {
        for live in TYPES {
            let (filled, factored) = (model(stored, live), model(stored, live));
            let pristine = filled.bits();
            let list = at_one(&[adapter("a", 1, 3, |m| (0..m as u32).collect()), disjoint(3, 4)[2].clone()]);
            let strategy: Arc<dyn MergeStrategy> = dense(1.0, usize::MAX);
            let mut merger = filled.merger();
            merger.apply(&list, &strategy).unwrap();
            factored.merger().apply(&list, &sum()).unwrap();
            let unit = match live {
                DType::F32 => 2f32.powi(-20),
                DType::F16 => 2f32.powi(-9),
                _ => 2f32.powi(-6),
            };
            let pairs = |model: &super::tests::Model| model.bits().into_iter().flatten().flatten().collect::<Vec<_>>();
            for (x, y) in pairs(&filled).into_iter().zip(pairs(&factored)) {
                let (x, y) = (f32::from_bits(x), f32::from_bits(y));
                assert!((x - y).abs() <= unit * y.abs() + 1e-5, "{stored:?} {live:?}: {x} {y}");
            }
            assert_eq!(merger.apply(&list, &strategy).unwrap().rows_rewritten, 0, "nothing has changed");
            merger.apply(&[], &strategy).unwrap();
            assert!(filled.bits() == pristine, "{stored:?} {live:?}");
        }
    }
}

#[test]
fn other_settings_weights_or_strategies_rewrite_dense_layers() {
    let (swapped, direct) = (model(DType::F32, DType::F32), model(DType::F32, DType::F32));
    let mut list = at_one(&disjoint(3, 4));
    let (one, two): (Arc<dyn MergeStrategy>, Arc<dyn MergeStrategy>) = (dense(1.0, usize::MAX), dense(2.0, usize::MAX));
    let mut merger = swapped.merger();
    merger.apply(&list, &sum()).unwrap();
    merger.apply(&list, &one).unwrap();
    merger.apply(&list, &two).unwrap();
    list[1].1 = 0.5;
    assert!(merger.apply(&list, &two).unwrap().rows_rewritten > 0);
    direct.merger().apply(&list, &two).unwrap();
    assert!(swapped.bits() == direct.bits());
    merger.apply(&list, &sum()).unwrap();
    merger.apply(&[], &sum()).unwrap();
    assert!(swapped.bits() == model(DType::F32, DType::F32).bits());
}

#[test]
fn a_strategy_that_fails_in_the_middle_changes_nothing() {
    for good in [sum(), dense(2.0, usize::MAX) as Arc<dyn MergeStrategy>] {
        let model = model(DType::F32, DType::F16);
        let mut merger = model.merger();
        let list = at_one(&disjoint(3, 4));
        merger.apply(&list, &good).unwrap();
        let before = model.bits();
        for fails_after in [0, 1, 4] {
            let failing: Arc<dyn MergeStrategy> = dense(1.0, fails_after);
            let error = merger.apply(&list, &failing).unwrap_err();
            assert!(error.to_string().contains("fails"), "{error}");
            assert!(model.bits() == before, "a bit changed");
        }
        let huge: Arc<dyn MergeStrategy> = dense(1e30, usize::MAX);
        let error = merger.apply(&list, &huge).unwrap_err().to_string();
        assert!(error.contains("does not stay finite") && error.contains("concept"), "{error}");
        assert!(model.bits() == before, "a bit changed");
    }
}
