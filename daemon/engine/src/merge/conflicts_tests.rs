//! The diagnostics: how much adapters get in each other's way.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use super::AdapterFactors;
use super::conflicts::conflicts;
use super::tests::{adapter, disjoint, strided};

#[test]
fn disjoint_rows_do_not_conflict_at_all() {
    let adapters = disjoint(15, 4);
    let report = conflicts(&adapters.iter().map(Arc::as_ref).collect::<Vec<_>>()).unwrap();
    assert_eq!(report.overall.pairs.len(), 15 * 14 / 2);
    for figures in report.layers.iter().chain([&report.overall]) {
        assert_eq!(figures.sign_conflicts.to_bits(), 0);
        for pair in &figures.pairs {
            assert_eq!((pair.cosine.to_bits(), pair.sign_conflicts.to_bits(), pair.shared_rows), (0, 0, 0));
        }
    }
    assert!(report.overall.norms.iter().all(|&norm| norm > 0.0));
}

#[test]
fn conflicts_equal_those_of_the_dense_deltas() {
    let everywhere = |m| (0..m as u32).collect::<Vec<_>>();
    let adapters =
        [adapter("a", 1, 3, everywhere), adapter("b", 2, 4, |m| strided(1, m)), adapter("c", 3, 2, everywhere)];
    let report = conflicts(&adapters.iter().map(Arc::as_ref).collect::<Vec<_>>()).unwrap();
    let delta = |adapter: &AdapterFactors, name: &str| {
        let layer = adapter.layer(name).unwrap();
        let mut delta = vec![0.0; layer.outputs * layer.columns];
        for (local, &p) in layer.rows.iter().enumerate() {
            for k in 0..layer.rank {
                let w = layer.b[local * layer.rank + k] as f64 * adapter.scale() as f64;
                for j in 0..layer.columns {
                    delta[p as usize * layer.columns + j] += w * layer.a[k * layer.columns + j] as f64;
                }
            }
        }
        delta
    };
    let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
    for figures in &report.layers {
        let deltas = adapters.each_ref().map(|adapter| delta(adapter, &figures.layer));
        for pair in &figures.pairs {
            let (x, y) = (&deltas[pair.one], &deltas[pair.other]);
            let cosine = dot(x, y) / (dot(x, x) * dot(y, y)).sqrt();
            let conflicts = x.iter().zip(y).filter(|(x, y)| *x * *y < 0.0).count() as f64 / x.len() as f64;
            assert!((pair.cosine - cosine).abs() < 1e-9, "{} {cosine}", pair.cosine);
            assert_eq!(pair.sign_conflicts, conflicts);
        }
        let clash = |j: &usize| deltas.iter().any(|d| d[*j] > 0.0) && deltas.iter().any(|d| d[*j] < 0.0);
        let conflicts = (0..deltas[0].len()).filter(clash).count() as f64 / deltas[0].len() as f64;
        assert_eq!(figures.sign_conflicts, conflicts);
        assert!((figures.norms[0] - dot(&deltas[0], &deltas[0]).sqrt()).abs() < 1e-9);
    }
}
