//! TIES-Merging against NumPy, its laws and its corner cases.
#![allow(clippy::unwrap_used)]

use blocklora_sdk::manifest::Law;
use blocklora_sdk::merge::{LayerPlan, MergeStrategy};
use blocklora_sdk::testing::{MergeGolden, Problem, TestJob, check_laws, check_merge, merge};
use blocklora_sdk::{Value, resolve, schema};
use merge_ties::{Scope, Ties};

const KEEP_ALL: Ties = Ties { top_k_percent: 100.0, lambda: 1.0, trim: Scope::Layer };

fn golden() -> MergeGolden {
    MergeGolden::of_the_repository().unwrap()
}

/// A 2 x 2 layer, and rank 2 adapters whose deltas are these.
fn of_deltas(deltas: &[[f32; 4]]) -> Problem {
    let mut problem = Problem::new(vec![Problem::random(0, 0, false).layers[0].clone()]);
    problem.layers[0].rows = 2;
    problem.layers[0].columns = 2;
    for (i, delta) in deltas.iter().enumerate() {
        let factors = (vec![1.0, 0.0, 0.0, 1.0], delta.to_vec(), vec![0, 1], 2);
        problem.add(&format!("concept{i}"), &format!("{i:064x}"), 1.0, 1.0, vec![Some(factors)]);
    }
    problem
}

#[test]
fn equals_numpy() {
    let golden = golden();
    check_merge(&golden, "ties", &Ties::default()).unwrap();
    let k60 = Ties { top_k_percent: 60.0, lambda: 0.5, ..Ties::default() };
    check_merge(&golden, "ties k=60 lambda=0.5", &k60).unwrap();
    check_merge(&golden, "ties model", &Ties { trim: Scope::Model, ..Ties::default() }).unwrap();
    // The comparison sees small changes.
    assert!(check_merge(&golden, "ties", &Ties { top_k_percent: 21.0, ..Ties::default() }).is_err());
}

/// Those that the manifest declares, and no other.
#[test]
fn keeps_its_laws() {
    check_laws(&[Law::Order, Law::Scale], &Ties::default()).unwrap();
}

#[test]
fn trims_elects_and_averages_what_agrees() {
    let problem = of_deltas(&[[4.0, 1.0, -3.0, 2.0], [-1.0, 3.0, -1.0, 5.0], [-2.0, 2.0, 4.0, -6.0]]);
    let merged = merge(&KEEP_ALL, &problem, 1).unwrap();
    assert_eq!(merged[0], [4.0, 2.0, 0.0, 3.5]);
    let half = Ties { top_k_percent: 50.0, ..KEEP_ALL };
    assert_eq!(merge(&half, &problem, 1).unwrap()[0], [4.0, 3.0, 4.0, -6.0]);
}

#[test]
fn one_adapter_keeps_exactly_its_largest_numbers() {
    let problem = Problem::random(1, 1, false);
    for k in [1.0f32, 10.0, 20.0, 37.5, 99.0] {
        let merged = merge(&Ties { top_k_percent: k, ..Ties::default() }, &problem, 8).unwrap();
        for (index, layer) in problem.layers.iter().enumerate() {
            let whole = problem.adapters()[0].factors(index).unwrap().delta(0..layer.rows);
            let kept = merged[index].iter().filter(|x| **x != 0.0).count();
            assert_eq!(kept, (whole.len() as f32 * k / 100.0) as usize);
            let least = merged[index].iter().filter(|x| **x != 0.0).map(|x| x.abs()).fold(f32::INFINITY, f32::min);
            for (merged, whole) in merged[index].iter().zip(&whole) {
                assert_eq!(*merged, if whole.abs() >= least { *whole } else { 0.0 });
            }
        }
    }
}

#[test]
fn everything_kept_of_one_adapter_is_its_delta() {
    let problem = Problem::random(1, 1, true);
    let merged = merge(&KEEP_ALL, &problem, 8).unwrap();
    for (index, layer) in problem.layers.iter().enumerate() {
        assert_eq!(merged[index], problem.adapters()[0].factors(index).unwrap().delta(0..layer.rows));
    }
}

