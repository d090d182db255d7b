//! What a worker and its host say to each other.

use std::collections::HashMap;
use std::io::Result;
use std::sync::Arc;

use blocklora_sdk::merge::{Adapter, Factors, Layer};
use blocklora_sdk::sample::{NoiseSchedule, TimestepSpacing};
use blocklora_sdk::train::{Concept, LayerFactors, Parameters, Placement, Sample, TokenFactors, TrainPlan, TrainState};
use blocklora_sdk::{Delta, Kind, Partition};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::wire::{Payload, invalid};

/// Floats as their bits: JSON has no NaN and no infinity, and what is wrong with a number is to be said, not lost.
mod bits {
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(value: &f32, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u32(value.to_bits())
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f32, D::Error> {
        u32::deserialize(deserializer).map(f32::from_bits)
    }
}

/// What the host asks for.
#[derive(Debug, Serialize, Deserialize)]
pub enum Request {
    /// To load the plugin of the worker's manifest and make an instance with these settings.
    Open(Value),
    /// A plan; the factors of adapters that the worker does not know follow. It keeps them; with `forget` those from before
    /// go first.
    Plan { layers: Vec<WireLayer>, adapters: Vec<WireAdapter>, forget: bool },
    /// The change of some rows; the numbers follow, and the factors on this layer of adapters that the worker does not know.
    Fill { index: usize, layer: WireLayer, first_row: usize, rows: usize, adapters: Vec<WireAdapter> },
    /// A sample; the schedule and the latents follow.
    Sample { schedule: WireSchedule, shape: [usize; 4], seed: u64, steps: usize },
    /// What an adapter file will say.
    TrainPlan(WireConcept),
    /// A training.
    Train(WireHost),
}

/// What the worker asks for in the middle of a request, or its answer.
#[derive(Debug, Serialize, Deserialize)]
pub enum Call {
    Progress(u64, u64),
    IsCancelled,
    Log(u32, String),
    Artefact(String),
    Predict(#[serde(with = "bits")] f32),
    Noise(usize, usize),
    StepDone(usize, usize),
    Embedding(String),
    CheckPrompt(String, usize),
    Generate {
        prompt: String,
        count: usize,
        steps: usize,
        #[serde(with = "bits")]
        guidance_scale: f32,
    },
    Loss {
        /// The drift from the model as it is, not the loss.
        drift: bool,
        parameters: WireParameters,
        masks: usize,
        batch: Vec<WireSample>,
    },
    Resume,
    TrainStepDone {
        state: WireState,
        steps: usize,
        #[serde(with = "bits")]
        loss: f32,
    },
    /// The request is done; numbers follow.
    Done(Answer),
    /// The request failed: code and message.
    Failed(u32, String),
}

/// A request's answer.
#[derive(Debug, Serialize, Deserialize)]
pub enum Answer {
    Nothing,
    /// The settings in full.
    Open(Value),
    /// For each layer: None for dense (its numbers follow), else (adapter, the coefficient's bits, whether
    /// per-row ones follow).
    Plan(Vec<Option<Vec<(usize, u32, bool)>>>),
    TrainPlan(WireTrainPlan),
    Parameters(WireParameters),
}

/// The host's answer to a call.
#[derive(Debug, Serialize, Deserialize)]
pub enum Reply {
    Nothing,
    Flag(bool),
    Index(usize),
    Loss(#[serde(with = "bits")] f32),
    State(Option<WireState>),
    /// Code and message.
    Failed(u32, String),
}

pub type WireLayer = (String, usize, usize);

pub fn wire_layers(layers: &[Layer]) -> Vec<WireLayer> {
    layers.iter().map(wire_layer).collect()
}

pub fn wire_layer(layer: &Layer) -> WireLayer {
    (layer.name.clone(), layer.rows, layer.columns)
}

pub fn layer((name, rows, columns): WireLayer) -> Layer {
    Layer { name, rows, columns }
}

/// An adapter; `factors` has the (layer, rank, scale's bits) of each layer that it changes, None if the worker knows them.
#[derive(Debug, Serialize, Deserialize)]
pub struct WireAdapter {
    name: String,
    digest: String,
    #[serde(with = "bits")]
    weight: f32,
    factors: Option<Vec<(usize, usize, u32)>>,
    layers: usize,
}

/// Puts `adapters`, with their factors on `layers` where they are not `known`.
pub fn put_adapters(
    adapters: &[Adapter<'_>],
    layers: std::ops::Range<usize>,
    known: impl Fn(&str) -> bool,
    payload: &mut Payload,
) -> Vec<WireAdapter> {
    let wire = |adapter: &Adapter<'_>| {
        let mut put = |index: usize| {
            let f = adapter.factors(index)?;
            payload.put(f.a);
            payload.put(f.b);
            payload.put_rows(f.rows);
            Some((index, f.rank, f.scale.to_bits()))
        };
        let factors = (!known(adapter.digest)).then(|| layers.clone().filter_map(&mut put).collect());
        let (name, digest) = (adapter.name.to_owned(), adapter.digest.to_owned());
        WireAdapter { name, digest, weight: adapter.weight, factors, layers: layers.end }
    };
    adapters.iter().map(wire).collect()
}

/// The memory that an adapter's factors take.
pub fn factor_bytes(adapter: &Adapter<'_>) -> u64 {
    let numbers = adapter.factors_by_layer().flatten().map(|f| f.a.len() + f.b.len() + f.rows.len());
    4 * numbers.sum::<usize>() as u64
}

/// The factors of an adapter on some layers.
pub struct OwnedFactors(Vec<OwnedLayer>);

struct OwnedLayer {
    index: usize,
    rank: usize,
    scale: f32,
    a: Vec<f32>,
    b: Vec<f32>,
    rows: Vec<u32>,
}

/// The adapters whose factors a worker keeps, by digest.
pub type KeptFactors = HashMap<String, Arc<OwnedFactors>>;

/// An adapter that owns its factors, or shares them with what the worker keeps.
pub struct OwnedAdapter {
    head: WireAdapter,
    factors: Arc<OwnedFactors>,
}

pub fn take_adapters(heads: Vec<WireAdapter>, kept: &KeptFactors, payload: &mut Payload) -> Result<Vec<OwnedAdapter>> {
    let mut owned = |head: WireAdapter| {
        let mut layer = |&(index, rank, scale): &(usize, usize, u32)| {
            let (a, b, rows) = (payload.take()?, payload.take()?, payload.take_rows()?);
            Ok(OwnedLayer { index, rank, scale: f32::from_bits(scale), a, b, rows })
        };
        let factors = match &head.factors {
            Some(layers) => Arc::new(OwnedFactors(layers.iter().map(&mut layer).collect::<Result<_>>()?)),
            None => kept.get(&head.digest).cloned().ok_or_else(|| invalid("an adapter is not known"))?,
        };
        Ok(OwnedAdapter { head, factors })
    };
    heads.into_iter().map(&mut owned).collect()
}

impl OwnedAdapter {
    pub fn keep(&self, kept: &mut KeptFactors) {
        kept.insert(self.head.digest.clone(), self.factors.clone());
    }

