//! Between the author's types and those that cross the boundary.

use abi_stable::std_types::{ROption, RSlice, RVec};

use super::types::*;
use crate::merge::{Adapter, Coefficients, Factors, Layer, LayerPlan, Plan, Term};
use crate::sample::{NoiseSchedule, TimestepSpacing};
use crate::train::{
    Concept, LayerFactors, Parameters, PictureRequest, Placement, Sample, TokenFactors, TrainPlan, TrainState,
};
use crate::{Delta, Error, Kind, Partition, Result, Scheme};

const SPACINGS: [TimestepSpacing; 3] = [TimestepSpacing::Leading, TimestepSpacing::Linspace, TimestepSpacing::Trailing];
const KINDS: [Kind; 4] = [Kind::Subject, Kind::Person, Kind::Scene, Kind::Style];
const SCHEMES: [Scheme; 3] = [Scheme::Contiguous, Scheme::Strided, Scheme::Permuted];

fn number_of<T: PartialEq>(all: &[T], value: T) -> u32 {
    all.iter().position(|one| *one == value).unwrap_or(0) as u32
}

fn named<T: Copy>(all: &[T], number: u32, what: &str) -> Result<T> {
    let unknown =
        || Error::contract(format!("{what} {number} is unknown: one side of the ABI is newer than the other"));
    all.get(number as usize).copied().ok_or_else(unknown)
}

pub fn raw_layers(layers: &[Layer]) -> Vec<RawLayer<'_>> {
    layers.iter().map(|l| RawLayer { name: l.name.as_str().into(), rows: l.rows, columns: l.columns }).collect()
}

pub fn layer(raw: &RawLayer<'_>) -> Layer {
    Layer { name: raw.name.into(), rows: raw.rows, columns: raw.columns }
}

pub fn layers(raw: RSlice<'_, RawLayer<'_>>) -> Vec<Layer> {
    raw.iter().map(layer).collect()
}

impl<'a> From<Factors<'a>> for RawFactors<'a> {
    fn from(f: Factors<'a>) -> Self {
        Self { a: f.a.into(), b: f.b.into(), rows: f.rows.into(), rank: f.rank, scale: f.scale }
    }
}

impl<'a> From<RawFactors<'a>> for Factors<'a> {
    fn from(raw: RawFactors<'a>) -> Self {
        let (a, b, rows) = (raw.a.as_slice(), raw.b.as_slice(), raw.rows.as_slice());
        Self { a, b, rows, rank: raw.rank, scale: raw.scale }
    }
}

pub fn raw_adapters<'a>(adapters: &'a [Adapter<'a>]) -> Vec<RawAdapter<'a>> {
    let raw = |adapter: &'a Adapter<'a>| RawAdapter {
        name: adapter.name.into(),
        digest: adapter.digest.into(),
        weight: adapter.weight,
        factors: adapter.raw_factors().into(),
    };
    adapters.iter().map(raw).collect()
}

pub fn adapters<'a>(raw: RSlice<'a, RawAdapter<'a>>) -> Vec<Adapter<'a>> {
    raw.as_slice().iter().map(Adapter::lent).collect()
}

pub fn raw_plan(plan: Plan) -> RVec<RawLayerPlan> {
    let term = |Term { adapter, coefficients }: Term| match coefficients {
        Coefficients::Uniform(coefficient) => RawTerm { adapter, is_per_row: false, coefficient, per_row: RVec::new() },
        Coefficients::PerRow(values) => RawTerm { adapter, is_per_row: true, coefficient: 0.0, per_row: values.into() },
    };
    let layer = |plan: LayerPlan| match plan {
        LayerPlan::Factored(terms) => RawLayerPlan {
            is_dense: false,
            terms: terms.into_iter().map(term).collect::<Vec<_>>().into(),
            numbers: RVec::new(),
        },
        LayerPlan::Dense(numbers) => RawLayerPlan { is_dense: true, terms: RVec::new(), numbers: numbers.into() },
    };
    plan.into_iter().map(layer).collect::<Vec<_>>().into()
}

pub fn plan(raw: RVec<RawLayerPlan>) -> Plan {
    let term = |raw: RawTerm| Term {
        adapter: raw.adapter,
        coefficients: match raw.is_per_row {
            true => Coefficients::PerRow(raw.per_row.into()),
            false => Coefficients::Uniform(raw.coefficient),
        },
    };
    let layer = |raw: RawLayerPlan| match raw.is_dense {
        true => LayerPlan::Dense(raw.numbers.into()),
        false => LayerPlan::Factored(raw.terms.into_iter().map(term).collect()),
    };
    raw.into_iter().map(layer).collect()
}

pub fn raw_schedule(schedule: &NoiseSchedule) -> RawSchedule<'_> {
    RawSchedule {
        alphas_cumprod: schedule.alphas_cumprod.as_slice().into(),
        steps_offset: schedule.steps_offset,
        set_alpha_to_one: schedule.set_alpha_to_one,
        spacing: number_of(&SPACINGS, schedule.spacing),
    }
}

