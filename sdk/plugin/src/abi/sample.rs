//! Samplers across the boundary.

use std::marker::PhantomData;
use std::thread::ThreadId;

use abi_stable::StableAbi;
use abi_stable::prefix_type::WithMetadata;
use abi_stable::staticref;
use abi_stable::std_types::{RResult, RSlice, RSliceMut};

use super::convert;
use super::guard::guard;
use super::host::{Instance, check_thread};
use super::instance::RawInstance;
use super::job::{Context, JobProxy, RawJob, job_by_field};
use super::types::{RawError, RawSchedule};
use crate::error::{Error, Result};
use crate::job::Job;
use crate::sample::{AnySampler, Denoiser, NoiseSchedule, Sampler};

/// The functions of a sampler.
#[repr(C)]
#[derive(StableAbi)]
#[sabi(kind(Prefix(prefix_ref = SampleTableRef, prefix_fields = SampleTableFields)))]
#[sabi(missing_field(panic))]
pub struct SampleTable {
    /// [job] [`Sampler::sample`].
    #[sabi(last_prefix_field)]
    pub sample: extern "C" fn(
        RawInstance,
        denoiser: RawDenoiser<'_>,
        latents: RSliceMut<'_, f32>,
        steps: usize,
    ) -> RResult<(), RawError>,
}

/// The host's functions for a sampler; [job]: on the thread that `sample` was called on, one at a time.
#[repr(C)]
#[derive(StableAbi)]
#[sabi(kind(Prefix(prefix_ref = DenoiserTableRef, prefix_fields = DenoiserTableFields)))]
#[sabi(missing_field(panic))]
pub struct DenoiserTable {
    /// [job] [`Denoiser::predict`].
    pub predict: extern "C" fn(
        context: *mut (),
        latents: RSlice<'_, f32>,
        timestep: f32,
        eps: RSliceMut<'_, f32>,
    ) -> RResult<(), RawError>,
    /// [job] [`Denoiser::noise`].
    pub noise: extern "C" fn(context: *mut (), index: usize, out: RSliceMut<'_, f32>) -> RResult<(), RawError>,
    /// [job] [`Denoiser::step_done`].
    #[sabi(last_prefix_field)]
    pub step_done:
        extern "C" fn(context: *mut (), step: usize, steps: usize, latents: RSlice<'_, f32>) -> RResult<(), RawError>,
}

/// A denoiser, lent for a call.
#[repr(C)]
#[derive(StableAbi)]
pub struct RawDenoiser<'a> {
    pub(super) job: RawJob<'a>,
    pub(super) schedule: RawSchedule<'a>,
    pub(super) shape: [usize; 4],
    pub(super) context: *mut (),
    pub(super) table: DenoiserTableRef,
}

/// What a [`RawDenoiser`]'s context points to.
struct Lent<'a> {
    denoiser: &'a mut dyn Denoiser,
    len: usize,
    thread: ThreadId,
}

/// The context is a [`Lent`].
struct DenoiserJob;

impl Context for DenoiserJob {
    unsafe fn job<'a>(context: *const ()) -> &'a dyn Job {
        // SAFETY: by the contract of the trait.
        let lent = unsafe { &*context.cast::<Lent<'a>>() };
        lent.denoiser
    }
}

struct Host;

impl Host {
    staticref!(const TABLE: WithMetadata<DenoiserTable> = WithMetadata::new(DenoiserTable {
        predict: Self::predict,
        noise: Self::noise,
        step_done: Self::step_done,
    }));

