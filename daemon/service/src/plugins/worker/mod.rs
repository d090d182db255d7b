//! Plugins in a process of their own: the host's side.
//!
//! Each instance has its worker. Whatever the plugin does there (crash, hang, take all memory), the job fails with one
//! line that says so, and this process goes on.

pub mod child;
mod messages;
mod serve;
mod wire;

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use blocklora_sdk::merge::{Adapter, AnyMergeStrategy, Coefficients, Layer, LayerPlan, Plan, Term, Tile};
use blocklora_sdk::sample::{AnySampler, Denoiser};
use blocklora_sdk::train::{AnyTrainer, Concept, Parameters, TrainHost, TrainPlan};
use blocklora_sdk::{Code, Error, Job, Result};
use rustix::fs::{MemfdFlags, memfd_create};
use serde_json::Value;

use super::discover::Found;
use super::error::PluginError;
use super::helper;
use super::records::Records;
use messages::{self as m, Answer, Call, Request};
use serve::{Services, job_services};
use wire::{Payload, Wire};

/// How long a plugin may work without asking its host for anything.
pub const SILENCE_MAX: Duration = Duration::from_secs(120);
/// How long it may work on once its job is to end.
const IGNORED_MAX: Duration = Duration::from_secs(30);
/// How often a worker that is waited for is looked at.
const LOOK: Duration = Duration::from_millis(20);
/// Memory beside the declared one: the program itself, and the numbers it was sent.
const ALLOWANCE_BYTES: u64 = 256 << 20;

/// Bytes of the factors that a worker keeps from one request to the next.
const KNOWN_BYTES_MAX: u64 = 512 << 20;

/// Private memory that a worker can have at most, as the kernel enforces it: beyond what the host watches.
fn data_bytes(memory_mib: u64) -> u64 {
    (2 * memory_mib + 2048) << 20
}

fn number_of(code: Code) -> u32 {
    code as u32
}

fn code_of(number: u32) -> Code {
    const CODES: [Code; 8] = [
        Code::Cancelled,
        Code::InvalidConfig,
        Code::Incompatible,
        Code::NotSupported,
        Code::NotFinite,
        Code::Panicked,
        Code::Contract,
        Code::Host,
    ];
    CODES.into_iter().find(|code| *code as u32 == number).unwrap_or(Code::Failed)
}

/// Where a worker's misdeeds are recorded.
#[derive(Clone)]
pub struct Accounts {
    pub records: Arc<Records>,
    pub digest: String,
    pub name: String,
}

/// A plugin's instance in a process of its own.
pub struct Worker {
    state: Mutex<State>,
    accounts: Accounts,
    memory_bytes: u64,
    silence_max: Duration,
    gone: Arc<AtomicBool>,
}

/// Which adapters' factors a worker has, so that they cross once, and their bytes.
#[derive(Default)]
pub struct Known {
    digests: HashSet<String>,
    bytes: u64,
}

struct State {
    known: Known,
    child: Child,
    wire: Wire,
    /// Resident bytes before the first request.
    baseline: u64,
    /// Why there is no worker any more.
    gone: Option<String>,
}

