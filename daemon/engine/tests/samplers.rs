//! Every sampler equals its diffusers counterpart after every step (tests/parity/make_sampler_golden.py).
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use blocklora_engine::sample::{
    Ddim, Denoiser, DpmSolverPlusPlus2M, EulerAncestral, NoiseSchedule, SAMPLERS, Sampler, TimestepSpacing, by_id,
};
use blocklora_engine::{Error, Result};

#[derive(serde::Deserialize)]
struct Golden {
    mean: Vec<f64>,
    deviation: Vec<f64>,
    start: Vec<f32>,
    noise: Vec<Vec<f32>>,
    runs: BTreeMap<String, Vec<Vec<f32>>>,
}

fn golden() -> Golden {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/samplers.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// The exact denoiser of Gaussian data.
struct Gaussian {
    schedule: NoiseSchedule,
    golden: Golden,
    latents: Vec<Vec<f32>>,
    cancel_after: usize,
}

impl Denoiser for Gaussian {
    fn schedule(&self) -> &NoiseSchedule {
        &self.schedule
    }
    fn predict(&mut self, latents: &[f32], timestep: f32, eps: &mut [f32]) -> Result<()> {
        let alpha_cumprod = self.schedule.alphas_cumprod[timestep as usize] as f64;
        let (alpha, sigma) = (alpha_cumprod.sqrt(), (1.0 - alpha_cumprod).sqrt());
        for (i, (z, eps)) in latents.iter().zip(eps).enumerate() {
            let (mean, deviation) = (self.golden.mean[i], self.golden.deviation[i]);
            *eps =
                (sigma * (*z as f64 - alpha * mean) / (alpha * alpha * deviation * deviation + sigma * sigma)) as f32;
        }
        Ok(())
    }
    fn noise(&mut self, step: usize, out: &mut [f32]) {
        out.copy_from_slice(&self.golden.noise[step]);
    }
    fn step_done(&mut self, step: usize, _steps: usize, latents: &[f32]) -> Result<()> {
        assert_eq!(step, self.latents.len());
        self.latents.push(latents.to_vec());
        if step == self.cancel_after { Err(Error::Cancelled) } else { Ok(()) }
    }
}

fn gaussian() -> Gaussian {
    let schedule = NoiseSchedule {
        steps_offset: 1,
        set_alpha_to_one: false,
        ..NoiseSchedule::scaled_linear(0.00085, 0.012, 1000).unwrap()
    };
    Gaussian { schedule, golden: golden(), latents: Vec::new(), cancel_after: usize::MAX }
}

fn check(name: &str, sampler: &dyn Sampler, change: impl Fn(&mut NoiseSchedule)) {
    let mut denoiser = gaussian();
    change(&mut denoiser.schedule);
    let expected = denoiser.golden.runs[name].clone();
    let mut z = denoiser.golden.start.clone();
    sampler.sample(&mut denoiser, &mut z, expected.len()).unwrap();
    assert_eq!(denoiser.latents.len(), expected.len(), "{name}");
    assert_eq!(denoiser.latents.last(), Some(&z), "{name}");
    for (step, (ours, theirs)) in denoiser.latents.iter().zip(&expected).enumerate() {
        for (a, b) in ours.iter().zip(theirs) {
            assert!((a - b).abs() < 1e-4, "{name}, step {step}: {a}, but diffusers has {b}");
        }
    }
}

#[test]
fn ddim_equals_diffusers() {
    check("ddim", &Ddim::default(), |_| ());
    check("ddim alpha-to-one", &Ddim::default(), |schedule| schedule.set_alpha_to_one = true);
    check("ddim eta", &Ddim { eta: 1.0 }, |_| ());
}

#[test]
fn dpmpp_2m_equals_diffusers() {
    let sampler = DpmSolverPlusPlus2M::default();
    check("dpmpp-2m", &sampler, |_| ());
    check("dpmpp-2m 9 steps", &sampler, |_| ());
    check("dpmpp-2m linspace", &sampler, |schedule| schedule.spacing = TimestepSpacing::Linspace);
    check("dpmpp-2m trailing", &sampler, |schedule| schedule.spacing = TimestepSpacing::Trailing);
    check("dpmpp-2m-karras", &DpmSolverPlusPlus2M { karras: true }, |_| ());
}

#[test]
fn euler_a_equals_diffusers() {
    check("euler-a", &EulerAncestral, |_| ());
    check("euler-a trailing", &EulerAncestral, |schedule| schedule.spacing = TimestepSpacing::Trailing);
}

#[test]
fn every_sampler_converges_on_the_mean_of_certain_data() {
    for id in SAMPLERS {
        let sampler = by_id(id).unwrap();
        assert_eq!(sampler.id(), id);
        for steps in [1, 2, 50] {
            let mut denoiser = gaussian();
            denoiser.schedule.set_alpha_to_one = true;
            denoiser.golden.deviation = vec![1e-4; 8];
            denoiser.golden.noise = vec![vec![0.5; 8]; steps];
            let mut z = denoiser.golden.start.clone();
            sampler.sample(&mut denoiser, &mut z, steps).unwrap();
            for (z, mean) in z.iter().zip(&denoiser.golden.mean) {
                assert!((*z as f64 - mean).abs() < 0.01, "{id}, {steps} steps: {z}, but the data are {mean}");
            }
        }
    }
}

#[test]
fn cancelling_ends_the_loop_at_that_step() {
    for id in SAMPLERS {
        let mut denoiser = Gaussian { cancel_after: 3, ..gaussian() };
        let mut z = denoiser.golden.start.clone();
        let result = by_id(id).unwrap().sample(&mut denoiser, &mut z, 20);
        assert!(matches!(result, Err(Error::Cancelled)), "{id}");
        assert_eq!(denoiser.latents.len(), 4, "{id}");
    }
}

#[test]
fn bad_ids_and_step_counts_are_refused() {
    let message = by_id("plms").err().unwrap().to_string();
    assert!(message.contains("plms") && message.contains("dpmpp-2m"), "{message}");
    for id in SAMPLERS {
        for steps in [0, 1001] {
            let mut denoiser = gaussian();
            let mut z = denoiser.golden.start.clone();
            assert!(by_id(id).unwrap().sample(&mut denoiser, &mut z, steps).is_err(), "{id} {steps}");
        }
    }
}
