//! Golden values of samplers: what diffusers' schedulers make of the exact denoiser of Gaussian data.

use std::collections::BTreeMap;
use std::path::Path;

use super::gaussian::Gaussian;
use crate::error::{Code, Error, Result};
use crate::sample::{AnySampler, NoiseSchedule};

/// A file of golden values, as `tests/parity/make_sampler_golden.py` writes it: the data's distribution, the start, the
/// noise of each step, and the latents after every step of each run.
#[derive(Clone, Debug, serde::Deserialize)]
pub struct SamplerGolden {
    /// Mean of each number.
    pub mean: Vec<f64>,
    /// Standard deviation of each number.
    pub deviation: Vec<f64>,
    /// Unit Gaussian noise to start from.
    pub start: Vec<f32>,
    /// The noise of each step.
    pub noise: Vec<Vec<f32>>,
    /// By name the latents after each step.
    pub runs: BTreeMap<String, Vec<Vec<f32>>>,
}

impl SamplerGolden {
    /// Reads the file.
    pub fn open(path: &Path) -> Result<Self> {
        read_json(path)
    }
}

/// The JSON file at `path`.
pub(super) fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    let failed = |e: String| Error::new(Code::Failed, format!("{}: {e}", path.display()));
    let text = std::fs::read_to_string(path).map_err(|e| failed(e.to_string()))?;
    serde_json::from_str(&text).map_err(|e| failed(e.to_string()))
}

/// Compares `sampler` step for step with the run `name`, on Stable Diffusion's schedule after `change`. The error says
/// where it differs by more than 1e-4.
pub fn check_sampler(
    golden: &SamplerGolden,
    name: &str,
    sampler: &dyn AnySampler,
    change: impl Fn(&mut NoiseSchedule),
) -> Result<()> {
    let failed = |message: String| Err(Error::new(Code::Failed, format!("{name}: {message}")));
    let Some(expected) = golden.runs.get(name) else { return failed("there is no such run".into()) };
    let mut denoiser = Gaussian::new(golden.mean.clone(), golden.deviation.clone())?;
    denoiser.noise.clone_from(&golden.noise);
    change(&mut denoiser.schedule);
    let mut z = golden.start.clone();
    sampler.sample(&mut denoiser, &mut z, expected.len())?;
    if denoiser.latents.len() != expected.len() || denoiser.latents.last() != Some(&z) {
        return failed(format!("{} steps reported, or another result than the last step's", denoiser.latents.len()));
    }
    for (step, (ours, theirs)) in denoiser.latents.iter().zip(expected).enumerate() {
        for (a, b) in ours.iter().zip(theirs) {
            if (a - b).abs() >= 1e-4 || !a.is_finite() {
                return failed(format!("step {step}: {a}, but diffusers has {b}"));
            }
        }
    }
    Ok(())
}
