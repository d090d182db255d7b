//! Orthogonal Adaptation's merge against NumPy, and its laws.
#![allow(clippy::unwrap_used)]

use blocklora_sdk::manifest::Law;
use blocklora_sdk::merge::{Adapter, Factors, MergeStrategy};
use blocklora_sdk::testing::{MergeGolden, Problem, TestJob, check_laws, check_merge, merge};
use blocklora_sdk::{Value, resolve, schema};
use merge_orthogonal::Orthogonal;

#[test]
fn equals_numpy() {
    let golden = MergeGolden::of_the_repository().unwrap();
    check_merge(&golden, "orthogonal", &Orthogonal::default()).unwrap();
    assert!(check_merge(&golden, "orthogonal", &Orthogonal { lambda: 0.599 }).is_err());
}

/// Those that the manifest declares, and no other.
#[test]
fn keeps_its_laws() {
    check_laws(&[Law::Order, Law::Scale], &Orthogonal::default()).unwrap();
}

#[test]
fn the_change_is_linear_in_the_weights_and_in_lambda() {
    let mut problem = Problem::random(1, 3, false);
    let once = merge(&Orthogonal::default(), &problem, 8).unwrap();
    problem.set_weights(&[2.0; 3]);
    let twice = merge(&Orthogonal::default(), &problem, 8).unwrap();
    let lambda = merge(&Orthogonal { lambda: 2.0 * 0.6 }, &Problem::random(1, 3, false), 8).unwrap();
    for ((once, twice), lambda) in once.iter().flatten().zip(twice.iter().flatten()).zip(lambda.iter().flatten()) {
        assert_eq!(2.0 * once, *twice);
        assert_eq!(2.0 * once, *lambda);
    }
}

#[test]
fn lambda_1_adds_an_adapter_as_trained_and_takes_it_away_again() {
    let mut problem = Problem::random(2, 1, true);
    let merged = merge(&Orthogonal { lambda: 1.0 }, &problem, 8).unwrap();
    problem.set_weights(&[-1.0]);
    let negated = merge(&Orthogonal { lambda: 1.0 }, &problem, 8).unwrap();
    for (index, layer) in problem.layers.iter().enumerate() {
        assert_eq!(merged[index], problem.adapters()[0].factors(index).unwrap().delta(0..layer.rows));
        assert!(merged[index].iter().zip(&negated[index]).all(|(x, y)| x + y == 0.0));
    }
}

/// As two concepts that were trained in one slot of a basis have it.
#[test]
fn two_adapters_with_the_same_a_are_refused() {
    let problem = Problem::random(3, 3, true);
    let mut adapters = problem.adapters();
    let plan =
        |adapters: &[_]| MergeStrategy::plan(&Orthogonal::default(), &TestJob::default(), &problem.layers, adapters);
    plan(&adapters).unwrap();
    let (layer, owner) = (0..problem.layers.len())
        .find_map(|layer| Some((layer, adapters[0].factors(layer).filter(|_| adapters[2].factors(layer).is_some())?)))
        .unwrap();
    let other = adapters[2].factors(layer).unwrap();
    assert_eq!(other.a.len(), owner.a.len());
    let mut factors: Vec<_> = adapters[2].factors_by_layer().collect();
    factors[layer] = Some(Factors { a: owner.a, ..other });
    adapters[2] = Adapter::new(adapters[2].name, adapters[2].digest, adapters[2].weight, factors);
    let error = plan(&adapters).unwrap_err().message;
    for part in [
        adapters[0].name,
        adapters[2].name,
        &problem.layers[layer].name,
        "\"allocated\" in another slot = N",
        "\"random\" its name chooses",
    ] {
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn settings_name_their_keys() {
    assert_eq!(resolve::<Orthogonal>(&Value::Null).unwrap().lambda, 0.6);
    assert!(resolve::<Orthogonal>(&r#"{"lamda": 1}"#.parse().unwrap()).unwrap_err().message.contains("lamda"));
    let lambda = &schema::<Orthogonal>().unwrap()["properties"]["lambda"];
    assert_eq!((&lambda["default"], &lambda["minimum"]), (&Value::from(0.6), &Value::from(0.0)));
}
