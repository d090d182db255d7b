//! Task arithmetic against NumPy, and its laws.
#![allow(clippy::unwrap_used)]

use blocklora_sdk::manifest::Law;
use blocklora_sdk::testing::{MergeGolden, Problem, check_laws, check_merge, merge};
use blocklora_sdk::{Value, resolve, schema};
use merge_task_arithmetic::TaskArithmetic;

#[test]
fn equals_numpy() {
    let golden = MergeGolden::of_the_repository().unwrap();
    check_merge(&golden, "task-arithmetic", &TaskArithmetic::default()).unwrap();
    assert!(check_merge(&golden, "task-arithmetic", &TaskArithmetic { lambda: 0.399 }).is_err());
}

/// Those that the manifest declares, and no other.
#[test]
fn keeps_its_laws() {
    check_laws(&[Law::Order, Law::Scale], &TaskArithmetic::default()).unwrap();
}

#[test]
fn the_change_is_linear_in_the_weights_and_in_lambda() {
    let mut problem = Problem::random(1, 3, false);
    let once = merge(&TaskArithmetic::default(), &problem, 8).unwrap();
    problem.set_weights(&[2.0; 3]);
    let twice = merge(&TaskArithmetic::default(), &problem, 8).unwrap();
    let lambda = merge(&TaskArithmetic { lambda: 2.0 * 0.4 }, &Problem::random(1, 3, false), 8).unwrap();
    for ((once, twice), lambda) in once.iter().flatten().zip(twice.iter().flatten()).zip(lambda.iter().flatten()) {
        assert_eq!(2.0 * once, *twice);
        assert_eq!(2.0 * once, *lambda);
    }
}

#[test]
fn lambda_1_adds_an_adapter_as_trained_and_takes_it_away_again() {
    let mut problem = Problem::random(2, 1, true);
    let merged = merge(&TaskArithmetic { lambda: 1.0 }, &problem, 8).unwrap();
    problem.set_weights(&[-1.0]);
    let negated = merge(&TaskArithmetic { lambda: 1.0 }, &problem, 8).unwrap();
    for (index, layer) in problem.layers.iter().enumerate() {
        assert_eq!(merged[index], problem.adapters()[0].factors(index).unwrap().delta(0..layer.rows));
        assert!(merged[index].iter().zip(&negated[index]).all(|(x, y)| x + y == 0.0));
    }
}

#[test]
fn settings_name_their_keys() {
    assert_eq!(resolve::<TaskArithmetic>(&Value::Null).unwrap().lambda, 0.4);
    assert!(resolve::<TaskArithmetic>(&r#"{"lamda": 1}"#.parse().unwrap()).unwrap_err().message.contains("lamda"));
    let lambda = &schema::<TaskArithmetic>().unwrap()["properties"]["lambda"];
    assert_eq!((&lambda["default"], &lambda["minimum"]), (&Value::from(0.4), &Value::from(0.0)));
}