impl Worker {
    /// Starts a worker and has it make an instance with `settings`.
    /// Returns it with the settings in full.
    pub fn start(
        found: &Found,
        settings: &Value,
        accounts: Accounts,
        silence_max: Duration,
    ) -> super::Result<(Self, Value)> {
        let program = helper::program()?;
        let failed = |e: io::Error| PluginError::Host { path: program.clone(), reason: e.to_string() };
        let (ours, theirs) = UnixStream::pair().map_err(failed)?;
        let memory = memfd_create("blocklora-plugin", MemfdFlags::CLOEXEC).map_err(|e| failed(e.into()))?;
        let memory = File::from(memory);
        let child = Command::new(&program)
            .arg(child::COMMAND)
            .arg(&found.path)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::from(memory.try_clone().map_err(failed)?))
            .stderr(Stdio::null())
            // Ctrl-C on the terminal is for the program that the user sees, which ends its workers itself.
            .process_group(0)
            .spawn()
            .map_err(failed)?;
        ours.set_read_timeout(Some(LOOK)).map_err(failed)?;
        let state = State { known: Known::default(), child, wire: Wire::host(ours, memory), baseline: 0, gone: None };
        let memory_bytes = found.manifest.memory_mib << 20;
        let gone = Arc::default();
        let worker = Self { state: Mutex::new(state), accounts, memory_bytes, silence_max, gone };
        let opened = worker.run(&Request::Open(settings.clone()), &Payload::default(), &mut Services::none());
        let (answer, _) = opened.map_err(|e| match e.code {
            Code::InvalidConfig => PluginError::Settings { name: worker.accounts.name.clone(), reason: e.message },
            _ => PluginError::Crashed { name: worker.accounts.name.clone(), reason: e.message },
        })?;
        let mut state = worker.lock();
        state.baseline = resident(&state.child).unwrap_or(0);
        drop(state);
        match answer {
            Answer::Open(settings) => Ok((worker, settings)),
            _ => Err(PluginError::Crashed { name: worker.accounts.name.clone(), reason: unexpected().message }),
        }
    }

    /// Set when the process has ended.
    pub fn gone(&self) -> Arc<AtomicBool> {
        self.gone.clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Asks for `request` and serves the plugin's calls until it is done.
    fn run(&self, request: &Request, payload: &Payload, services: &mut Services<'_>) -> Result<(Answer, Payload)> {
        self.run_in(&mut self.lock(), request, payload, services)
    }

    fn run_in(
        &self,
        state: &mut State,
        request: &Request,
        payload: &Payload,
        services: &mut Services<'_>,
    ) -> Result<(Answer, Payload)> {
        let State { child, wire, baseline, gone, .. } = state;
        if let Some(reason) = gone {
            return Err(Error::new(Code::Failed, reason.clone()));
        }
        let limit = baseline.saturating_add(self.memory_bytes + ALLOWANCE_BYTES);
        let mut result = wire.send(request, payload);
        // How long the worker, not its host, has worked since the job was to end.
        let (mut ignored, ignored_max) = (Duration::ZERO, IGNORED_MAX.min(self.silence_max));
        loop {
            let began = Instant::now();
            let limit = limit.saturating_add(4 * wire.sent_bytes);
            let was_to_end = services.is_to_end();
            let (mut overrun, mut goes_on) = (None, false);
            let mut look = || {
                let took = resident(child).unwrap_or(0);
                overrun = if *baseline > 0 && took > limit {
                    Some(format!(
                        "took {} MiB of memory where its manifest declares {}",
                        took >> 20,
                        self.memory_bytes >> 20
                    ))
                } else if began.elapsed() > self.silence_max {
                    Some(format!("did not answer for {} seconds", self.silence_max.as_secs()))
                } else {
                    None
                };
                goes_on = services.is_to_end() && ignored + began.elapsed() > ignored_max;
                if overrun.is_some() || goes_on { Err(ErrorKind::TimedOut.into()) } else { Ok(()) }
            };
            let received = match result {
                Ok(()) => wire.receive::<Call>(&mut look),
                Err(error) => Err(error),
            };
            if was_to_end {
                ignored += began.elapsed();
            }
            if goes_on || ignored > ignored_max {
                // Nobody waits for its work, so that this is no misdeed; but others wait for the device.
                drop(child.kill());
                drop(child.wait());
                *gone = Some("it went on when its job was to end; its worker process was killed".to_owned());
                self.gone.store(true, Ordering::Relaxed);
                return Err(Error::cancelled());
            }
            let (call, numbers) = match received {
                Ok(received) => received,
                Err(error) => {
                    let reason = self.bury(child, overrun, &error);
                    *gone = Some(reason.clone());
                    self.gone.store(true, Ordering::Relaxed);
                    return Err(Error::new(Code::Failed, reason));
                }
            };
            match call {
                Call::Done(answer) => return Ok((answer, numbers)),
                Call::Failed(code, message) => return Err(Error::new(code_of(code), message)),
                call => {
                    let (reply, numbers) = services.serve(call, numbers);
                    result = wire.send(&reply, &numbers);
                }
            }
        }
    }

    /// Ends the worker and finds out how it died. A crash, a hang or too much memory quarantines the plugin; that somebody
    /// else ended the process does not. What happened, and what to do.
    fn bury(&self, child: &mut Child, overrun: Option<String>, error: &io::Error) -> String {
        // A process that dies closes its socket first.
        let status = match overrun {
            Some(_) => None,
            None => helper::wait(child, Duration::from_secs(1)).ok().flatten(),
        };
        drop(child.kill());
        let ended = child.wait();
        let reason = match (overrun, status) {
            (Some(reason), _) => format!("{reason}; its worker process was killed"),
            (None, Some(status)) => format!("{} in its worker process", helper::death(status)),
            (None, None) => format!("broke the connection to its worker process ({error}, {ended:?})"),
        };
        let Accounts { records, digest, name } = &self.accounts;
        if status.is_some_and(helper::was_ended) {
            return format!("{reason}: start the job again");
        }
        records.update(digest, |record| {
            record.crashes += 1;
            record.quarantine = Some(reason.clone());
        });
        format!("{reason}; it is quarantined now: {}", PluginError::cure_of_quarantine(name))
    }
}