pub fn schedule(raw: &RawSchedule<'_>) -> Result<NoiseSchedule> {
    Ok(NoiseSchedule {
        alphas_cumprod: raw.alphas_cumprod.to_vec(),
        steps_offset: raw.steps_offset,
        set_alpha_to_one: raw.set_alpha_to_one,
        spacing: named(&SPACINGS, raw.spacing, "timestep spacing")?,
    })
}

pub fn raw_concept(concept: &Concept) -> RawConcept<'_> {
    RawConcept {
        name: concept.name.as_str().into(),
        class_word: concept.class_word.as_str().into(),
        kind: number_of(&KINDS, concept.kind),
    }
}

pub fn concept(raw: &RawConcept<'_>) -> Result<Concept> {
    Ok(Concept {
        name: raw.name.into(),
        class_word: raw.class_word.into(),
        kind: named(&KINDS, raw.kind, "kind of concept")?,
    })
}

pub fn raw_train_plan(plan: TrainPlan) -> RawTrainPlan {
    let partition = |p: Partition| RawPartition {
        scheme: number_of(&SCHEMES, p.scheme),
        capacity: p.capacity,
        seed: p.seed,
        slot: p.slot,
    };
    RawTrainPlan {
        steps: plan.steps,
        checkpoint_every: plan.checkpoint_every,
        rank: plan.rank,
        alpha: plan.alpha,
        is_alpha_over_rank: plan.delta == Delta::AlphaOverRank,
        partition: plan.partition.map(partition).into(),
        erasure_lambda: plan.erasure_lambda,
        tokens: plan.tokens.into_iter().map(Into::into).collect::<Vec<_>>().into(),
    }
}

pub fn train_plan(raw: RawTrainPlan) -> Result<TrainPlan> {
    let partition = match raw.partition {
        ROption::RSome(p) => Some(Partition {
            scheme: named(&SCHEMES, p.scheme, "partition scheme")?,
            capacity: p.capacity,
            seed: p.seed,
            slot: p.slot,
        }),
        ROption::RNone => None,
    };
    Ok(TrainPlan {
        steps: raw.steps,
        checkpoint_every: raw.checkpoint_every,
        rank: raw.rank,
        alpha: raw.alpha,
        delta: if raw.is_alpha_over_rank { Delta::AlphaOverRank } else { Delta::Alpha },
        partition,
        erasure_lambda: raw.erasure_lambda,
        tokens: raw.tokens.into_iter().map(Into::into).collect(),
    })
}

pub fn raw_layer_factors(parameters: &Parameters) -> Vec<RawLayerFactors<'_>> {
    parameters
        .factors
        .iter()
        .map(|f| RawLayerFactors {
            layer: f.layer,
            rows: (*f.rows).into(),
            rank: f.rank,
            scale: f.scale,
            a: f.a.as_slice().into(),
            b: f.b.as_slice().into(),
            a_is_frozen: f.a_is_frozen,
        })
        .collect()
}

pub fn raw_tokens(parameters: &Parameters) -> Vec<RawToken<'_>> {
    parameters
        .tokens
        .iter()
        .map(|t| RawToken { name: t.name.as_str().into(), layers: t.layers, values: t.values.as_slice().into() })
        .collect()
}

