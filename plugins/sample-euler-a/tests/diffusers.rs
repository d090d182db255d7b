//! Equals diffusers' EulerAncestralDiscreteScheduler after every step (tests/parity/make_sampler_golden.py), and converges as it should.
#![allow(clippy::unwrap_used)]

use std::path::Path;

use blocklora_sdk::sample::TimestepSpacing;
use blocklora_sdk::testing::{SamplerGolden, check_sampler, check_sampler_contract, order_of_convergence};
use sample_euler_a::EulerAncestral;

#[test]
fn equals_diffusers() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/samplers.json");
    let golden = SamplerGolden::open(Path::new(path)).unwrap();
    check_sampler(&golden, "euler-a", &EulerAncestral {}, |_| ()).unwrap();
    check_sampler(&golden, "euler-a linspace", &EulerAncestral {}, |s| s.spacing = TimestepSpacing::Linspace).unwrap();
    check_sampler(&golden, "euler-a trailing", &EulerAncestral {}, |s| s.spacing = TimestepSpacing::Trailing).unwrap();
}

#[test]
fn keeps_the_samplers_contract() {
    check_sampler_contract(&EulerAncestral {}).unwrap();
}

#[test]
fn converges_in_distribution_at_first_order() {
    let order = order_of_convergence(&EulerAncestral {}, [33, 65]).unwrap();
    assert!((0.7..1.4).contains(&order), "{order}");
}
