//! `bench unet`, `vae`, `text` and `step`: the parts of a model, on inputs that any other program can make, too.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{DType, Tensor, Var};
use serde::Serialize;

use super::meter::{Cost, measure};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::nn::{Conditioning, Forward, LayerId, TrainingAdapter};
use crate::ops::LoraBranch;

/// What a part of a model costs, and what it computed.
#[derive(Clone, Debug, Serialize)]
pub struct BenchModel {
    /// Each time.
    #[serde(flatten)]
    pub cost: Cost,
    /// The root of the mean square of all values that it computed (of gradients in a training step).
    pub rms: f64,
    /// Some of these values, evenly spread; of a training step none.
    pub values: Vec<f32>,
    /// The loss, of a training step.
    pub loss: Option<f64>,
}

/// Number i of input `seed`: sin(0.7 i + seed), rounded to f32.
fn inputs(seed: f64, shape: &[usize], device: &candle_core::Device) -> Result<Tensor> {
    let count: usize = shape.iter().product();
    let values: Vec<f32> = (0..count).map(|i| (0.7 * i as f64 + seed).sin() as f32).collect();
    Ok(Tensor::from_vec(values, shape, device)?)
}

/// How many values a benchmark shows.
const SHOWN: usize = 64;

fn values_of(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
}

fn square_sum(values: &[f32]) -> f64 {
    values.iter().map(|&x| f64::from(x) * f64::from(x)).sum()
}

fn cost_of(repeats: usize, mut work: impl FnMut() -> Result<Tensor>) -> Result<BenchModel> {
    let mut last = None;
    let cost = measure(repeats, || {
        let computed = work()?;
        // A card returns before it is done.
        computed.device().synchronize()?;
        last = Some(computed);
        Ok(())
    })?;
    let (mut rms, mut values) = (f64::NAN, Vec::new());
    if let Some(tensor) = &last {
        let all = values_of(tensor)?;
        rms = (square_sum(&all) / all.len() as f64).sqrt();
        values = all.iter().copied().step_by(all.len().div_ceil(SHOWN).max(1)).collect();
    }
    Ok(BenchModel { cost, rms, values, loss: None })
}

/// The side of square latents: `size`, or what the model was trained with.
fn side(model: &Model, size: Option<usize>) -> usize {
    size.unwrap_or(model.latent_shape().1)
}

fn prompt_encoding(model: &Model, batch: usize) -> Result<Tensor> {
    let config = model.text_encoder().config();
    inputs(2.0, &[batch, config.max_position_embeddings, config.hidden_size], model.device())
}

/// One prediction for `batch` latents of `size` x `size`.
pub fn unet(model: &Model, batch: usize, size: Option<usize>, repeats: usize) -> Result<BenchModel> {
    let side = side(model, size);
    let latents = inputs(1.0, &[batch, model.latent_shape().0, side, side], model.device())?;
    let context = Conditioning::Shared(prompt_encoding(model, batch)?);
    let timesteps = vec![500.0; batch];
    cost_of(repeats, || model.unet().forward(&latents, &timesteps, &context, &Forward::default()))
}

/// Decoding `batch` latents of `size` x `size` to pictures.
pub fn vae(model: &Model, batch: usize, size: Option<usize>, repeats: usize) -> Result<BenchModel> {
    let side = side(model, size);
    let latents = inputs(3.0, &[batch, model.latent_shape().0, side, side], model.device())?;
    cost_of(repeats, || Ok(model.vae().decode(&latents)?))
}

fn token_ids(model: &Model, batch: usize) -> Result<Tensor> {
    let config = model.text_encoder().config();
    let length = config.max_position_embeddings;
    let ids: Vec<u32> = (0..batch * length).map(|i| (i * 37 % config.vocab_size) as u32).collect();
    Ok(Tensor::from_vec(ids, (batch, length), model.device())?)
}

