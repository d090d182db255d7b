//! Equals diffusers' LCMScheduler after every step (tests/parity/make_sampler_golden.py), and lands on the data.
#![allow(clippy::unwrap_used)]

use std::path::Path;

use blocklora_sdk::sample::Sampler;
use blocklora_sdk::testing::{Gaussian, SamplerGolden, check_sampler, check_sampler_contract};
use sample_lcm::Lcm;

#[test]
fn equals_diffusers() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/samplers.json");
    let golden = SamplerGolden::open(Path::new(path)).unwrap();
    check_sampler(&golden, "lcm", &Lcm::default(), |_| ()).unwrap();
    check_sampler(&golden, "lcm 4 steps", &Lcm::default(), |_| ()).unwrap();
    check_sampler(&golden, "lcm 20 of 30", &Lcm { original_steps: 30 }, |_| ()).unwrap();
}

#[test]
fn keeps_the_samplers_contract() {
    check_sampler_contract(&Lcm::default()).unwrap();
}

#[test]
fn lands_on_certain_data_in_one_step_and_in_eight() {
    let mean: Vec<f64> = (0..8).map(|i| i as f64 * 0.25 - 1.0).collect();
    for steps in [1, 8] {
        let mut denoiser = Gaussian::new(mean.clone(), vec![1e-4; 8]).unwrap();
        let mut z: Vec<f32> = (0..8).map(|i| 0.7 - i as f32 * 0.3).collect();
        Lcm::default().sample(&mut denoiser, &mut z, steps).unwrap();
        for (z, mean) in z.iter().zip(&mean) {
            assert!((*z as f64 - mean).abs() < 1e-2, "{steps} steps: {z}, but the data are {mean}");
        }
    }
}

#[test]
fn step_counts_beyond_the_distilled_ones_are_named() {
    let run = |original_steps, steps| {
        let mut denoiser = Gaussian::new(vec![0.0; 2], vec![1.0; 2]).unwrap();
        Lcm { original_steps }.sample(&mut denoiser, &mut [0.1, 0.2], steps).unwrap_err().message
    };
    assert_eq!(run(50, 51), "steps = 51: must be 1 to 50, the setting original_steps");
    assert!(run(1001, 4).starts_with("original_steps = 1001: must be 1 to 1000"), "{}", run(1001, 4));
}
