//! Equals diffusers' HeunDiscreteScheduler after every step (tests/parity/make_sampler_golden.py), and converges as it should.
#![allow(clippy::unwrap_used)]

use std::path::Path;

use blocklora_sdk::sample::TimestepSpacing;
use blocklora_sdk::testing::{SamplerGolden, check_sampler, check_sampler_contract, order_of_convergence};
use sample_heun::Heun;

#[test]
fn equals_diffusers() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/samplers.json");
    let golden = SamplerGolden::open(Path::new(path)).unwrap();
    check_sampler(&golden, "heun", &Heun::default(), |_| ()).unwrap();
    check_sampler(&golden, "heun 9 steps", &Heun::default(), |_| ()).unwrap();
    check_sampler(&golden, "heun linspace", &Heun::default(), |s| s.spacing = TimestepSpacing::Linspace).unwrap();
    check_sampler(&golden, "heun-karras", &Heun { karras: true }, |_| ()).unwrap();
}

#[test]
fn keeps_the_samplers_contract() {
    check_sampler_contract(&Heun::default()).unwrap();
    check_sampler_contract(&Heun { karras: true }).unwrap();
}

#[test]
fn converges_at_second_order() {
    let order = order_of_convergence(&Heun { karras: true }, [33, 65]).unwrap();
    assert!((1.7..2.4).contains(&order), "{order}");
}
