//! A trainer's host across the boundary.

use std::ops::Range;
use std::thread::ThreadId;

use abi_stable::StableAbi;
use abi_stable::prefix_type::WithMetadata;
use abi_stable::staticref;
use abi_stable::std_types::{ROption, RResult, RSlice, RSliceMut, RStr, RVec};

use super::convert;
use super::guard::guard;
use super::host::check_thread;
use super::job::{Context, JobProxy, RawJob, job_by_field};
use super::types::*;
use crate::error::{Code, Error, Result};
use crate::job::Job;
use crate::merge::Layer;
use crate::train::{
    Concept, ErasureMasks, Objective, Parameters, PictureRequest, Sample, TrainHost, TrainState, check_parameters,
    check_step,
};

/// The host's functions for a trainer; [job]: on the thread that `train` was called on, one at a time.
#[repr(C)]
#[derive(StableAbi)]
#[sabi(kind(Prefix(prefix_ref = TrainHostTableRef, prefix_fields = TrainHostTableFields)))]
#[sabi(missing_field(panic))]
pub struct TrainHostTable {
    /// [job] [`TrainHost::embedding`]; the vector is the plugin's.
    pub embedding: extern "C" fn(context: *mut (), word: RStr<'_>) -> RResult<RVec<f32>, RawError>,
    /// [job] [`TrainHost::check_prompt`].
    pub check_prompt: extern "C" fn(context: *mut (), prompt: RStr<'_>, tokens: usize) -> RResult<(), RawError>,
    /// [job] [`TrainHost::generate`]; answers the first index.
    pub generate: extern "C" fn(context: *mut (), RawPictureRequest<'_>) -> RResult<usize, RawError>,
    /// [job] [`TrainHost::loss_and_gradients`].
    pub loss_and_gradients: extern "C" fn(context: *mut (), step: RawStep<'_>) -> RResult<f32, RawError>,
    /// [job] [`TrainHost::resume`]; the state is the plugin's.
    pub resume: extern "C" fn(context: *mut ()) -> RResult<ROption<OwnedState>, RawError>,
    /// [job] [`TrainHost::step_done`].
    #[sabi(last_prefix_field)]
    pub step_done:
        extern "C" fn(context: *mut (), state: RawState<'_>, steps: usize, loss: f32) -> RResult<(), RawError>,
    /// [job] [`TrainHost::drift_and_gradients`]; since 1.1.
    #[sabi(missing_field(option))]
    pub drift_and_gradients: extern "C" fn(context: *mut (), step: RawStep<'_>) -> RResult<f32, RawError>,
}

/// A trainer's host, lent for a call.
#[repr(C)]
#[derive(StableAbi)]
pub struct RawTrainHost<'a> {
    pub(super) job: RawJob<'a>,
    pub(super) concept: RawConcept<'a>,
    pub(super) layers: RSlice<'a, RawLayer<'a>>,
    pub(super) captions: RSlice<'a, ROption<RStr<'a>>>,
    pub(super) latent_shape: [usize; 3],
    pub(super) cross_attention_layers: usize,
    pub(super) num_train_timesteps: usize,
    pub(super) context: *mut (),
    pub(super) table: TrainHostTableRef,
}

/// What a [`RawTrainHost`]'s context points to.
pub struct Lent<'a> {
    host: &'a mut dyn TrainHost,
    thread: ThreadId,
    gradients: Parameters,
}

impl<'a> Lent<'a> {
    pub fn new(host: &'a mut dyn TrainHost) -> Self {
        Self { host, thread: std::thread::current().id(), gradients: Parameters::default() }
    }

    /// Checks what the plugin gave, and writes the gradients where it wants them.
    fn step(&mut self, step: RawStep<'_>, objective: Objective) -> Result<f32> {
        let parameters = convert::parameters(&step.parameters);
        check_parameters(self.host.layers(), &parameters)?;
        let batch: Vec<Sample> = step.batch.iter().map(convert::sample).collect();
        let masks: ErasureMasks = step.masks.iter().map(|mask| mask.to_vec()).collect();
        check_step(self.host.latent_shape(), &parameters, &masks, &batch)?;
        let value = objective.ask(self.host, &parameters, &masks, &batch, &mut self.gradients)?;
        let mut written = step.gradients;
        if written.len() != self.gradients.tensors().count() {
            return Err(Error::contract(format!("{} gradients asked for", written.len())));
        }
        for (out, gradient) in written.iter_mut().zip(self.gradients.tensors()) {
            if out.len() != gradient.len() {
                return Err(Error::contract(format!("a gradient of {} for {} numbers", out.len(), gradient.len())));
            }
            out.copy_from_slice(gradient);
        }
        Ok(value)
    }
}

/// The context is a [`Lent`].
struct TrainJob;

impl Context for TrainJob {
    unsafe fn job<'a>(context: *const ()) -> &'a dyn Job {
        // SAFETY: by the contract of the trait.
        let lent = unsafe { &*context.cast::<Lent<'a>>() };
        lent.host
    }
}

impl<'a> RawTrainHost<'a> {
    /// The captions, to be lent in [`Self::lend`].
    pub fn captions(captions: &[Option<String>]) -> Vec<ROption<RStr<'_>>> {
        captions.iter().map(|c| c.as_deref().map(RStr::from).into()).collect()
    }

    /// Lends `lent` for a call.
    pub fn lend(
        lent: &'a mut Lent<'_>,
        concept: &'a Concept,
        layers: &'a [RawLayer<'a>],
        captions: &'a [ROption<RStr<'a>>],
    ) -> Self {
        let latent_shape = lent.host.latent_shape();
        let cross_attention_layers = lent.host.cross_attention_layers();
        let num_train_timesteps = lent.host.num_train_timesteps();
        let context = std::ptr::from_mut(lent).cast::<()>();
        Self {
            job: RawJob::with_context::<TrainJob>(context),
            concept: convert::raw_concept(concept),
            layers: layers.into(),
            captions: captions.into(),
            latent_shape,
            cross_attention_layers,
            num_train_timesteps,
            context,
            table: TrainHostTableRef(Host::TABLE.as_prefix()),
        }
    }
}

struct Host;

impl Host {
    staticref!(const TABLE: WithMetadata<TrainHostTable> = WithMetadata::new(TrainHostTable {
        embedding: Self::embedding,
        check_prompt: Self::check_prompt,
        generate: Self::generate,
        loss_and_gradients: Self::loss_and_gradients,
        resume: Self::resume,
        step_done: Self::step_done,
        drift_and_gradients: Self::drift_and_gradients,
    }));

    /// # Safety
    /// `context` comes from a [`RawTrainHost`] whose call has not ended, and no other of its functions is running.
    unsafe fn lent<'a>(context: *mut ()) -> Result<&'a mut Lent<'a>> {
        // SAFETY: by the contract above.
        let lent = unsafe { &mut *context.cast::<Lent<'a>>() };
        check_thread(lent.thread)?;
        Ok(lent)
    }

    extern "C" fn embedding(context: *mut (), word: RStr<'_>) -> RResult<RVec<f32>, RawError> {
        // SAFETY: the context is that of the call under way, here and below.
        guard(|| unsafe { Self::lent(context)? }.host.embedding(word.as_str()).map(Into::into))
    }
    extern "C" fn check_prompt(context: *mut (), prompt: RStr<'_>, tokens: usize) -> RResult<(), RawError> {
        // SAFETY: as above.
        guard(|| unsafe { Self::lent(context)? }.host.check_prompt(prompt.as_str(), tokens))
    }
    extern "C" fn generate(context: *mut (), request: RawPictureRequest<'_>) -> RResult<usize, RawError> {
        guard(|| {
            // SAFETY: as above.
            let lent = unsafe { Self::lent(context)? };
            Ok(lent.host.generate(&convert::picture_request(&request))?.start)
        })
    }
    extern "C" fn loss_and_gradients(context: *mut (), step: RawStep<'_>) -> RResult<f32, RawError> {
        // SAFETY: as above.
        guard(|| unsafe { Self::lent(context)? }.step(step, Objective::Loss))
    }
    extern "C" fn drift_and_gradients(context: *mut (), step: RawStep<'_>) -> RResult<f32, RawError> {
        // SAFETY: as above.
        guard(|| unsafe { Self::lent(context)? }.step(step, Objective::Drift))
    }
    extern "C" fn resume(context: *mut ()) -> RResult<ROption<OwnedState>, RawError> {
        // SAFETY: as above.
        guard(|| Ok(unsafe { Self::lent(context)? }.host.resume()?.map(convert::give_state).into()))
    }
    extern "C" fn step_done(context: *mut (), state: RawState<'_>, steps: usize, loss: f32) -> RResult<(), RawError> {
        guard(|| {
            // SAFETY: as above.
            let lent = unsafe { Self::lent(context)? };
            let copy = || TrainState {
                step: state.step,
                parameters: convert::parameters(&state.parameters),
                optimiser: state.optimiser.iter().map(|tensor| tensor.to_vec()).collect(),
            };
            lent.host.step_done_with(state.step, &copy, steps, loss)
        })
    }
}

/// A trainer's host, on the plugin's side.
pub struct Proxy<'a> {
    job: JobProxy<'a>,
    concept: Concept,
    layers: Vec<Layer>,
    captions: Vec<Option<String>>,
    latent_shape: [usize; 3],
    cross_attention_layers: usize,
    num_train_timesteps: usize,
    context: *mut (),
    table: TrainHostTableRef,
}

// SAFETY: `Job` asks for it; the context is used on the thread of the call only, which the host checks.
unsafe impl Sync for Proxy<'_> {}

job_by_field!(Proxy<'_>);

impl<'a> Proxy<'a> {
    pub fn new(raw: RawTrainHost<'a>) -> Result<Self> {
        let caption = |c: &ROption<RStr<'a>>| match c {
            ROption::RSome(c) => Some(c.as_str().to_owned()),
            ROption::RNone => None,
        };
        Ok(Self {
            job: JobProxy(raw.job),
            concept: convert::concept(&raw.concept)?,
            layers: convert::layers(raw.layers),
            captions: raw.captions.iter().map(caption).collect(),
            latent_shape: raw.latent_shape,
            cross_attention_layers: raw.cross_attention_layers,
            num_train_timesteps: raw.num_train_timesteps,
            context: raw.context,
            table: raw.table,
        })
    }

    /// One call of a function that takes a step.
    fn step(
        &self,
        function: extern "C" fn(*mut (), RawStep<'_>) -> RResult<f32, RawError>,
        parameters: &Parameters,
        masks: &ErasureMasks,
        batch: &[Sample],
        gradients: &mut Parameters,
    ) -> Result<f32> {
        let fits = gradients.tensors().map(Vec::len).eq(parameters.tensors().map(Vec::len));
        if !fits {
            gradients.clone_from(parameters);
        }
        let (factors, tokens) = (convert::raw_layer_factors(parameters), convert::raw_tokens(parameters));
        let masks: Vec<RSlice<'_, f32>> = masks.iter().map(|mask| mask.as_slice().into()).collect();
        let batch = convert::raw_samples(batch);
        let mut out: Vec<RSliceMut<'_, f32>> = gradients.tensors_mut().map(|t| t.as_mut_slice().into()).collect();
        let step = RawStep {
            parameters: RawParameters { factors: factors.as_slice().into(), tokens: tokens.as_slice().into() },
            masks: masks.as_slice().into(),
            batch: batch.as_slice().into(),
            gradients: out.as_mut_slice().into(),
        };
        Ok(function(self.context, step).into_result()?)
    }
}

impl TrainHost for Proxy<'_> {
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
        Ok(self.table.embedding()(self.context, word.into()).into_result()?.into())
    }
    fn check_prompt(&self, prompt: &str, tokens: usize) -> Result<()> {
        Ok(self.table.check_prompt()(self.context, prompt.into(), tokens).into_result()?)
    }
    fn generate(&mut self, request: &PictureRequest) -> Result<Range<usize>> {
        let start = self.table.generate()(self.context, convert::raw_picture_request(request)).into_result()?;
        Ok(start..start + request.count)
    }
    fn loss_and_gradients(
        &mut self,
        parameters: &Parameters,
        masks: &ErasureMasks,
        batch: &[Sample],
        gradients: &mut Parameters,
    ) -> Result<f32> {
        self.step(self.table.loss_and_gradients(), parameters, masks, batch, gradients)
    }
    fn drift_and_gradients(
        &mut self,
        parameters: &Parameters,
        masks: &ErasureMasks,
        batch: &[Sample],
        gradients: &mut Parameters,
    ) -> Result<f32> {
        let Some(function) = self.table.drift_and_gradients() else {
            let reason = "this release of BlockLoRA has the ABI 1.0, without drift: install a newer one";
            return Err(Error::new(Code::NotSupported, reason));
        };
        self.step(function, parameters, masks, batch, gradients)
    }
    fn resume(&mut self) -> Result<Option<TrainState>> {
        let state = self.table.resume()(self.context).into_result()?;
        Ok(state.into_option().map(convert::take_state))
    }
    fn step_done(&mut self, state: &TrainState, steps: usize, loss: f32) -> Result<()> {
        let factors = convert::raw_layer_factors(&state.parameters);
        let tokens = convert::raw_tokens(&state.parameters);
        let optimiser: Vec<RSlice<'_, f32>> = state.optimiser.iter().map(|t| t.as_slice().into()).collect();
        let state = RawState {
            step: state.step,
            parameters: RawParameters { factors: factors.as_slice().into(), tokens: tokens.as_slice().into() },
            optimiser: optimiser.as_slice().into(),
        };
        Ok(self.table.step_done()(self.context, state, steps, loss).into_result()?)
    }
}
