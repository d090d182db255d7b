//! A plugin as the engine's sampler, and the services of jobs.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use blocklora_engine::sample::{self as engine, Denoiser, Sampler};
use blocklora_engine::{Error, Result};
use blocklora_sdk::sample as sdk;
use blocklora_sdk::{Code, Job, LogLevel};
use send_wrapper::SendWrapper;

use super::artefacts::Artefacts;
use super::merge::failed;
use super::running::{Place, inside, outside};
use super::stop::Stop;
use super::words;

pub struct PluginSampler {
    pub id: String,
    pub sampler: Box<dyn sdk::AnySampler>,
    /// On a model that does not say it.
    pub spacing: sdk::TimestepSpacing,
    /// In this process.
    pub place: Option<Place>,
}

impl Sampler for PluginSampler {
    fn id(&self) -> &str {
        &self.id
    }

    fn sample(&self, denoiser: &mut dyn Denoiser, latents: &mut [f32], steps: usize) -> Result<()> {
        let mut host = Host {
            job: QuietJob::new(denoiser.seed()),
            schedule: schedule(denoiser.schedule(), self.spacing),
            denoiser: SendWrapper::new(denoiser),
            place: self.place.as_ref(),
            steps_done: 0,
        };
        let result = inside(self.place.as_ref(), || self.sampler.sample(&mut host, latents, steps));
        let result = result.and_then(|()| match host.steps_done {
            done if done == steps => Ok(()),
            done => Err(blocklora_sdk::Error::contract(format!("it told of {done} steps instead of {steps}"))),
        });
        host.job.finish(&self.id, result)
    }
}

fn schedule(schedule: &engine::NoiseSchedule, spacing: sdk::TimestepSpacing) -> sdk::NoiseSchedule {
    sdk::NoiseSchedule {
        alphas_cumprod: schedule.alphas_cumprod.clone(),
        steps_offset: schedule.steps_offset,
        set_alpha_to_one: schedule.set_alpha_to_one,
        spacing: match schedule.spacing {
            None => spacing,
            Some(engine::TimestepSpacing::Leading) => sdk::TimestepSpacing::Leading,
            Some(engine::TimestepSpacing::Linspace) => sdk::TimestepSpacing::Linspace,
            Some(engine::TimestepSpacing::Trailing) => sdk::TimestepSpacing::Trailing,
        },
    }
}

/// A job whose log goes to the daemon's.
pub struct QuietJob {
    seed: u64,
    /// Where what a plugin hands over goes; none where it is not run for a job.
    artefacts: Option<Arc<Artefacts>>,
    cancelled: AtomicBool,
    /// Whether the job is to end, where the plugin works without asking the engine, which would say so. Others learn it
    /// from the engine, so that a training has written its checkpoint before.
    stop: Option<Stop>,
    /// The engine's own error behind one that a plugin passes on.
    cause: Mutex<Option<Error>>,
}

impl QuietJob {
    pub fn new(seed: u64) -> Self {
        let artefacts = Artefacts::current();
        Self { seed, artefacts, cancelled: AtomicBool::default(), stop: None, cause: Mutex::default() }
    }

    /// For work without random numbers that asks the engine for nothing.
    pub fn until(stop: Option<Stop>) -> Self {
        Self { stop, ..Self::new(0) }
    }

    fn cause(&self) -> MutexGuard<'_, Option<Error>> {
        self.cause.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// The engine's result as a plugin sees it; the error is kept.
    pub fn pass<T>(&self, result: Result<T>) -> blocklora_sdk::Result<T> {
        result.map_err(|error| {
            if matches!(error, Error::Cancelled) {
                self.cancelled.store(true, Ordering::Relaxed);
                return blocklora_sdk::Error::cancelled();
            }
            let passed = blocklora_sdk::Error::new(Code::Host, error.to_string());
            *self.cause() = Some(error);
            passed
        })
    }

    /// A plugin's result as the engine's: where it passed an error of the engine on, that error itself; and cancelled
    /// is cancelled, also where the plugin went on.
    pub fn finish<T>(&self, id: &str, result: blocklora_sdk::Result<T>) -> Result<T> {
        if result.is_ok() && self.is_cancelled() {
            return Err(Error::Cancelled);
        }
        result.map_err(|error| {
            let cause = self.cause().take();
            match (error.code, cause) {
                (Code::Host, Some(cause)) => cause,
                _ if self.cancelled.load(Ordering::Relaxed) => Error::Cancelled,
                _ => failed(id, error),
            }
        })
    }
}

impl Job for QuietJob {
    fn progress(&self, _done: u64, _total: u64) {}
    fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed) || self.stop.as_ref().is_some_and(|stop| stop())
    }
    fn log(&self, level: LogLevel, message: &str) {
        let message = words::said(message);
        match level {
            LogLevel::Warning => tracing::warn!("plugin: {message}"),
            LogLevel::Info => tracing::info!("plugin: {message}"),
            LogLevel::Debug => tracing::debug!("plugin: {message}"),
        }
    }
    fn seed(&self) -> u64 {
        self.seed
    }
    fn artefact(&self, name: &str, bytes: &[u8]) -> blocklora_sdk::Result<()> {
        match &self.artefacts {
            Some(artefacts) => artefacts.keep(name, bytes),
            None => Err(blocklora_sdk::Error::new(Code::NotSupported, format!("{name}: nothing is kept here"))),
        }
    }
}

/// Implements [`Job`] by the field `job`.
macro_rules! job_by_field {
    ($type:ty) => {
        impl blocklora_sdk::Job for $type {
            fn progress(&self, done: u64, total: u64) {
                self.job.progress(done, total);
            }
            fn is_cancelled(&self) -> bool {
                self.job.is_cancelled()
            }
            fn log(&self, level: blocklora_sdk::LogLevel, message: &str) {
                self.job.log(level, message);
            }
            fn seed(&self) -> u64 {
                self.job.seed()
            }
            fn artefact(&self, name: &str, bytes: &[u8]) -> blocklora_sdk::Result<()> {
                self.job.artefact(name, bytes)
            }
        }
    };
}
pub(super) use job_by_field;

/// The engine's denoiser as a plugin sees it. It belongs to the thread of the job, which the ABI checks before it calls.
struct Host<'a> {
    job: QuietJob,
    schedule: sdk::NoiseSchedule,
    denoiser: SendWrapper<&'a mut dyn Denoiser>,
    place: Option<&'a Place>,
    steps_done: usize,
}

job_by_field!(Host<'_>);

impl sdk::Denoiser for Host<'_> {
    fn schedule(&self) -> &sdk::NoiseSchedule {
        &self.schedule
    }
    fn shape(&self) -> [usize; 4] {
        self.denoiser.shape()
    }
    fn predict(&mut self, latents: &[f32], timestep: f32, eps: &mut [f32]) -> blocklora_sdk::Result<()> {
        self.job.check_cancelled()?;
        let result = outside(self.place, || self.denoiser.predict(latents, timestep, eps));
        self.job.pass(result)
    }
    fn noise(&mut self, index: usize, out: &mut [f32]) {
        outside(self.place, || self.denoiser.noise(index, out));
    }
    fn step_done(&mut self, step: usize, steps: usize, latents: &[f32]) -> blocklora_sdk::Result<()> {
        self.steps_done += 1;
        let result = outside(self.place, || self.denoiser.step_done(step, steps, latents));
        self.job.pass(result)
    }
}