#[test]
fn nothing_stays_where_k_is_too_small() {
    for top_k_percent in [0.0, 0.05] {
        for trim in [Scope::Layer, Scope::Model] {
            let merged = merge(&Ties { top_k_percent, trim, ..Ties::default() }, &Problem::random(1, 3, false), 8);
            assert!(merged.unwrap().iter().flatten().all(|&x| x == 0.0));
        }
    }
}

#[test]
fn opposite_changes_cancel_and_lose_nothing_else() {
    let problem = of_deltas(&[[1.0, -2.0, 3.0, 0.5], [-1.0, 2.0, -3.0, 0.25]]);
    assert_eq!(merge(&KEEP_ALL, &problem, 2).unwrap()[0], [0.0, 0.0, 0.0, 0.375]);
}

#[test]
fn an_adapter_of_zeros_counts_for_nothing() {
    let alone = merge(&KEEP_ALL, &of_deltas(&[[1.0, -2.0, 3.0, 0.5]]), 2).unwrap();
    let beside_zeros = merge(&KEEP_ALL, &of_deltas(&[[0.0; 4], [1.0, -2.0, 3.0, 0.5], [0.0; 4]]), 2).unwrap();
    assert_eq!(alone, beside_zeros);
    assert_eq!(merge(&Ties::default(), &of_deltas(&[[0.0; 4]]), 2).unwrap()[0], [0.0; 4]);
}

#[test]
fn the_change_grows_with_the_weights_in_either_direction() {
    let mut problem = golden().problem;
    let once = merge(&Ties::default(), &problem, 8).unwrap();
    for c in [2.0, -0.5] {
        problem.set_weights(&problem.adapters().iter().map(|a| c * a.weight).collect::<Vec<_>>());
        let scaled = merge(&Ties::default(), &problem, 8).unwrap();
        assert!(once.iter().flatten().zip(scaled.iter().flatten()).all(|(x, y)| c * x == *y));
        problem = golden().problem;
    }
}

#[test]
fn the_order_of_the_adapters_makes_no_difference() {
    let deltas = [[4.0, 1.0, -3.0, 2.0], [-1.0, 3.1, -1.0, 5.0], [-2.0, 2.0, 4.1, -6.0]];
    let [x, y, z] = deltas;
    let merged = merge(&Ties::default(), &of_deltas(&deltas), 2).unwrap();
    for other in [[y, x, z], [z, y, x], [y, z, x]] {
        assert_eq!(merge(&Ties::default(), &of_deltas(&other), 2).unwrap(), merged);
    }
}

#[test]
fn a_layer_that_no_adapter_changes_is_not_even_filled() {
    let problem = golden().problem;
    let plan = Ties::default().plan(&TestJob::new(0), &problem.layers, &problem.adapters()).unwrap();
    assert_eq!(*plan.last().unwrap(), LayerPlan::Factored(Vec::new()));
}

#[test]
fn a_cancelled_job_ends() {
    let problem = golden().problem;
    let job = TestJob::new(0);
    job.cancelled.store(true, std::sync::atomic::Ordering::Relaxed);
    assert!(Ties::default().plan(&job, &problem.layers, &problem.adapters()).unwrap_err().is_cancelled());
}

#[test]
fn settings_have_ranges() {
    assert_eq!(resolve::<Ties>(&Value::Null).unwrap(), Ties::default());
    let model: Ties = resolve(&r#"{"trim": "model", "top_k_percent": 5}"#.parse().unwrap()).unwrap();
    assert_eq!(model, Ties { top_k_percent: 5.0, trim: Scope::Model, ..Ties::default() });
    let schema = schema::<Ties>().unwrap();
    assert_eq!(schema["properties"]["top_k_percent"]["maximum"], 100.0);
    assert!(resolve::<Ties>(&r#"{"top_k": 5}"#.parse().unwrap()).unwrap_err().message.contains("top_k"));
}
