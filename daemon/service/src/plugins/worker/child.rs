//! The worker's side: a process that holds one plugin and works for its host until that goes.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Mutex, MutexGuard};

use blocklora_sdk::manifest::PluginKind;
use blocklora_sdk::merge::{AnyMergeStrategy, Coefficients, Layer, LayerPlan, Tile};
use blocklora_sdk::sample::{AnySampler, Denoiser, NoiseSchedule};
use blocklora_sdk::train::{
    AnyTrainer, Concept, ErasureMasks, Objective, Parameters, PictureRequest, Sample, TrainHost, TrainState,
};
use blocklora_sdk::{Code, Error, Job, LogLevel, Result};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use serde_json::Value;

use super::messages::{self as m, Answer, Call, Reply, Request};
use super::wire::{Payload, Wire};
use super::{code_of, number_of};
use crate::plugins::{discover, helper, scan};

/// The hidden command of the daemon's program.
pub const COMMAND: &str = "__plugin-worker";

/// Works for the process that started this one, on its stdin (the socket) and stdout (the memory).
pub fn serve(manifest: &Path) -> u8 {
    let Ok((socket, memory)) = inherited() else { return 2 };
    end_with_the_host(&socket);
    let link = Link(Mutex::new(Wire::worker(socket, memory)));
    match work(&link, manifest) {
        // The host has gone, which is how a worker ends.
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => 0,
        _ => 2,
    }
}

/// Ends this process when the host's end of the socket closes, whatever the plugin is doing. (The kernel's signal would
/// come with the end of the thread that started this process, and the host's threads come and go.)
fn end_with_the_host(socket: &UnixStream) {
    let Ok(socket) = socket.try_clone() else { return };
    std::thread::spawn(move || {
        loop {
            let mut ends = [PollFd::new(&socket, PollFlags::empty())];
            match poll(&mut ends, None) {
                Ok(_) if ends[0].revents().intersects(PollFlags::HUP | PollFlags::ERR) => std::process::exit(0),
                Ok(_) | Err(Errno::INTR) => {}
                Err(_) => return,
            }
        }
    });
}

fn inherited() -> io::Result<(UnixStream, File)> {
    let socket = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let memory = File::from(io::stdout().as_fd().try_clone_to_owned()?);
    // Whatever the plugin prints must not end up in the memory, nor what it reads come from the socket.
    let nothing = File::options().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdin(&nothing)?;
    rustix::stdio::dup2_stdout(&nothing)?;
    Ok((socket, memory))
}

enum Instance {
    Merge(Box<dyn AnyMergeStrategy>),
    Train(Box<dyn AnyTrainer>),
    Sample(Box<dyn AnySampler>),
}

fn work(link: &Link, manifest: &Path) -> io::Result<()> {
    let (request, _) = link.receive()?;
    let Request::Open(settings) = request else { return Err(io::ErrorKind::InvalidData.into()) };
    let (instance, settings) = match open(manifest, &settings) {
        Ok(opened) => opened,
        Err(error) => return link.failed(&error).and(Err(io::ErrorKind::UnexpectedEof.into())),
    };
    link.send(&Call::Done(Answer::Open(settings)), &Payload::default())?;
    let mut kept = m::KeptFactors::new();
    loop {
        let (request, payload) = link.receive()?;
        match answer(link, &instance, &mut kept, request, payload)? {
            Ok((answer, payload)) => link.send(&Call::Done(answer), &payload)?,
            Err(error) => link.failed(&error)?,
        }
    }
}

fn open(manifest: &Path, settings: &Value) -> Result<(Instance, Value)> {
    let failed = |reason: String| Error::new(Code::Failed, reason);
    let found = discover::read(manifest).map_err(failed)?;
    helper::limit_self(super::data_bytes(found.manifest.memory_mib));
    let (library, _) = scan::open(&found.library).map_err(failed)?;
    scan::check(&library, &found).map_err(failed)?;
    let settings = library.resolve(settings)?;
    let instance = match found.manifest.kind {
        PluginKind::Merge => Instance::Merge(library.strategy(&settings)?),
        PluginKind::Train => Instance::Train(library.trainer(&settings)?),
        PluginKind::Sample => Instance::Sample(library.sampler(&settings)?),
    };
    Ok((instance, settings))
}

