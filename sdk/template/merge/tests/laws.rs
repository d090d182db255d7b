//! The strategy keeps the laws that its manifest declares.

use blocklora_sdk::testing::{Problem, merge};
use merge_my_method::MyMethod;

#[test]
fn half_the_strength_is_half_the_change() {
    let problem = Problem::random(1, 3, false);
    let whole = merge(&MyMethod::default(), &problem, 8).expect("it merges");
    let half = merge(&MyMethod { strength: 0.5 }, &problem, 8).expect("it merges");
    for (whole, half) in whole.iter().flatten().zip(half.iter().flatten()) {
        assert!((whole / 2.0 - half).abs() < 1e-5);
    }
}
