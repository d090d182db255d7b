//! The host's answers to a worker's calls.

use blocklora_sdk::sample::Denoiser;
use blocklora_sdk::train::{ErasureMasks, Objective, Parameters, PictureRequest, TrainHost, check_parameters};
use blocklora_sdk::{Error, Job, LogLevel, Result};

use super::messages::{self as m, Call, Reply};
use super::number_of;
use super::wire::Payload;
use crate::plugins::stop;

/// What a request's plugin may call.
pub enum Services<'a> {
    None,
    Job(&'a dyn Job),
    Sample { denoiser: &'a mut dyn Denoiser, len: usize },
    Train { host: &'a mut dyn TrainHost, gradients: Parameters },
}

pub fn job_services(job: &dyn Job) -> Services<'_> {
    Services::Job(job)
}

pub fn sample_services(denoiser: &mut dyn Denoiser, len: usize) -> Services<'_> {
    Services::Sample { denoiser, len }
}

pub fn train_services(host: &mut dyn TrainHost) -> Services<'_> {
    Services::Train { host, gradients: Parameters::default() }
}

fn broken(error: std::io::Error) -> Error {
    Error::contract(format!("the plugin's worker sent something else: {error}"))
}

impl Services<'_> {
    pub fn none() -> Self {
        Self::None
    }

    /// Serves one call; errors go back as the plugin's contract has them.
    pub fn serve(&mut self, call: Call, numbers: Payload) -> (Reply, Payload) {
        let mut out = Payload::default();
        match self.answer(call, numbers, &mut out) {
            Ok(reply) => (reply, out),
            Err(error) => (Reply::Failed(number_of(error.code), error.message), Payload::default()),
        }
    }

    /// Whether the job that this is done for is to end, whether or not the plugin knows it yet.
    pub fn is_to_end(&self) -> bool {
        self.job().is_some_and(Job::is_cancelled) || stop::is_asked_for()
    }

    fn job(&self) -> Option<&dyn Job> {
        match self {
            Self::None => None,
            Self::Job(job) => Some(*job),
            Self::Sample { denoiser, .. } => Some(&**denoiser as &dyn Job),
            Self::Train { host, .. } => Some(&**host as &dyn Job),
        }
    }

    fn answer(&mut self, call: Call, numbers: Payload, out: &mut Payload) -> Result<Reply> {
        let level = |number| match number {
            1 => LogLevel::Warning,
            2 => LogLevel::Info,
            _ => LogLevel::Debug,
        };
        match (call, self.job()) {
            (Call::Progress(done, total), job) => job.into_iter().for_each(|job| job.progress(done, total)),
            (Call::IsCancelled, job) => return Ok(Reply::Flag(job.is_some_and(Job::is_cancelled))),
            (Call::Log(number, message), job) => job.into_iter().for_each(|job| job.log(level(number), &message)),
            (Call::Artefact(name), Some(job)) => {
                let mut numbers = numbers;
                job.artefact(&name, &numbers.take_bytes().map_err(broken)?)?;
            }
            (call, _) => return self.answer_kind(call, numbers, out),
        }
        Ok(Reply::Nothing)
    }

    fn answer_kind(&mut self, call: Call, mut numbers: Payload, out: &mut Payload) -> Result<Reply> {
        match self {
            Self::Sample { denoiser, len } => sample(&mut **denoiser, *len, call, &mut numbers, out),
            Self::Train { host, gradients } => train(&mut **host, gradients, call, &mut numbers, out),
            _ => Err(Error::contract("the plugin called what this job does not have")),
        }
    }
}

fn sample(
    denoiser: &mut dyn Denoiser,
    len: usize,
    call: Call,
    numbers: &mut Payload,
    out: &mut Payload,
) -> Result<Reply> {
    let latents = |numbers: &mut Payload| {
        let latents = numbers.take().map_err(broken)?;
        if latents.len() == len {
            Ok(latents)
        } else {
            Err(Error::contract(format!("{} latents of {len}", latents.len())))
        }
    };
    match call {
        Call::Predict(timestep) => {
            let last = denoiser.schedule().num_train_timesteps() as f32;
            if !(0.0..=last).contains(&timestep) {
                return Err(Error::contract(format!("the sampler asked for timestep {timestep}, not in 0..{last}")));
            }
            let (latents, mut eps) = (latents(numbers)?, vec![0.0; len]);
            denoiser.predict(&latents, timestep, &mut eps)?;
            out.put(&eps);
        }
        Call::Noise(index, wanted) if wanted == len => {
            let mut noise = vec![0.0; len];
            denoiser.noise(index, &mut noise);
            out.put(&noise);
        }
        Call::StepDone(step, steps) => denoiser.step_done(step, steps, &latents(numbers)?)?,
        _ => return Err(Error::contract("the sampler called what samplers do not have")),
    }
    Ok(Reply::Nothing)
}

fn train(
    host: &mut dyn TrainHost,
    gradients: &mut Parameters,
    call: Call,
    numbers: &mut Payload,
    out: &mut Payload,
) -> Result<Reply> {
    match call {
        Call::Embedding(word) => out.put(&host.embedding(&word)?),
        Call::CheckPrompt(prompt, tokens) => host.check_prompt(&prompt, tokens)?,
        Call::Generate { prompt, count, steps, guidance_scale } => {
            let request = PictureRequest { prompt, count, steps, guidance_scale };
            return Ok(Reply::Index(host.generate(&request)?.start));
        }
        Call::Loss { drift, parameters, masks, batch } => {
            let parameters = m::take_parameters(parameters, numbers).map_err(broken)?;
            check_parameters(host.layers(), &parameters)?;
            let masks =
                (0..masks).map(|_| numbers.take()).collect::<std::io::Result<ErasureMasks>>().map_err(broken)?;
            let samples = batch.into_iter().map(|sample| m::take_sample(sample, numbers));
            let batch = samples.collect::<std::io::Result<Vec<_>>>().map_err(broken)?;
            blocklora_sdk::train::check_step(host.latent_shape(), &parameters, &masks, &batch)?;
            let objective = if drift { Objective::Drift } else { Objective::Loss };
            let loss = objective.ask(host, &parameters, &masks, &batch, gradients)?;
            gradients.tensors().for_each(|tensor| out.put(tensor));
            return Ok(Reply::Loss(loss));
        }
        Call::Resume => {
            let state = host.resume()?;
            return Ok(Reply::State(state.map(|state| m::put_state(&state, out))));
        }
        Call::TrainStepDone { state, steps, loss } => {
            let step = state.step;
            let state = m::take_state(state, numbers).map_err(broken)?;
            host.step_done_with(step, &|| state.clone(), steps, loss)?;
        }
        _ => return Err(Error::contract("the trainer called what trainers do not have")),
    }
    Ok(Reply::Nothing)
}