    /// The denoiser behind `context`, if this is its thread and `lens` are the latents' length.
    ///
    /// # Safety
    /// `context` comes from a [`RawDenoiser`] whose call has not ended, and no other of its functions is running.
    unsafe fn denoiser<'a>(context: *mut (), lens: &[usize]) -> Result<&'a mut dyn Denoiser> {
        // SAFETY: by the contract above.
        let lent = unsafe { &mut *context.cast::<Lent<'a>>() };
        check_thread(lent.thread)?;
        match lens.iter().find(|&&len| len != lent.len) {
            Some(len) => Err(Error::contract(format!("the sampler gave {len} numbers for {} latents", lent.len))),
            None => Ok(lent.denoiser),
        }
    }

    extern "C" fn predict(
        context: *mut (),
        latents: RSlice<'_, f32>,
        timestep: f32,
        eps: RSliceMut<'_, f32>,
    ) -> RResult<(), RawError> {
        guard(|| {
            // SAFETY: the context is that of the call under way, here and below.
            let denoiser = unsafe { Self::denoiser(context, &[latents.len(), eps.len()])? };
            let last = denoiser.schedule().num_train_timesteps() as f32;
            if !(0.0..=last).contains(&timestep) {
                return Err(Error::contract(format!("the sampler asked for timestep {timestep}, not in 0..{last}")));
            }
            denoiser.predict(latents.as_slice(), timestep, eps.into_mut_slice())
        })
    }
    extern "C" fn noise(context: *mut (), index: usize, out: RSliceMut<'_, f32>) -> RResult<(), RawError> {
        guard(|| {
            // SAFETY: as above.
            unsafe { Self::denoiser(context, &[out.len()])? }.noise(index, out.into_mut_slice());
            Ok(())
        })
    }
    extern "C" fn step_done(
        context: *mut (),
        step: usize,
        steps: usize,
        latents: RSlice<'_, f32>,
    ) -> RResult<(), RawError> {
        guard(|| {
            // SAFETY: as above.
            unsafe { Self::denoiser(context, &[latents.len()])? }.step_done(step, steps, latents.as_slice())
        })
    }
}

/// A denoiser of the host's, on the plugin's side.
struct Proxy<'a> {
    job: JobProxy<'a>,
    schedule: NoiseSchedule,
    shape: [usize; 4],
    context: *mut (),
    table: DenoiserTableRef,
    /// Why `noise`, which has no result, failed; the next call says so.
    failed: Option<Error>,
}

impl Proxy<'_> {
    fn check(&mut self) -> Result<()> {
        self.failed.take().map_or(Ok(()), Err)
    }
}

// SAFETY: `Job` asks for it; the context is used through `&mut self` only, so on one thread at a time, and the host
// checks that it is the right one.
unsafe impl Sync for Proxy<'_> {}

job_by_field!(Proxy<'_>);

impl Denoiser for Proxy<'_> {
    fn schedule(&self) -> &NoiseSchedule {
        &self.schedule
    }
    fn shape(&self) -> [usize; 4] {
        self.shape
    }
    fn predict(&mut self, latents: &[f32], timestep: f32, eps: &mut [f32]) -> Result<()> {
        self.check()?;
        Ok(self.table.predict()(self.context, latents.into(), timestep, eps.into()).into_result()?)
    }
    fn noise(&mut self, index: usize, out: &mut [f32]) {
        if let Err(error) = self.table.noise()(self.context, index, out.into()).into_result() {
            self.failed = Some(error.into());
        }
    }
    fn step_done(&mut self, step: usize, steps: usize, latents: &[f32]) -> Result<()> {
        self.check()?;
        Ok(self.table.step_done()(self.context, step, steps, latents.into()).into_result()?)
    }
}

/// The plugin's side.
pub struct Plugin<S>(PhantomData<S>);

impl<S: Sampler + 'static> Plugin<S> {
    staticref!(const TABLE: WithMetadata<SampleTable> = WithMetadata::new(SampleTable { sample: Self::sample }));
    /// The functions.
    pub const REF: SampleTableRef = SampleTableRef(Self::TABLE.as_prefix());

    extern "C" fn sample(
        instance: RawInstance,
        denoiser: RawDenoiser<'_>,
        latents: RSliceMut<'_, f32>,
        steps: usize,
    ) -> RResult<(), RawError> {
        guard(|| {
            // SAFETY: the host gives back what `create` of this plugin made.
            let sampler = unsafe { instance.get::<S>() };
            let RawDenoiser { job, schedule, shape, context, table } = denoiser;
            let schedule = convert::schedule(&schedule)?;
            let mut proxy = Proxy { job: JobProxy(job), schedule, shape, context, table, failed: None };
            Sampler::sample(sampler, &mut proxy, latents.into_mut_slice(), steps)?;
            proxy.check()
        })
    }
}

/// The host's side: a sampler in a library.
pub struct Remote {
    pub instance: Instance,
    pub table: SampleTableRef,
}

impl AnySampler for Remote {
    fn sample(&self, denoiser: &mut dyn Denoiser, latents: &mut [f32], steps: usize) -> Result<()> {
        let schedule = denoiser.schedule().clone();
        let shape = denoiser.shape();
        if shape.iter().product::<usize>() != latents.len() {
            return Err(Error::contract(format!("{} latents for the shape {shape:?}", latents.len())));
        }
        let mut lent = Lent { denoiser, len: latents.len(), thread: std::thread::current().id() };
        let context = std::ptr::from_mut(&mut lent).cast::<()>();
        let raw = RawDenoiser {
            job: RawJob::with_context::<DenoiserJob>(context),
            schedule: convert::raw_schedule(&schedule),
            shape,
            context,
            table: DenoiserTableRef(Host::TABLE.as_prefix()),
        };
        self.table.sample()(self.instance.raw(), raw, latents.into(), steps).into_result().map_err(Error::from)?;
        match latents.iter().find(|x| !x.is_finite()) {
            Some(&value) => Err(Error::not_finite("a latent of the picture", value, steps)),
            None => Ok(()),
        }
    }
}
