//! The laws of merging, tried on small problems.

use super::composed::{Problem, merge};
use crate::error::{Code, Error, Result};
use crate::manifest::Law;
use crate::merge::{AnyMergeStrategy, Factors, Layer};

/// Rounding that a law allows, relative to the largest number of a layer.
const TOLERANCE: f32 = 1e-5;

/// Whether `strategy` keeps `law` on the adapters of `problem`. The error says where it does not.
pub fn check_law(law: Law, strategy: &dyn AnyMergeStrategy, problem: &Problem) -> Result<()> {
    let count = problem.adapters().len();
    match law {
        Law::Converges => Err(Error::new(Code::NotSupported, "converges is a law of samplers")),
        Law::Identity => (0..count).try_for_each(|i| {
            let mut alone = problem.choose(&[i]);
            alone.set_weights(&[1.0]);
            let adapter = &alone.adapters()[0];
            let delta = |(factors, layer): (Option<Factors<'_>>, &Layer)| match factors {
                Some(factors) => factors.delta(0..layer.rows),
                None => vec![0.0; layer.rows * layer.columns],
            };
            let own: Vec<Vec<f32>> = adapter.factors_by_layer().zip(&alone.layers).map(delta).collect();
            let what = format!("{} alone at weight 1 is not its own delta", adapter.name);
            compare(problem, &merge(strategy, &alone, 5)?, &own, &what)
        }),
        Law::Order => {
            let expected = merge(strategy, problem, 5)?;
            let reversed: Vec<usize> = (0..count).rev().collect();
            let rotated: Vec<usize> = (0..count).map(|i| (i + 1) % count).collect();
            [reversed, rotated].iter().try_for_each(|order| {
                let what = format!("the order {order:?} of the adapters gives another merge");
                compare(problem, &merge(strategy, &problem.choose(order), 5)?, &expected, &what)
            })
        }
        Law::Scale => {
            let once = merge(strategy, problem, 5)?;
            [0.25, 3.0, -1.0].iter().try_for_each(|c| {
                let mut scaled = problem.clone();
                let weights: Vec<f32> = problem.adapters().iter().map(|adapter| c * adapter.weight).collect();
                scaled.set_weights(&weights);
                let expected: Vec<Vec<f32>> = once.iter().map(|layer| layer.iter().map(|x| c * x).collect()).collect();
                let what = format!("weights times {c} do not change the weights by {c} times as much");
                compare(problem, &merge(strategy, &scaled, 5)?, &expected, &what)
            })
        }
    }
}

/// Tries every law of merging on many small problems: `strategy` must keep those that it `declares`, and no other; a law
/// that it keeps by chance on one problem may be missing, one that it breaks on any may not be declared.
pub fn check_laws(declares: &[Law], strategy: &dyn AnyMergeStrategy) -> Result<()> {
    for law in [Law::Identity, Law::Order, Law::Scale] {
        let mut kept = Ok(());
        for seed in 1..20 {
            let mut problem = Problem::random(seed, 1 + seed as usize % 5, seed % 2 == 0);
            problem.set_weights(&[1.0, 0.5, 2.0, 0.75, 1.25]);
            kept = kept.and_then(|()| check_law(law, strategy, &problem));
        }
        if declares.contains(&law) {
            kept?;
        } else if kept.is_ok() {
            return Err(Error::new(Code::Failed, format!("the law {law:?} is kept: declare it")));
        }
    }
    Ok(())
}

fn compare(problem: &Problem, merged: &[Vec<f32>], expected: &[Vec<f32>], what: &str) -> Result<()> {
    if merged.len() != problem.layers.len() || expected.len() != merged.len() {
        let message =
            format!("{what}: {} layers, {} expected, of {}", merged.len(), expected.len(), problem.layers.len());
        return Err(Error::new(Code::Failed, message));
    }
    for (layer, (merged, expected)) in problem.layers.iter().zip(merged.iter().zip(expected)) {
        let largest = expected.iter().fold(1.0f32, |most, x| most.max(x.abs()));
        for (i, (a, b)) in merged.iter().zip(expected).enumerate() {
            if (a - b).abs() > TOLERANCE * largest {
                let (row, column) = (i / layer.columns, i % layer.columns);
                let message = format!("{what}: {}[{row}, {column}] = {a} instead of {b}", layer.name);
                return Err(Error::new(Code::Failed, message));
            }
        }
    }
    Ok(())
}