/// Does what is asked. The outer error is the link's.
fn answer(
    link: &Link,
    instance: &Instance,
    kept: &mut m::KeptFactors,
    request: Request,
    mut payload: Payload,
) -> io::Result<Result<(Answer, Payload)>> {
    let mut out = Payload::default();
    let answer = match (instance, request) {
        (Instance::Merge(strategy), Request::Plan { layers, adapters, forget }) => {
            let layers: Vec<Layer> = layers.into_iter().map(m::layer).collect();
            if forget {
                kept.clear();
            }
            let owned = m::take_adapters(adapters, kept, &mut payload)?;
            owned.iter().for_each(|adapter| adapter.keep(kept));
            let adapters: Vec<_> = owned.iter().map(m::OwnedAdapter::view).collect();
            let job = link.job(0);
            strategy.plan(&job, &layers, &adapters).map(|plan| Answer::Plan(put_plan(plan, &mut out)))
        }
        (Instance::Merge(strategy), Request::Fill { index, layer, first_row, rows, adapters }) => {
            let numbers = payload.take()?;
            let layer = m::layer(layer);
            let owned = m::take_adapters(adapters, kept, &mut payload)?;
            let adapters: Vec<_> = owned.iter().map(m::OwnedAdapter::view).collect();
            let mut delta = vec![0.0; rows.saturating_mul(layer.columns)];
            let rows = first_row..first_row + rows;
            let tile = Tile { index, layer: &layer, adapters: &adapters, numbers: &numbers, rows };
            strategy.fill(&tile, &mut delta).map(|()| {
                out.put(&delta);
                Answer::Nothing
            })
        }
        (Instance::Sample(sampler), Request::Sample { schedule, shape, seed, steps }) => {
            let schedule = m::take_schedule(&schedule, &mut payload)?;
            let mut latents = payload.take()?;
            let mut host = RemoteDenoiser { job: link.job(seed), schedule, shape };
            sampler.sample(&mut host, &mut latents, steps).map(|()| {
                out.put(&latents);
                Answer::Nothing
            })
        }
        (Instance::Train(trainer), Request::TrainPlan(concept)) => {
            trainer.plan(&m::concept(concept)).map(|plan| Answer::TrainPlan(m::wire_train_plan(plan)))
        }
        (Instance::Train(trainer), Request::Train(host)) => {
            let mut host = RemoteHost {
                job: link.job(host.seed),
                concept: m::concept(host.concept),
                layers: host.layers.into_iter().map(m::layer).collect(),
                captions: host.captions,
                latent_shape: host.latent_shape,
                cross_attention_layers: host.cross_attention_layers,
                num_train_timesteps: host.num_train_timesteps,
            };
            trainer.train(&mut host).map(|parameters| Answer::Parameters(m::put_parameters(&parameters, &mut out)))
        }
        _ => Err(Error::contract("the worker was asked for what its plugin is not")),
    };
    Ok(answer.map(|answer| (answer, out)))
}

fn put_plan(plan: Vec<LayerPlan>, out: &mut Payload) -> Vec<Option<Vec<(usize, u32, bool)>>> {
    let layer = |plan| match plan {
        LayerPlan::Dense(numbers) => {
            out.put(&numbers);
            None
        }
        LayerPlan::Factored(terms) => {
            let term = |term: blocklora_sdk::merge::Term| match term.coefficients {
                Coefficients::Uniform(c) => (term.adapter, c.to_bits(), false),
                Coefficients::PerRow(values) => {
                    out.put(&values);
                    (term.adapter, 0, true)
                }
            };
            Some(terms.into_iter().map(term).collect())
        }
    };
    plan.into_iter().map(layer).collect()
}

