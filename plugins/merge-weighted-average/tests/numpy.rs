//! Weighted averaging against NumPy, and its laws.
#![allow(clippy::unwrap_used)]

use blocklora_sdk::manifest::Law;
use blocklora_sdk::testing::{MergeGolden, Problem, check_laws, check_merge, merge};
use merge_weighted_average::WeightedAverage;

fn golden() -> MergeGolden {
    MergeGolden::of_the_repository().unwrap()
}

#[test]
fn equals_numpy() {
    check_merge(&golden(), "weighted-average", &WeightedAverage {}).unwrap();
    assert!(check_merge(&golden(), "orthogonal", &WeightedAverage {}).is_err());
}

/// Those that the manifest declares, and no other.
#[test]
fn keeps_its_laws() {
    check_laws(&[Law::Identity, Law::Order], &WeightedAverage {}).unwrap();
}

#[test]
fn one_adapter_is_itself_whatever_its_weight() {
    let mut problem = Problem::random(1, 1, false);
    for weight in [1.0, 0.25, -3.0] {
        problem.set_weights(&[weight]);
        let merged = merge(&WeightedAverage {}, &problem, 8).unwrap();
        for (index, layer) in problem.layers.iter().enumerate() {
            assert_eq!(merged[index], problem.adapters()[0].factors(index).unwrap().delta(0..layer.rows));
        }
    }
}

#[test]
fn equal_adapters_average_to_themselves() {
    let mut problem = Problem::new(Problem::random(2, 0, false).layers);
    let factors = |m: usize, n: usize| Some((vec![0.5; n], vec![0.25; m], (0..m as u32).collect(), 1));
    let all: Vec<_> = problem.layers.iter().map(|layer| factors(layer.rows, layer.columns)).collect();
    for digest in ["a", "b", "c", "d"] {
        problem.add(digest, digest, 2.0, 1.0, all.clone());
    }
    assert!(merge(&WeightedAverage {}, &problem, 8).unwrap().iter().flatten().all(|&x| x == 0.125));
}

#[test]
fn weights_that_cancel_are_refused() {
    let mut problem = Problem::random(3, 2, false);
    problem.set_weights(&[1.0, -1.0]);
    let error = merge(&WeightedAverage {}, &problem, 8).unwrap_err().message;
    assert!(error.contains("the weights add up to 0"), "{error}");
    // In f32 these leave 6e-8.
    let mut problem = Problem::random(3, 4, false);
    problem.set_weights(&[0.1, 0.2, 0.6, -0.9]);
    let error = merge(&WeightedAverage {}, &problem, 8).unwrap_err().message;
    assert!(error.contains("choose weights with another sum"), "{error}");
}

#[test]
fn a_layer_that_no_adapter_changes_stays_pristine() {
    let golden = golden();
    let merged = merge(&WeightedAverage {}, &golden.problem, 8).unwrap();
    assert!(merged.last().unwrap().iter().all(|&x| x == 0.0));
}
