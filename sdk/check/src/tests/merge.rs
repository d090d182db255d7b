//! Merge strategies: what the engine accepts, and the laws that they declare.

use blocklora_sdk::manifest::Law;
use blocklora_sdk::merge::AnyMergeStrategy;
use blocklora_sdk::testing::{Problem, TestJob, merge};
use blocklora_sdk::{Code, Result};

use super::skip;
use crate::subject::{Subject, Verdict, wrong};

type Deltas = Vec<Vec<f32>>;

/// A tile height that the problems' layers are no multiple of.
const TILE: usize = 7;

/// The merge, or `None` where the strategy refuses adapters that do not go together.
fn merged(strategy: &dyn AnyMergeStrategy, problem: &Problem, what: &str) -> Result<Option<Deltas>, String> {
    match merge(strategy, problem, TILE) {
        Ok(deltas) => Ok(Some(deltas)),
        Err(e) if e.code == Code::Incompatible => Ok(None),
        Err(e) => wrong(format!("{what}: {e}")),
    }
}

/// The merge of adapters that own rows of their own, which no strategy may refuse.
fn disjoint(strategy: &dyn AnyMergeStrategy, problem: &Problem, what: &str) -> Result<Deltas, String> {
    merge(strategy, problem, TILE).map_err(|e| format!("{what}: {e}"))
}

/// The first difference above `tolerance`, relative to the largest number.
fn difference(ours: &Deltas, expected: &Deltas, tolerance: f32) -> Option<String> {
    let largest = expected.iter().flatten().fold(1e-6_f32, |max, x| max.max(x.abs()));
    for (layer, (ours, expected)) in ours.iter().zip(expected).enumerate() {
        for (i, (a, b)) in ours.iter().zip(expected).enumerate() {
            if (a - b).abs() > tolerance * largest || a.is_nan() {
                return Some(format!("number {i} of layer {layer} is {a}, and should be {b}"));
            }
        }
    }
    None
}

fn same_bits(a: &Deltas, b: &Deltas) -> bool {
    let bits = |d: &Deltas| d.iter().flatten().map(|x| x.to_bits()).collect::<Vec<_>>();
    bits(a) == bits(b)
}

fn declares(subject: &Subject, law: Law) -> bool {
    subject.manifest.laws.contains(&law)
}

pub fn plan(subject: &Subject) -> Verdict {
    let strategy = subject.strategy()?;
    for adapters in [1, 2, 3, 15] {
        disjoint(&*strategy, &Problem::random(subject.seed, adapters, true), &format!("{adapters} adapters"))?;
        merged(&*strategy, &Problem::random(subject.seed, adapters, false), &format!("{adapters} on the same rows"))?;
    }
    // An adapter that leaves a layer alone.
    let mut partly = Problem::random(subject.seed, 2, true);
    let (a, b) = (vec![0.5; 8], vec![1.0]);
    partly.add("partly", &"f".repeat(64), 0.5, 1.0, vec![None, Some((a, b, vec![31], 1)), None]);
    merged(&*strategy, &partly, "an adapter that changes one layer only").map(drop)
}

pub fn tiles(subject: &Subject) -> Verdict {
    let strategy = subject.strategy()?;
    for is_disjoint in [true, false] {
        let problem = Problem::random(subject.seed, 3, is_disjoint);
        let Some(whole) = merged(&*strategy, &problem, "3 adapters")? else { continue };
        for rows in [1, 5, 1000] {
            let tiled = merge(&*strategy, &problem, rows).map_err(|e| format!("tiles of {rows} rows: {e}"))?;
            if !same_bits(&tiled, &whole) {
                return wrong(format!(
                    "tiles of {rows} rows give other bits than tiles of {TILE}: compute each row alone"
                ));
            }
        }
    }
    Ok(())
}

/// The deltas of one adapter, computed in f64, by the definition: scale * scatter(B, rows) A.
fn delta_of(problem: &Problem, adapter: usize) -> Deltas {
    let adapters = problem.adapters();
    let layers = problem.layers.iter().enumerate().map(|(index, layer)| {
        let mut delta = vec![0.0; layer.rows * layer.columns];
        if let Some(f) = adapters[adapter].factors(index) {
            for (local, &row) in f.rows.iter().enumerate() {
                for column in 0..layer.columns {
                    let term = |k: usize| f.b[local * f.rank + k] as f64 * f.a[k * layer.columns + column] as f64;
                    let sum: f64 = (0..f.rank).map(term).sum();
                    delta[row as usize * layer.columns + column] = (f.scale as f64 * sum) as f32;
                }
            }
        }
        delta
    });
    layers.collect()
}

