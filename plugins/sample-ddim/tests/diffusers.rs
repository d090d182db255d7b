//! Equals diffusers' DDIMScheduler after every step (tests/parity/make_sampler_golden.py), and converges as it should.
#![allow(clippy::unwrap_used)]

use std::path::Path;

use blocklora_sdk::sample::NoiseSchedule;
use blocklora_sdk::testing::{SamplerGolden, check_sampler, check_sampler_contract, moment_error};
use sample_ddim::Ddim;

#[test]
fn equals_diffusers() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/samplers.json");
    let golden = SamplerGolden::open(Path::new(path)).unwrap();
    check_sampler(&golden, "ddim", &Ddim::default(), |_| ()).unwrap();
    check_sampler(&golden, "ddim alpha-to-one", &Ddim::default(), |s| s.set_alpha_to_one = true).unwrap();
    check_sampler(&golden, "ddim eta", &Ddim { eta: 1.0 }, |_| ()).unwrap();
}

#[test]
fn keeps_the_samplers_contract() {
    check_sampler_contract(&Ddim::default()).unwrap();
    check_sampler_contract(&Ddim { eta: 1.0 }).unwrap();
}

#[test]
fn converges_at_first_order() {
    let schedule = NoiseSchedule::scaled_linear(0.00085, 0.012, 1024).unwrap();
    let error = |steps| moment_error(&Ddim::default(), &schedule, steps).unwrap();
    let order = (error(32) / error(64)).log2();
    assert!((0.8..1.3).contains(&order), "{order}");
}
