//! Samplers on Gaussian data, for which the best prediction and the exact solution are known.

use blocklora_sdk::manifest::Law;
use blocklora_sdk::sample::{NoiseSchedule, TimestepSpacing};
use blocklora_sdk::testing::{Gaussian, check_sampler_contract, moment_error};
use blocklora_sdk::{Code, Error, Result};

use super::skip;
use crate::subject::{Subject, Verdict, wrong};

fn text(error: Error) -> String {
    error.message
}

fn gaussian(deviation: f64) -> Result<Gaussian, String> {
    let mean: Vec<f64> = (0..8).map(|i| i as f64 * 0.25 - 1.0).collect();
    let mut denoiser = Gaussian::new(mean, vec![deviation; 8]).map_err(text)?;
    denoiser.shape = [2, 1, 2, 2];
    Ok(denoiser)
}

pub fn contract(subject: &Subject) -> Verdict {
    check_sampler_contract(&*subject.sampler()?).map_err(text)
}

pub fn progress(subject: &Subject) -> Verdict {
    for steps in [1, 5, 20] {
        let mut denoiser = gaussian(0.5)?;
        denoiser.job.seed = subject.seed;
        let mut z = subject.rng(0).normals(8);
        subject.sampler()?.sample(&mut denoiser, &mut z, steps).map_err(text)?;
        if denoiser.latents.len() != steps {
            return wrong(format!("{steps} steps, but step_done was called {} times", denoiser.latents.len()));
        }
        if denoiser.latents.last() != Some(&z) {
            return wrong("the result is not what the last step_done got");
        }
        let reported = denoiser.job.progress.into_inner().unwrap_or_default();
        if let Some(pair) = reported.windows(2).find(|pair| pair[1].0 < pair[0].0) {
            return wrong(format!("the progress went from {} back to {}", pair[0].0, pair[1].0));
        }
    }
    Ok(())
}

pub fn lands(subject: &Subject) -> Verdict {
    for steps in [1, 2, 7, 30] {
        let mut denoiser = gaussian(1e-4)?;
        denoiser.job.seed = subject.seed;
        denoiser.schedule.set_alpha_to_one = true;
        let mut z = subject.rng(0).normals(8);
        subject.sampler()?.sample(&mut denoiser, &mut z, steps).map_err(|e| format!("{steps} steps: {e}"))?;
        for (z, mean) in z.iter().zip(&denoiser.mean) {
            if (*z as f64 - mean).abs() > 0.02 {
                return wrong(format!("{steps} steps: all data are {mean}, but the sample is {z}"));
            }
        }
    }
    Ok(())
}

pub fn converges(subject: &Subject) -> Verdict {
    if !subject.manifest.laws.contains(&Law::Converges) {
        return skip("the manifest does not declare the law \"converges\"");
    }
    let sampler = subject.sampler()?;
    let schedule = gaussian(1.0)?.schedule;
    let error = |steps| moment_error(&*sampler, &schedule, steps).map_err(|e| format!("{steps} steps: {e}"));
    let (few, many) = (error(10)?, error(60)?);
    if many > 0.1 || many > few / 2.0 {
        return wrong(format!(
            "mean or deviation is {few:.4} off after 10 steps and {many:.4} after 60: the method does not converge"
        ));
    }
    Ok(())
}

pub fn deterministic(subject: &Subject) -> Verdict {
    if !subject.manifest.deterministic {
        return skip("the manifest does not declare deterministic = true");
    }
    let run = || -> Result<Vec<u32>, String> {
        let mut denoiser = gaussian(0.5)?;
        denoiser.job.seed = subject.seed;
        let mut z = subject.rng(0).normals(8);
        subject.sampler()?.sample(&mut denoiser, &mut z, 12).map_err(text)?;
        Ok(z.iter().map(|x| x.to_bits()).collect())
    };
    let first = run()?;
    for _ in 0..3 {
        if run()? != first {
            return wrong("the same run again gives other bits: take random numbers from Denoiser::noise only");
        }
    }
    Ok(())
}

pub fn spacings(subject: &Subject) -> Verdict {
    let schedules = [
        NoiseSchedule::scaled_linear(0.00085, 0.012, 1000),
        NoiseSchedule::linear(1e-4, 0.02, 1000),
        NoiseSchedule::linear(1e-3, 0.2, 50),
    ];
    for schedule in schedules {
        let schedule = schedule.map_err(text)?;
        for spacing in [TimestepSpacing::Leading, TimestepSpacing::Linspace, TimestepSpacing::Trailing] {
            for steps in [1, 2, 3, 13, 33, 49, 50, 51, 1000] {
                let schedule = NoiseSchedule { spacing, ..schedule.clone() };
                let what = format!("{} timesteps, {spacing:?}, {steps} steps", schedule.num_train_timesteps());
                let mut denoiser = Gaussian { schedule, ..gaussian(0.5)? };
                let mut z = subject.rng(0).normals(8);
                match subject.sampler()?.sample(&mut denoiser, &mut z, steps) {
                    Ok(()) if denoiser.latents.len() == steps => {}
                    Ok(()) => return wrong(format!("{what}: {} were reported", denoiser.latents.len())),
                    Err(e) if e.code == Code::InvalidConfig && steps > 1 => {}
                    Err(e) => return wrong(format!("{what}: {e}")),
                }
            }
        }
    }
    Ok(())
}