/// The wire, for whichever thread of the plugin speaks.
struct Link(Mutex<Wire>);

impl Link {
    fn wire(&self) -> MutexGuard<'_, Wire> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
    fn receive(&self) -> io::Result<(Request, Payload)> {
        self.wire().receive(&mut || Ok(()))
    }
    fn send(&self, call: &Call, payload: &Payload) -> io::Result<()> {
        self.wire().send(call, payload)
    }
    fn failed(&self, error: &Error) -> io::Result<()> {
        self.send(&Call::Failed(number_of(error.code), error.message.clone()), &Payload::default())
    }
    fn job(&self, seed: u64) -> RemoteJob<'_> {
        RemoteJob { link: self, seed }
    }
    /// Asks the host; its own errors, and a host that is gone, come back as the plugin's contract has them.
    fn ask(&self, call: &Call, payload: &Payload) -> Result<(Reply, Payload)> {
        let mut wire = self.wire();
        let gone = |e: io::Error| Error::new(Code::Host, format!("the host is gone: {e}"));
        wire.send(call, payload).map_err(gone)?;
        match wire.receive(&mut || Ok(())).map_err(gone)? {
            (Reply::Failed(code, message), _) => Err(Error::new(code_of(code), message)),
            answer => Ok(answer),
        }
    }
}

struct RemoteJob<'a> {
    link: &'a Link,
    seed: u64,
}

impl RemoteJob<'_> {
    fn tell(&self, call: &Call) {
        // A host that is gone is found out by the next call that can fail.
        drop(self.link.ask(call, &Payload::default()));
    }
}

impl Job for RemoteJob<'_> {
    fn progress(&self, done: u64, total: u64) {
        self.tell(&Call::Progress(done, total));
    }
    fn is_cancelled(&self) -> bool {
        !matches!(self.link.ask(&Call::IsCancelled, &Payload::default()), Ok((Reply::Flag(false), _)))
    }
    fn log(&self, level: LogLevel, message: &str) {
        self.tell(&Call::Log(level as u32, message.to_owned()));
    }
    fn seed(&self) -> u64 {
        self.seed
    }
    fn artefact(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let mut payload = Payload::default();
        payload.put_bytes(bytes);
        self.link.ask(&Call::Artefact(name.to_owned()), &payload).map(drop)
    }
}

fn broken(error: io::Error) -> Error {
    Error::new(Code::Host, format!("the host answered something else: {error}"))
}

fn unexpected() -> Error {
    Error::new(Code::Host, "the host answered something else")
}

struct RemoteDenoiser<'a> {
    job: RemoteJob<'a>,
    schedule: NoiseSchedule,
    shape: [usize; 4],
}

crate::plugins::sample::job_by_field!(RemoteDenoiser<'_>);

impl Denoiser for RemoteDenoiser<'_> {
    fn schedule(&self) -> &NoiseSchedule {
        &self.schedule
    }
    fn shape(&self) -> [usize; 4] {
        self.shape
    }
    fn predict(&mut self, latents: &[f32], timestep: f32, eps: &mut [f32]) -> Result<()> {
        let mut payload = Payload::default();
        payload.put(latents);
        let (_, mut answer) = self.job.link.ask(&Call::Predict(timestep), &payload)?;
        answer.take_into(eps).map_err(broken)
    }
    fn noise(&mut self, index: usize, out: &mut [f32]) {
        let answer = self.job.link.ask(&Call::Noise(index, out.len()), &Payload::default());
        // As in the ABI: the next call that can fail says what is wrong.
        drop(answer.map(|(_, mut answer)| answer.take_into(out)));
    }
    fn step_done(&mut self, step: usize, steps: usize, latents: &[f32]) -> Result<()> {
        let mut payload = Payload::default();
        payload.put(latents);
        self.job.link.ask(&Call::StepDone(step, steps), &payload).map(drop)
    }
}

