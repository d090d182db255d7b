//! The laws of BlockLoRA's merge.
#![allow(clippy::unwrap_used)]

use blocklora_sdk::testing::{Problem, merge};
use merge_blocklora::{Blocklora, Clash, Normalise};

const MEAN: Blocklora = Blocklora { normalise: Normalise::Owners, clash: Clash::Mean };

#[test]
fn disjoint_adapters_add_up_undiluted() {
    let problem = Problem::random(1, 4, true);
    let merged = merge(&Blocklora::default(), &problem, 8).unwrap();
    for (index, layer) in problem.layers.iter().enumerate() {
        let mut sum = vec![0.0; layer.rows * layer.columns];
        for adapter in problem.adapters() {
            adapter.factors(index).unwrap().add_delta(1.0, 0..layer.rows, &mut sum);
        }
        assert_eq!(merged[index], sum);
    }
}

#[test]
fn sum1_divides_by_the_sum_of_the_weights() {
    let mut problem = Problem::random(2, 4, true);
    problem.set_weights(&[1.0, 2.0, 0.5, 0.5]);
    let whole = merge(&Blocklora::default(), &problem, 8).unwrap();
    let sum1 = merge(&Blocklora { normalise: Normalise::Sum1, ..Default::default() }, &problem, 8).unwrap();
    for (whole, sum1) in whole.iter().flatten().zip(sum1.iter().flatten()) {
        assert!((whole / 4.0 - sum1).abs() < 1e-6);
    }
}

#[test]
fn shared_rows_are_refused_or_averaged() {
    let problem = Problem::random(3, 2, false);
    let error = merge(&Blocklora::default(), &problem, 8).unwrap_err().message;
    assert!(["concept0", "concept1", "row 0", "clash"].iter().all(|word| error.contains(word)), "{error}");
    let merged = merge(&MEAN, &problem, 8).unwrap();
    for (index, layer) in problem.layers.iter().enumerate() {
        let deltas: Vec<Vec<f32>> =
            problem.adapters().iter().map(|a| a.factors(index).unwrap().delta(0..layer.rows)).collect();
        for (merged, (x, y)) in merged[index].iter().zip(deltas[0].iter().zip(&deltas[1])) {
            assert!((merged - (x + y) / 2.0).abs() < 1e-6);
        }
    }
}
