//! DARE against NumPy, its laws and its statistics.
#![allow(clippy::unwrap_used)]

use blocklora_sdk::manifest::Law;
use blocklora_sdk::merge::{LayerPlan, MergeStrategy};
use blocklora_sdk::testing::{MergeGolden, Problem, TestJob, check_laws, check_merge, merge};
use blocklora_sdk::{Value, resolve, schema};
use merge_dare::Dare;

fn golden() -> MergeGolden {
    MergeGolden::of_the_repository().unwrap()
}

#[test]
fn equals_numpy() {
    let golden = golden();
    check_merge(&golden, "dare", &Dare::default()).unwrap();
    let other = Dare { drop_rate: 0.5, lambda: 0.3, seed: (1 << 40) + 7 };
    check_merge(&golden, "dare p=0.5 lambda=0.3 seed=2^40+7", &other).unwrap();
    assert!(check_merge(&golden, "dare", &Dare { seed: 1, ..Dare::default() }).is_err());
}

/// Those that the manifest declares, and no other.
#[test]
fn keeps_its_laws() {
    check_laws(&[Law::Order, Law::Scale], &Dare::default()).unwrap();
}

#[test]
fn nothing_dropped_is_a_sum() {
    let problem = Problem::random(1, 3, false);
    let merged = merge(&Dare { drop_rate: 0.0, ..Dare::default() }, &problem, 5).unwrap();
    for (index, layer) in problem.layers.iter().enumerate() {
        let mut sum = vec![0.0; layer.rows * layer.columns];
        for adapter in problem.adapters() {
            adapter.factors(index).unwrap().add_delta(1.0, 0..layer.rows, &mut sum);
        }
        assert!(merged[index].iter().zip(&sum).all(|(x, y)| (x - y).abs() < 1e-5));
    }
}

/// A 200 x 100 layer of one adapter whose delta is 1 everywhere, and its name and digest.
fn ones(digest: &str, layer: &str) -> Problem {
    let mut problem = Problem::new(vec![Problem::random(0, 0, false).layers[0].clone()]);
    problem.layers[0].name = layer.into();
    (problem.layers[0].rows, problem.layers[0].columns) = (200, 100);
    problem.add("concept", digest, 1.0, 1.0, vec![Some((vec![1.0; 100], vec![1.0; 200], (0..200).collect(), 1))]);
    problem
}

#[test]
fn a_tenth_stays_ten_times_as_large() {
    let merged = merge(&Dare::default(), &ones("d", "unet.x"), 7).unwrap();
    assert!(merged[0].iter().all(|&x| x == 0.0 || (x - 10.0).abs() < 1e-4));
    // 20,000 throws: the standard deviation of the share is 0.0021.
    let kept = merged[0].iter().filter(|x| **x != 0.0).count() as f64 / 20_000.0;
    assert!((kept - 0.1).abs() < 0.01, "{kept}");
}

#[test]
fn masks_depend_on_seed_adapter_layer_and_row_and_on_nothing_else() {
    let mask = |seed, digest, layer| merge(&Dare { seed, ..Dare::default() }, &ones(digest, layer), 50).unwrap();
    let first = mask(1, "d", "unet.x");
    for other in [mask(2, "d", "unet.x"), mask(1, "e", "unet.x"), mask(1, "d", "unet.y")] {
        assert_ne!(first, other);
    }
    let rows: Vec<&[f32]> = first[0].chunks(100).collect();
    assert!(rows.windows(2).all(|pair| pair[0] != pair[1]));
    // Two adapters that both leave something of a weight alone: a third beside them changes nothing of theirs.
    let three = golden().problem;
    let merged = merge(&Dare::default(), &three, 3).unwrap();
    let mut alone_sum: Vec<Vec<f32>> = merged.iter().map(|layer| vec![0.0; layer.len()]).collect();
    for chosen in 0..three.adapters().len() {
        let mut alone = Problem::new(three.layers.clone());
        let adapter = &three.adapters()[chosen];
        let own = |f: blocklora_sdk::merge::Factors<'_>| (f.a.to_vec(), f.b.to_vec(), f.rows.to_vec(), f.rank);
        let scale = adapter.factors_by_layer().flatten().next().unwrap().scale;
        let factors = adapter.factors_by_layer().map(|f| f.map(own)).collect();
        alone.add(adapter.name, adapter.digest, adapter.weight, scale, factors);
        for (sum, alone) in alone_sum.iter_mut().flatten().zip(merge(&Dare::default(), &alone, 4).unwrap().concat()) {
            *sum += alone;
        }
    }
    assert!(merged.iter().flatten().zip(alone_sum.iter().flatten()).all(|(x, y)| (x - y).abs() < 1e-5));
}

#[test]
fn the_change_is_linear_in_the_weights() {
    let mut problem = golden().problem;
    let once = merge(&Dare::default(), &problem, 8).unwrap();
    problem.set_weights(&problem.adapters().iter().map(|a| 2.0 * a.weight).collect::<Vec<_>>());
    let twice = merge(&Dare::default(), &problem, 8).unwrap();
    assert!(once.iter().flatten().zip(twice.iter().flatten()).all(|(x, y)| 2.0 * x == *y));
}

#[test]
fn a_layer_that_no_adapter_changes_is_not_even_filled() {
    let problem = golden().problem;
    let plan = Dare::default().plan(&TestJob::new(0), &problem.layers, &problem.adapters()).unwrap();
    assert_eq!(*plan.last().unwrap(), LayerPlan::Factored(Vec::new()));
}

#[test]
fn settings_have_ranges() {
    assert_eq!(resolve::<Dare>(&Value::Null).unwrap(), Dare::default());
    assert_eq!(schema::<Dare>().unwrap()["properties"]["drop_rate"]["maximum"].as_f64().unwrap() as f32, 0.99);
    assert!(resolve::<Dare>(&r#"{"p": 0.5}"#.parse().unwrap()).unwrap_err().message.contains("p"));
}