/// Encoding `batch` prompts.
pub fn text(model: &Model, batch: usize, repeats: usize) -> Result<BenchModel> {
    let ids = token_ids(model, batch)?;
    cost_of(repeats, || {
        let encoder = model.text_encoder();
        Ok(encoder.forward(&encoder.embed(&ids)?, &Forward::default())?)
    })
}

/// A BlockLoRA training step: one prompt for every cross-attention of each sample through the text encoder, the UNet,
/// the mean squared error, and the gradients of rank-`rank` factors on every attention projection of both, of which an
/// adapter owns the first sixteenth of the rows (all, if there are fewer than 16).
pub fn step(
    model: &Model,
    batch: usize,
    size: Option<usize>,
    rank: usize,
    checkpointing: bool,
    repeats: usize,
) -> Result<BenchModel> {
    let (side, device) = (side(model, size), model.device());
    let prompts = batch * model.cross_attention_layers();
    let ids = token_ids(model, prompts)?;
    let shape = [batch, model.latent_shape().0, side, side];
    let (latents, target) = (inputs(1.0, &shape, device)?, inputs(4.0, &shape, device)?);
    let timesteps = vec![500.0; batch];
    let mut variables = Vec::new();
    let mut adapters = vec![None; model.layers().len()];
    for (index, layer) in model.layers().iter().enumerate() {
        if !is_attention(&layer.name) {
            continue;
        }
        let owned = if layer.rows < 16 { layer.rows } else { layer.rows / 16 };
        let seed = index as f64;
        let a = Var::from_tensor(&(inputs(seed, &[rank, layer.columns], device)? * 0.02)?)?;
        let b = Var::from_tensor(&(inputs(seed + 0.5, &[owned, rank], device)? * 0.02)?)?;
        let branch = LoraBranch { rows: Arc::from_iter(0..owned as u32), mask: None, scale: 1.0 };
        adapters[LayerId(index).0] =
            Some(TrainingAdapter { a: a.as_tensor().clone(), b: b.as_tensor().clone(), branch });
        variables.extend([a, b]);
    }
    if variables.is_empty() {
        return Err(Error::option("model", model.dir().display(), "it has no attention projections to train"));
    }
    let with = Forward { adapters: &adapters, recorder: None };
    let (mut loss, mut squares) = (f64::NAN, f64::NAN);
    let cost = measure(repeats, || {
        let encoder = model.text_encoder();
        let encoded = encoder.forward(&encoder.embed(&ids)?, &with)?;
        let layers = model.cross_attention_layers();
        let contexts = (0..layers).map(|layer| encoded.narrow(0, layer * batch, batch)?.contiguous());
        let context = Conditioning::LayerWise(contexts.collect::<candle_core::Result<_>>()?);
        let loss_of = |predicted: &Tensor, samples: Range<usize>| {
            let error = (predicted - target.narrow(0, samples.start, samples.len())?)?;
            Ok((error.sqr()?.sum_all()? / target.elem_count() as f64)?)
        };
        let unet = model.unet();
        let (value, mut gradients) =
            unet.loss_and_gradients(&latents, &timesteps, &context, &with, &loss_of, checkpointing)?;
        gradients.follow(&context, variables.iter().map(Var::as_tensor))?;
        loss = f64::from(value);
        squares = 0.0;
        for variable in &variables {
            if let Some(gradient) = gradients.get(variable) {
                squares += square_sum(&values_of(gradient)?);
            }
        }
        Ok(())
    })?;
    let count: usize = variables.iter().map(|variable| variable.elem_count()).sum();
    Ok(BenchModel { cost, rms: (squares / count as f64).sqrt(), values: Vec::new(), loss: Some(loss) })
}

/// Whether an adaptable Linear projects an attention's queries, keys, values or output.
fn is_attention(name: &str) -> bool {
    ["to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj"]
        .iter()
        .any(|projection| name.strip_suffix(projection).is_some_and(|path| path.ends_with('.')))
}