    pub fn view(&self) -> Adapter<'_> {
        let mut factors = vec![None; self.head.layers];
        // Those beyond are not asked for: a tile needs the layers up to its own.
        for OwnedLayer { index, rank, scale, a, b, rows } in &self.factors.0 {
            if let Some(place) = factors.get_mut(*index) {
                *place = Some(Factors { a, b, rows, rank: *rank, scale: *scale });
            }
        }
        Adapter::new(&self.head.name, &self.head.digest, self.head.weight, factors)
    }
}

/// A noise schedule; its alphas_cumprod follow.
#[derive(Debug, Serialize, Deserialize)]
pub struct WireSchedule {
    steps_offset: usize,
    set_alpha_to_one: bool,
    spacing: u8,
}

pub fn put_schedule(schedule: &NoiseSchedule, payload: &mut Payload) -> WireSchedule {
    payload.put(&schedule.alphas_cumprod);
    let spacing = match schedule.spacing {
        TimestepSpacing::Leading => 0,
        TimestepSpacing::Linspace => 1,
        TimestepSpacing::Trailing => 2,
    };
    WireSchedule { steps_offset: schedule.steps_offset, set_alpha_to_one: schedule.set_alpha_to_one, spacing }
}

pub fn take_schedule(wire: &WireSchedule, payload: &mut Payload) -> Result<NoiseSchedule> {
    let spacings = [TimestepSpacing::Leading, TimestepSpacing::Linspace, TimestepSpacing::Trailing];
    Ok(NoiseSchedule {
        alphas_cumprod: payload.take()?,
        steps_offset: wire.steps_offset,
        set_alpha_to_one: wire.set_alpha_to_one,
        spacing: *spacings.get(usize::from(wire.spacing)).ok_or_else(|| invalid("unknown spacing"))?,
    })
}

/// A concept.
#[derive(Debug, Serialize, Deserialize)]
pub struct WireConcept {
    name: String,
    class_word: String,
    kind: Kind,
}

pub fn wire_concept(concept: &Concept) -> WireConcept {
    WireConcept { name: concept.name.clone(), class_word: concept.class_word.clone(), kind: concept.kind }
}

pub fn concept(wire: WireConcept) -> Concept {
    Concept { name: wire.name, class_word: wire.class_word, kind: wire.kind }
}

/// What a trainer's host knows from the start.
#[derive(Debug, Serialize, Deserialize)]
pub struct WireHost {
    pub concept: WireConcept,
    pub layers: Vec<WireLayer>,
    pub captions: Vec<Option<String>>,
    pub latent_shape: [usize; 3],
    pub cross_attention_layers: usize,
    pub num_train_timesteps: usize,
    pub seed: u64,
}

/// A trainer's plan.
#[derive(Debug, Serialize, Deserialize)]
pub struct WireTrainPlan {
    steps: usize,
    checkpoint_every: usize,
    rank: usize,
    #[serde(with = "bits")]
    alpha: f32,
    delta: Delta,
    partition: Option<Partition>,
    #[serde(with = "bits")]
    erasure_lambda: f32,
    tokens: Vec<String>,
}

pub fn wire_train_plan(plan: TrainPlan) -> WireTrainPlan {
    let TrainPlan { steps, checkpoint_every, rank, alpha, delta, partition, erasure_lambda, tokens } = plan;
    WireTrainPlan { steps, checkpoint_every, rank, alpha, delta, partition, erasure_lambda, tokens }
}

pub fn train_plan(plan: WireTrainPlan) -> TrainPlan {
    let WireTrainPlan { steps, checkpoint_every, rank, alpha, delta, partition, erasure_lambda, tokens } = plan;
    TrainPlan { steps, checkpoint_every, rank, alpha, delta, partition, erasure_lambda, tokens }
}

/// Parameters; for each layer A, B and the rows follow, then each token's values.
#[derive(Debug, Serialize, Deserialize)]
pub struct WireParameters {
    factors: Vec<(usize, usize, u32, bool)>,
    tokens: Vec<(String, usize)>,
}

pub fn put_parameters(parameters: &Parameters, payload: &mut Payload) -> WireParameters {
    for f in &parameters.factors {
        payload.put(&f.a);
        payload.put(&f.b);
        payload.put_rows(&f.rows);
    }
    parameters.tokens.iter().for_each(|t| payload.put(&t.values));
    WireParameters {
        factors: parameters.factors.iter().map(|f| (f.layer, f.rank, f.scale.to_bits(), f.a_is_frozen)).collect(),
        tokens: parameters.tokens.iter().map(|t| (t.name.clone(), t.layers)).collect(),
    }
}

pub fn take_parameters(wire: WireParameters, payload: &mut Payload) -> Result<Parameters> {
    let mut parameters = Parameters::default();
    for (layer, rank, scale, a_is_frozen) in wire.factors {
        let (a, b, rows) = (payload.take()?, payload.take()?, payload.take_rows()?.into());
        let scale = f32::from_bits(scale);
        parameters.factors.push(LayerFactors { layer, rows, rank, scale, a, b, a_is_frozen });
    }
    for (name, layers) in wire.tokens {
        parameters.tokens.push(TokenFactors { name, layers, values: payload.take()? });
    }
    Ok(parameters)
}

/// A training state; its parameters and then the optimiser's tensors follow.
#[derive(Debug, Serialize, Deserialize)]
pub struct WireState {
    pub step: usize,
    parameters: WireParameters,
    optimiser: usize,
}

pub fn put_state(state: &TrainState, payload: &mut Payload) -> WireState {
    let parameters = put_parameters(&state.parameters, payload);
    state.optimiser.iter().for_each(|tensor| payload.put(tensor));
    WireState { step: state.step, parameters, optimiser: state.optimiser.len() }
}

pub fn take_state(wire: WireState, payload: &mut Payload) -> Result<TrainState> {
    let parameters = take_parameters(wire.parameters, payload)?;
    let optimiser = (0..wire.optimiser).map(|_| payload.take()).collect::<Result<_>>()?;
    Ok(TrainState { step: wire.step, parameters, optimiser })
}

/// A sample; its noise and posterior follow.
#[derive(Debug, Serialize, Deserialize)]
pub struct WireSample {
    picture: usize,
    #[serde(with = "bits")]
    scale: f32,
    offset: [u32; 2],
    flip: bool,
    prompt: String,
    timestep: usize,
    #[serde(with = "bits")]
    weight: f32,
}

pub fn put_sample(sample: &Sample, payload: &mut Payload) -> WireSample {
    payload.put(&sample.noise);
    payload.put(&sample.posterior);
    let Placement { scale, offset, flip } = sample.placement;
    let offset = offset.map(f32::to_bits);
    let (picture, prompt, timestep, weight) = (sample.picture, sample.prompt.clone(), sample.timestep, sample.weight);
    WireSample { picture, scale, offset, flip, prompt, timestep, weight }
}

pub fn take_sample(wire: WireSample, payload: &mut Payload) -> Result<Sample> {
    Ok(Sample {
        picture: wire.picture,
        placement: Placement { scale: wire.scale, offset: wire.offset.map(f32::from_bits), flip: wire.flip },
        prompt: wire.prompt,
        timestep: wire.timestep,
        noise: payload.take()?,
        posterior: payload.take()?,
        weight: wire.weight,
    })
}
