//! Equals diffusers' EulerDiscreteScheduler after every step (tests/parity/make_sampler_golden.py), and converges as it should.
#![allow(clippy::unwrap_used)]

use std::path::Path;

use blocklora_sdk::sample::TimestepSpacing;
use blocklora_sdk::testing::{SamplerGolden, check_sampler, check_sampler_contract, order_of_convergence};
use sample_euler::Euler;

#[test]
fn equals_diffusers() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/samplers.json");
    let golden = SamplerGolden::open(Path::new(path)).unwrap();
    check_sampler(&golden, "euler", &Euler::default(), |_| ()).unwrap();
    check_sampler(&golden, "euler linspace", &Euler::default(), |s| s.spacing = TimestepSpacing::Linspace).unwrap();
    check_sampler(&golden, "euler trailing", &Euler::default(), |s| s.spacing = TimestepSpacing::Trailing).unwrap();
    check_sampler(&golden, "euler-karras", &Euler { karras: true }, |_| ()).unwrap();
}

#[test]
fn keeps_the_samplers_contract() {
    check_sampler_contract(&Euler::default()).unwrap();
    check_sampler_contract(&Euler { karras: true }).unwrap();
}

#[test]
fn converges_at_first_order() {
    let order = order_of_convergence(&Euler::default(), [33, 65]).unwrap();
    assert!((0.8..1.3).contains(&order), "{order}");
}
