//! Equals diffusers' DPMSolverMultistepScheduler after every step (tests/parity/make_sampler_golden.py), and converges as it should.
#![allow(clippy::unwrap_used)]

use std::path::Path;

use blocklora_sdk::sample::TimestepSpacing;
use blocklora_sdk::testing::{SamplerGolden, check_sampler, check_sampler_contract, order_of_convergence};
use sample_dpmpp_2m::DpmSolverPlusPlus2M;

#[test]
fn equals_diffusers() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/samplers.json");
    let golden = SamplerGolden::open(Path::new(path)).unwrap();
    check_sampler(&golden, "dpmpp-2m", &DpmSolverPlusPlus2M::default(), |_| ()).unwrap();
    check_sampler(&golden, "dpmpp-2m 9 steps", &DpmSolverPlusPlus2M::default(), |_| ()).unwrap();
    let spaced = |name: &str, spacing| {
        check_sampler(&golden, name, &DpmSolverPlusPlus2M::default(), |s| s.spacing = spacing).unwrap();
    };
    spaced("dpmpp-2m linspace", TimestepSpacing::Linspace);
    spaced("dpmpp-2m linspace 30 steps", TimestepSpacing::Linspace);
    spaced("dpmpp-2m trailing", TimestepSpacing::Trailing);
    spaced("dpmpp-2m trailing 48 steps", TimestepSpacing::Trailing);
    check_sampler(&golden, "dpmpp-2m-karras", &DpmSolverPlusPlus2M { karras: true }, |_| ()).unwrap();
}

#[test]
fn keeps_the_samplers_contract() {
    check_sampler_contract(&DpmSolverPlusPlus2M::default()).unwrap();
    check_sampler_contract(&DpmSolverPlusPlus2M { karras: true }).unwrap();
}

#[test]
fn converges_at_second_order() {
    let order = order_of_convergence(&DpmSolverPlusPlus2M { karras: true }, [33, 65]).unwrap();
    assert!((1.6..2.5).contains(&order), "{order}");
}