struct RemoteHost<'a> {
    job: RemoteJob<'a>,
    concept: Concept,
    layers: Vec<Layer>,
    captions: Vec<Option<String>>,
    latent_shape: [usize; 3],
    cross_attention_layers: usize,
    num_train_timesteps: usize,
}

crate::plugins::sample::job_by_field!(RemoteHost<'_>);

impl RemoteHost<'_> {
    fn step(
        &self,
        objective: Objective,
        parameters: &Parameters,
        masks: &ErasureMasks,
        batch: &[Sample],
        gradients: &mut Parameters,
    ) -> Result<f32> {
        let mut payload = Payload::default();
        let wire = m::put_parameters(parameters, &mut payload);
        masks.iter().for_each(|mask| payload.put(mask));
        let batch = batch.iter().map(|sample| m::put_sample(sample, &mut payload)).collect();
        let drift = objective == Objective::Drift;
        let (reply, mut answer) =
            self.job.link.ask(&Call::Loss { drift, parameters: wire, masks: masks.len(), batch }, &payload)?;
        gradients.clone_from(parameters);
        for tensor in gradients.tensors_mut() {
            answer.take_into(tensor).map_err(broken)?;
        }
        match reply {
            Reply::Loss(loss) => Ok(loss),
            _ => Err(unexpected()),
        }
    }
}

impl TrainHost for RemoteHost<'_> {
    fn concept(&self) -> &Concept {
        &self.concept
    }
    fn layers(&self) -> &[Layer] {
        &self.layers
    }
    fn cross_attention_layers(&self) -> usize {
        self.cross_attention_layers
    }
    fn latent_shape(&self) -> [usize; 3] {
        self.latent_shape
    }
    fn num_train_timesteps(&self) -> usize {
        self.num_train_timesteps
    }
    fn captions(&self) -> &[Option<String>] {
        &self.captions
    }
    fn embedding(&self, word: &str) -> Result<Vec<f32>> {
        let (_, mut answer) = self.job.link.ask(&Call::Embedding(word.to_owned()), &Payload::default())?;
        answer.take().map_err(broken)
    }
    fn check_prompt(&self, prompt: &str, tokens: usize) -> Result<()> {
        self.job.link.ask(&Call::CheckPrompt(prompt.to_owned(), tokens), &Payload::default()).map(drop)
    }
    fn generate(&mut self, request: &PictureRequest) -> Result<Range<usize>> {
        let PictureRequest { prompt, count, steps, guidance_scale } = request.clone();
        let call = Call::Generate { prompt, count, steps, guidance_scale };
        match self.job.link.ask(&call, &Payload::default())? {
            (Reply::Index(start), _) => Ok(start..start + count),
            _ => Err(unexpected()),
        }
    }
    fn loss_and_gradients(
        &mut self,
        parameters: &Parameters,
        masks: &ErasureMasks,
        batch: &[Sample],
        gradients: &mut Parameters,
    ) -> Result<f32> {
        self.step(Objective::Loss, parameters, masks, batch, gradients)
    }
    fn drift_and_gradients(
        &mut self,
        parameters: &Parameters,
        masks: &ErasureMasks,
        batch: &[Sample],
        gradients: &mut Parameters,
    ) -> Result<f32> {
        self.step(Objective::Drift, parameters, masks, batch, gradients)
    }
    fn resume(&mut self) -> Result<Option<TrainState>> {
        match self.job.link.ask(&Call::Resume, &Payload::default())? {
            (Reply::State(None), _) => Ok(None),
            (Reply::State(Some(state)), mut payload) => m::take_state(state, &mut payload).map(Some).map_err(broken),
            _ => Err(unexpected()),
        }
    }
    fn step_done(&mut self, state: &TrainState, steps: usize, loss: f32) -> Result<()> {
        let mut payload = Payload::default();
        let state = m::put_state(state, &mut payload);
        self.job.link.ask(&Call::TrainStepDone { state, steps, loss }, &payload).map(drop)
    }
}