/// Parameters that were lent, copied.
pub fn parameters(raw: &RawParameters<'_>) -> Parameters {
    let factors = |f: &RawLayerFactors<'_>| LayerFactors {
        layer: f.layer,
        rows: f.rows.as_slice().into(),
        rank: f.rank,
        scale: f.scale,
        a: f.a.to_vec(),
        b: f.b.to_vec(),
        a_is_frozen: f.a_is_frozen,
    };
    let token = |t: &RawToken<'_>| TokenFactors { name: t.name.into(), layers: t.layers, values: t.values.to_vec() };
    Parameters { factors: raw.factors.iter().map(factors).collect(), tokens: raw.tokens.iter().map(token).collect() }
}

pub fn give_parameters(parameters: Parameters) -> OwnedParameters {
    let factors = |f: LayerFactors| OwnedLayerFactors {
        layer: f.layer,
        rows: f.rows.to_vec().into(),
        rank: f.rank,
        scale: f.scale,
        a: f.a.into(),
        b: f.b.into(),
        a_is_frozen: f.a_is_frozen,
    };
    let token = |t: TokenFactors| OwnedToken { name: t.name.into(), layers: t.layers, values: t.values.into() };
    OwnedParameters {
        factors: parameters.factors.into_iter().map(factors).collect::<Vec<_>>().into(),
        tokens: parameters.tokens.into_iter().map(token).collect::<Vec<_>>().into(),
    }
}

pub fn take_parameters(raw: OwnedParameters) -> Parameters {
    let factors = |f: OwnedLayerFactors| LayerFactors {
        layer: f.layer,
        rows: f.rows.as_slice().into(),
        rank: f.rank,
        scale: f.scale,
        a: f.a.into(),
        b: f.b.into(),
        a_is_frozen: f.a_is_frozen,
    };
    let token = |t: OwnedToken| TokenFactors { name: t.name.into(), layers: t.layers, values: t.values.into() };
    Parameters {
        factors: raw.factors.into_iter().map(factors).collect(),
        tokens: raw.tokens.into_iter().map(token).collect(),
    }
}

pub fn give_state(state: TrainState) -> OwnedState {
    OwnedState {
        step: state.step,
        parameters: give_parameters(state.parameters),
        optimiser: state.optimiser.into_iter().map(RVec::from).collect::<Vec<_>>().into(),
    }
}

pub fn take_state(raw: OwnedState) -> TrainState {
    TrainState {
        step: raw.step,
        parameters: take_parameters(raw.parameters),
        optimiser: raw.optimiser.into_iter().map(Vec::from).collect(),
    }
}

pub fn raw_samples(batch: &[Sample]) -> Vec<RawSample<'_>> {
    batch
        .iter()
        .map(|s| RawSample {
            picture: s.picture,
            placement_scale: s.placement.scale,
            placement_x: s.placement.offset[0],
            placement_y: s.placement.offset[1],
            flip: s.placement.flip,
            prompt: s.prompt.as_str().into(),
            timestep: s.timestep,
            noise: s.noise.as_slice().into(),
            posterior: s.posterior.as_slice().into(),
            weight: s.weight,
        })
        .collect()
}

pub fn sample(raw: &RawSample<'_>) -> Sample {
    Sample {
        picture: raw.picture,
        placement: Placement { scale: raw.placement_scale, offset: [raw.placement_x, raw.placement_y], flip: raw.flip },
        prompt: raw.prompt.into(),
        timestep: raw.timestep,
        noise: raw.noise.to_vec(),
        posterior: raw.posterior.to_vec(),
        weight: raw.weight,
    }
}

pub fn raw_picture_request(request: &PictureRequest) -> RawPictureRequest<'_> {
    RawPictureRequest {
        prompt: request.prompt.as_str().into(),
        count: request.count,
        steps: request.steps,
        guidance_scale: request.guidance_scale,
    }
}

pub fn picture_request(raw: &RawPictureRequest<'_>) -> PictureRequest {
    PictureRequest { prompt: raw.prompt.into(), count: raw.count, steps: raw.steps, guidance_scale: raw.guidance_scale }
}
