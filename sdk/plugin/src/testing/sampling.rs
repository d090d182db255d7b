//! What every sampler must do, and how fast it approaches the exact distribution of Gaussian data.

use super::gaussian::Gaussian;
use crate::error::{Code, Error, Result};
use crate::sample::{AnySampler, NoiseSchedule, TimestepSpacing};

fn failed<T>(message: impl Into<String>) -> Result<T> {
    Err(Error::new(Code::Failed, message))
}

/// Checks what [`Sampler::sample`](crate::sample::Sampler::sample) promises: one step works and is finite; 0 steps and
/// more than the schedule has are an error that names `steps`; a caller who cancels is answered within that step; a
/// prediction of NaN ends the run within that step, and an error of the denoiser is passed on unchanged. The error says
/// what is broken.
pub fn check_sampler_contract(sampler: &dyn AnySampler) -> Result<()> {
    const STEPS: usize = 12;
    const STOP: usize = 3;
    let start: Vec<f32> = (0..8).map(|i| i as f32 * 0.5 - 2.0).collect();
    let gaussian = || Gaussian::new(vec![0.5; 8], vec![0.75; 8]);

    let (mut denoiser, mut z) = (gaussian()?, start.clone());
    sampler.sample(&mut denoiser, &mut z, 1)?;
    if denoiser.latents != [z.clone()] || !z.iter().all(|z| z.is_finite()) {
        return failed(format!("1 step: {} were reported, the result is {z:?}", denoiser.latents.len()));
    }

    for steps in [0, denoiser.schedule.num_train_timesteps() + 1] {
        match sampler.sample(&mut gaussian()?, &mut start.clone(), steps) {
            Err(e) if e.code == Code::InvalidConfig && e.message.contains("steps") => {}
            other => {
                return failed(format!("{steps} steps must be an InvalidConfig error naming steps, not {other:?}"));
            }
        }
    }

    let mut denoiser = Gaussian { cancel_after: Some(STOP), ..gaussian()? };
    match sampler.sample(&mut denoiser, &mut start.clone(), STEPS) {
        Err(e) if e.is_cancelled() && denoiser.latents.len() == STOP + 1 => {}
        other => return failed(format!("cancelled in step {STOP}: {other:?} after {} steps", denoiser.latents.len())),
    }
    let predictions = denoiser.predictions;
    let mut whole = gaussian()?;
    sampler.sample(&mut whole, &mut start.clone(), STEPS)?;
    if whole.predictions <= predictions {
        return failed("after it was cancelled it went on predicting");
    }

    // The first prediction of the step after STOP, whatever the predictions per step.
    let mut denoiser = Gaussian { nan_at: Some(predictions), ..gaussian()? };
    match sampler.sample(&mut denoiser, &mut start.clone(), STEPS) {
        Err(e) if e.code == Code::NotFinite && denoiser.latents.len() == STOP + 1 => Ok(()),
        other => failed(format!("a prediction of NaN in step {}: {other:?}", STOP + 1)),
    }
}

/// How far the distribution that `sampler` makes of Gaussian data is from the exact one, at the noise level where its
/// last step begins: the largest error of the mean and of the standard deviation. Exact, without random numbers: on
/// Gaussian data a sampler is linear in its start and in the noise of each step, so that its responses to unit numbers
/// say all.
pub fn moment_error(sampler: &dyn AnySampler, schedule: &NoiseSchedule, steps: usize) -> Result<f64> {
    let run = |mean: f64, deviation: f64, start: &[f32], noise: Vec<Vec<f32>>| {
        let lanes = start.len();
        let mut denoiser =
            Gaussian { schedule: schedule.clone(), noise, ..Gaussian::new(vec![mean; lanes], vec![deviation; lanes])? };
        sampler.sample(&mut denoiser, &mut start.to_vec(), steps)?;
        let last = |list: &[f32]| list.last().copied().unwrap_or_default();
        let (first_t, last_t) = (denoiser.timesteps.first().copied().unwrap_or_default(), last(&denoiser.timesteps));
        let Some(before_last) = denoiser.latents.len().checked_sub(2) else { return failed("needs two steps") };
        Ok((first_t, last_t, denoiser.latents.swap_remove(before_last)))
    };
    let level = |t: f32| {
        let (alpha, sigma) = schedule.alpha_sigma_at(t);
        (alpha as f64, sigma as f64)
    };
    let quiet = |lanes: usize| vec![vec![0.0; lanes]; steps];

    // The mean: start from the mean of z_T, without noise.
    let (mean, deviation) = (1.0, 0.5);
    let (t, _, _) = run(mean, deviation, &[0.0], quiet(1))?;
    let (_, t_end, z) = run(mean, deviation, &[(level(t).0 * mean) as f32], quiet(1))?;
    let mut error = (z[0] as f64 - level(t_end).0 * mean).abs();

    // The deviation: lane 0 answers to the start, lane k to the noise of step k - 1.
    let unit = |lane: usize| (0..=steps).map(|i| (i == lane) as u8 as f32).collect::<Vec<f32>>();
    for deviation in [0.3, 2.0] {
        let (t, t_end, response) = run(0.0, deviation, &unit(0), (1..=steps).map(unit).collect())?;
        let variance = |(alpha, sigma): (f64, f64)| alpha * alpha * deviation * deviation + sigma * sigma;
        let square = |&r: &f32| r as f64 * r as f64;
        let ours = square(&response[0]) * variance(level(t)) + response[1..].iter().map(square).sum::<f64>();
        error = error.max((ours.sqrt() - variance(level(t_end)).sqrt()).abs());
    }
    Ok(error)
}

/// The order at which `sampler` converges: log2 of the ratio of the [`moment_error`]s at two numbers of steps, the
/// second with half the stride, such as 33 and 65. On Stable Diffusion's noise levels cut into 2^15 timesteps, of which
/// the first and the last are visited, so that no rounding to whole timesteps hides the order.
pub fn order_of_convergence(sampler: &dyn AnySampler, steps: [usize; 2]) -> Result<f64> {
    const TIMESTEPS: usize = (1 << 15) + 1;
    let part = 1000.0 / TIMESTEPS as f32;
    let levels = NoiseSchedule::scaled_linear(0.00085 * part, 0.012 * part, TIMESTEPS)?;
    let schedule = NoiseSchedule { spacing: TimestepSpacing::Linspace, ..levels };
    Ok((moment_error(sampler, &schedule, steps[0])? / moment_error(sampler, &schedule, steps[1])?).log2())
}