pub fn identity(subject: &Subject) -> Verdict {
    if !declares(subject, Law::Identity) {
        return skip("the manifest does not declare the law \"identity\"");
    }
    let strategy = subject.strategy()?;
    for is_disjoint in [true, false] {
        let problem = Problem::random(subject.seed, 1, is_disjoint);
        let ours = disjoint(&*strategy, &problem, "one adapter")?;
        if let Some(where_) = difference(&ours, &delta_of(&problem, 0), 1e-5) {
            return wrong(format!("one adapter at weight 1: {where_}, as in the adapter's own delta"));
        }
    }
    Ok(())
}

/// The same adapters in another order.
fn reordered(problem: &Problem, order: &[usize]) -> Problem {
    let (adapters, mut other) = (problem.adapters(), Problem::new(problem.layers.clone()));
    for &i in order {
        let a = &adapters[i];
        let scale = a.factors_by_layer().flatten().next().map_or(1.0, |f| f.scale);
        let own = |f: blocklora_sdk::merge::Factors<'_>| (f.a.to_vec(), f.b.to_vec(), f.rows.to_vec(), f.rank);
        other.add(a.name, a.digest, a.weight, scale, a.factors_by_layer().map(|f| f.map(own)).collect());
    }
    other
}

pub fn order(subject: &Subject) -> Verdict {
    if !declares(subject, Law::Order) {
        return skip("the manifest does not declare the law \"order\"");
    }
    let strategy = subject.strategy()?;
    for is_disjoint in [true, false] {
        let problem = Problem::random(subject.seed, 5, is_disjoint);
        let Some(expected) = merged(&*strategy, &problem, "5 adapters")? else { continue };
        for order in [[4, 3, 2, 1, 0], [2, 0, 4, 1, 3]] {
            let other = disjoint(&*strategy, &reordered(&problem, &order), "5 adapters in another order")?;
            if let Some(where_) = difference(&other, &expected, 1e-5) {
                return wrong(format!("in the order {order:?} {where_}, as in the order they came in first"));
            }
        }
    }
    Ok(())
}

pub fn scale(subject: &Subject) -> Verdict {
    if !declares(subject, Law::Scale) {
        return skip("the manifest does not declare the law \"scale\"");
    }
    let strategy = subject.strategy()?;
    for is_disjoint in [true, false] {
        let mut problem = Problem::random(subject.seed, 3, is_disjoint);
        problem.set_weights(&[1.0, 0.5, 2.0]);
        let Some(expected) = merged(&*strategy, &problem, "3 adapters")? else { continue };
        for factor in [0.25_f32, -1.0, 3.0] {
            problem.set_weights(&[factor, 0.5 * factor, 2.0 * factor]);
            let scaled = disjoint(&*strategy, &problem, &format!("all weights times {factor}"))?;
            let times = expected.iter().map(|d| d.iter().map(|x| x * factor).collect()).collect();
            if let Some(where_) = difference(&scaled, &times, 1e-5) {
                return wrong(format!("with all weights times {factor} {where_}, {factor} times the change"));
            }
        }
    }
    Ok(())
}

pub fn deterministic(subject: &Subject) -> Verdict {
    if !subject.manifest.deterministic {
        return skip("the manifest does not declare deterministic = true");
    }
    for is_disjoint in [true, false] {
        let problem = Problem::random(subject.seed, 4, is_disjoint);
        let first = merged(&*subject.strategy()?, &problem, "4 adapters")?;
        for _ in 0..3 {
            match (&first, merged(&*subject.strategy()?, &problem, "4 adapters")?) {
                (None, None) => {}
                (Some(a), Some(b)) if same_bits(a, &b) => {}
                _ => return wrong("the same merge again gives other bits"),
            }
        }
    }
    Ok(())
}

pub fn cancel(subject: &Subject) -> Verdict {
    let problem = Problem::random(subject.seed, 4, true);
    let job = TestJob::new(subject.seed);
    job.cancelled.store(true, std::sync::atomic::Ordering::Relaxed);
    match subject.strategy()?.plan(&job, &problem.layers, &problem.adapters()) {
        Ok(_) => Ok(()),
        Err(e) if e.is_cancelled() => Ok(()),
        Err(e) => wrong(format!("a cancelled merge must end as it is or with the error Cancelled, not: {e}")),
    }
}

pub fn random(subject: &Subject) -> Verdict {
    for round in 1..=20 {
        let subject = Subject {
            seed: subject.seed.wrapping_add(round),
            file: subject.file.clone(),
            manifest: subject.manifest.clone(),
            library: subject.library,
        };
        for test in [plan, tiles, identity, order, scale, deterministic] {
            match test(&subject) {
                Err(message) if !message.starts_with(super::SKIP) => {
                    return wrong(format!("at the seed {}: {message}", subject.seed));
                }
                _ => {}
            }
        }
    }
    Ok(())
}