impl Known {
    /// Forgets everything where `adapters` would be too much with what there is; whether the worker has to, too.
    fn make_room(&mut self, adapters: &[Adapter<'_>]) -> bool {
        let new = adapters.iter().filter(|adapter| !self.digests.contains(adapter.digest));
        let forget = !self.digests.is_empty() && self.bytes + new.map(m::factor_bytes).sum::<u64>() > KNOWN_BYTES_MAX;
        if forget {
            *self = Self::default();
        }
        forget
    }

    fn add(&mut self, adapters: &[Adapter<'_>]) {
        for adapter in adapters {
            if self.digests.insert(adapter.digest.to_owned()) {
                self.bytes += m::factor_bytes(adapter);
            }
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(|poisoned| poisoned.into_inner());
        drop(state.child.kill());
        drop(state.child.wait());
    }
}

/// Resident bytes of a process.
fn resident(child: &Child) -> Option<u64> {
    let statm = std::fs::read_to_string(format!("/proc/{}/statm", child.id())).ok()?;
    let pages: u64 = statm.split_whitespace().nth(1)?.parse().ok()?;
    Some(pages * rustix::param::page_size() as u64)
}

fn broken(error: io::Error) -> Error {
    Error::contract(format!("the plugin's worker answered something else: {error}"))
}

fn unexpected() -> Error {
    Error::contract("the plugin's worker answered something else")
}

impl AnyMergeStrategy for Worker {
    fn plan(&self, job: &dyn Job, layers: &[Layer], adapters: &[Adapter<'_>]) -> Result<Plan> {
        let mut payload = Payload::default();
        let mut state = self.lock();
        let forget = state.known.make_room(adapters);
        let known = |digest: &str| state.known.digests.contains(digest);
        let wire = m::put_adapters(adapters, 0..layers.len(), known, &mut payload);
        let request = Request::Plan { layers: m::wire_layers(layers), adapters: wire, forget };
        // On an error there may be no worker any more, and then nobody asks for what it knows.
        state.known.add(adapters);
        let (answer, mut numbers) = self.run_in(&mut state, &request, &payload, &mut job_services(job))?;
        drop(state);
        let Answer::Plan(plan) = answer else { return Err(unexpected()) };
        if plan.len() != layers.len() {
            return Err(Error::contract(format!("the strategy planned {} layers of {}", plan.len(), layers.len())));
        }
        let mut layer = |terms: Option<Vec<(usize, u32, bool)>>| {
            let Some(terms) = terms else { return Ok(LayerPlan::Dense(numbers.take()?)) };
            let term = |(adapter, c, is_per_row)| {
                let coefficients = match is_per_row {
                    true => Coefficients::PerRow(numbers.take()?),
                    false => Coefficients::Uniform(f32::from_bits(c)),
                };
                Ok(Term { adapter, coefficients })
            };
            terms.into_iter().map(term).collect::<io::Result<_>>().map(LayerPlan::Factored)
        };
        plan.into_iter().map(&mut layer).collect::<io::Result<_>>().map_err(broken)
    }

    fn fill(&self, tile: &Tile<'_>, delta: &mut [f32]) -> Result<()> {
        let mut payload = Payload::default();
        payload.put(tile.numbers);
        let mut state = self.lock();
        let known = |digest: &str| state.known.digests.contains(digest);
        let request = Request::Fill {
            index: tile.index,
            layer: m::wire_layer(tile.layer),
            first_row: tile.rows.start,
            rows: tile.rows.len(),
            adapters: m::put_adapters(tile.adapters, tile.index..tile.index + 1, known, &mut payload),
        };
        let (_, mut numbers) = self.run_in(&mut state, &request, &payload, &mut Services::none())?;
        drop(state);
        numbers.take_into(delta).map_err(broken)
    }
}

impl AnySampler for Worker {
    fn sample(&self, denoiser: &mut dyn Denoiser, latents: &mut [f32], steps: usize) -> Result<()> {
        let mut payload = Payload::default();
        let schedule = m::put_schedule(denoiser.schedule(), &mut payload);
        payload.put(latents);
        let request = Request::Sample { schedule, shape: denoiser.shape(), seed: denoiser.seed(), steps };
        let mut services = serve::sample_services(denoiser, latents.len());
        let (_, mut numbers) = self.run(&request, &payload, &mut services)?;
        numbers.take_into(latents).map_err(broken)?;
        match latents.iter().find(|x| !x.is_finite()) {
            Some(&value) => Err(Error::not_finite("a latent of the picture", value, steps)),
            None => Ok(()),
        }
    }
}

impl AnyTrainer for Worker {
    fn plan(&self, concept: &Concept) -> Result<TrainPlan> {
        let request = Request::TrainPlan(m::wire_concept(concept));
        match self.run(&request, &Payload::default(), &mut Services::none())? {
            (Answer::TrainPlan(plan), _) => Ok(m::train_plan(plan)),
            _ => Err(unexpected()),
        }
    }

    fn train(&self, host: &mut dyn TrainHost) -> Result<Parameters> {
        let layers = host.layers().to_vec();
        let request = Request::Train(m::WireHost {
            concept: m::wire_concept(host.concept()),
            layers: m::wire_layers(&layers),
            captions: host.captions().to_vec(),
            latent_shape: host.latent_shape(),
            cross_attention_layers: host.cross_attention_layers(),
            num_train_timesteps: host.num_train_timesteps(),
            seed: host.seed(),
        });
        let (answer, mut numbers) = self.run(&request, &Payload::default(), &mut serve::train_services(host))?;
        let Answer::Parameters(parameters) = answer else { return Err(unexpected()) };
        let parameters = m::take_parameters(parameters, &mut numbers).map_err(broken)?;
        blocklora_sdk::train::check_parameters(&layers, &parameters)?;
        Ok(parameters)
    }
}
