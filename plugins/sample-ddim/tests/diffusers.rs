//! DDIM equals diffusers' DDIMScheduler after every step (tests/parity/make_sampler_golden.py).
#![allow(clippy::unwrap_used)]

use std::path::Path;

use blocklora_sdk::sample::Sampler;
use blocklora_sdk::testing::{Gaussian, SamplerGolden, check_sampler};
use sample_ddim::Ddim;

fn golden() -> SamplerGolden {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/samplers.json");
    SamplerGolden::open(Path::new(path)).unwrap()
}

#[test]
fn equals_diffusers() {
    let golden = golden();
    check_sampler(&golden, "ddim", &Ddim::default(), |_| ()).unwrap();
    check_sampler(&golden, "ddim alpha-to-one", &Ddim::default(), |s| s.set_alpha_to_one = true).unwrap();
    check_sampler(&golden, "ddim eta", &Ddim { eta: 1.0 }, |_| ()).unwrap();
}

#[test]
fn a_cancelled_run_ends_within_the_step() {
    let golden = golden();
    let mut denoiser = Gaussian::new(golden.mean.clone(), golden.deviation.clone()).unwrap();
    denoiser.cancel_after = Some(3);
    let error = Ddim::default().sample(&mut denoiser, &mut golden.start.clone(), 20).unwrap_err();
    assert!(error.is_cancelled());
    assert_eq!((denoiser.latents.len(), denoiser.predictions), (4, 4));
}

#[test]
fn steps_that_the_schedule_lacks_are_named() {
    let golden = golden();
    let mut denoiser = Gaussian::new(golden.mean.clone(), golden.deviation.clone()).unwrap();
    let error = Ddim::default().sample(&mut denoiser, &mut golden.start.clone(), 1001).unwrap_err();
    assert!(error.message.starts_with("steps = 1001: must be 1 to 1000"), "{error}");
}
