//! Learning one concept: the loop that ED-LoRA and BlockLoRA share.
//!
//! ED-LoRA (Gu et al., "Mix-of-Show", NeurIPS 2023) names a concept by two tokens with one vector per cross-attention
//! layer and adapts the attention projections of the UNet and of the text encoder. BlockLoRA adds which rows of B
//! exist (equation 4) and which outputs are erased (equation 3).

use std::sync::Arc;

use super::adamw::AdamW;
use super::config::{Augmentation, Erasure, ErasureScope, LayerChoice, TokenStyle, TrainConfig};
use super::host::{ErasureMasks, LayerFactors, Parameters, Placement, Sample, TokenFactors, TrainHost, TrainState};
use super::templates;
use crate::error::{Error, Result};
use crate::merge::strategy::LayerInfo;
use crate::rng::{Rng, Stream};

/// Tokens that name a concept: one for who it is, one that starts as its class word.
pub(super) const CONCEPT_TOKENS: usize = 2;

/// What is being taught.
#[derive(Clone, Debug, PartialEq)]
pub struct Concept {
    /// Its name; its tokens are `name-1` and `name-2`.
    pub name: String,
    /// The word for what it is, a single token of the model's vocabulary.
    pub class_word: String,
    /// Which templates fit it.
    pub kind: blocklora_spec::Kind,
}

/// Trains `concept` on `host`. `rows_of(m)` are the rows that the adapter owns in a layer of m outputs.
pub(super) fn train_concept(
    host: &mut dyn TrainHost,
    concept: &Concept,
    config: &TrainConfig,
    erasure: Option<Erasure>,
    rows_of: &dyn Fn(usize) -> Vec<u32>,
) -> Result<Parameters> {
    config.validate()?;
    let adamw = AdamW { weight_decay: config.weight_decay, ..AdamW::default() };
    let mut state = match host.resume()? {
        Some(state) => state,
        None => start(host, concept, config, rows_of)?,
    };
    let rates = group_rates(host.layers(), &state.parameters, config);
    let mut gradients = Parameters::default();

    while state.step < config.steps {
        let step = state.step;
        let batch = draw_batch(host, concept, config, step);
        let masks = draw_masks(host, &state.parameters, erasure, config.batch_size, step);
        let loss = host.loss_and_gradients(&state.parameters, &masks, &batch, &mut gradients)?;
        if !loss.is_finite() {
            return Err(Error::NotFinite { what: "the loss".into(), value: loss, step });
        }
        let tokens_frozen = tokens_have_grown(&state.parameters.tokens, config.token_norm_limit);
        let tensors = state.parameters.factors.len() * 2;
        let moments = state.first_moments.iter_mut().zip(&mut state.second_moments);
        for (index, ((theta, gradient), (m, v))) in
            state.parameters.tensors_mut().zip(gradients.tensors()).zip(moments).enumerate()
        {
            if index >= tensors && tokens_frozen {
                continue;
            }
            adamw.update(step + 1, config.rate(rates[index], step), theta, gradient, m, v);
        }
        state.step += 1;
        host.step_done(&state, config.steps, loss)?;
    }
    check_finite(&state)?;
    Ok(state.parameters)
}

/// B = 0, A kaiming-uniform with a = sqrt 5 (so uniform in ±1/sqrt n), name 1 small noise, name 2 the class word.
fn start(
    host: &dyn TrainHost,
    concept: &Concept,
    config: &TrainConfig,
    rows_of: &dyn Fn(usize) -> Vec<u32>,
) -> Result<TrainState> {
    let mut factors = Vec::new();
    for (index, layer) in host.layers().iter().enumerate().filter(|(_, layer)| chosen(layer, config)) {
        let rows = rows_of(layer.rows);
        if rows.is_empty() {
            continue;
        }
        let bound = 1.0 / (layer.columns as f32).sqrt();
        let mut rng = host.rng(Stream::Init, 0, index);
        factors.push(LayerFactors {
            layer: index,
            rank: config.rank,
            scale: config.alpha,
            a: (0..config.rank * layer.columns).map(|_| (2.0 * rng.uniform() - 1.0) * bound).collect(),
            b: vec![0.0; rows.len() * config.rank],
            rows: rows.into(),
        });
    }
    if factors.is_empty() {
        return Err(Error::option("partition", "", "this slot owns no row of any layer of this model"));
    }
    let class = host.embedding(&concept.class_word)?;
    let layers = match config.tokens {
        TokenStyle::LayerWise => host.cross_attention_layers(),
        TokenStyle::Plain => 1,
    };
    let mut rng = host.rng(Stream::Init, 1, 0);
    let noise: Vec<f32> = class.iter().map(|_| config.token_init_std * rng.normal()).collect();
    let token = |number: usize, start: &[f32]| TokenFactors {
        name: format!("{}-{number}", concept.name),
        layers,
        values: start.repeat(layers),
    };
    let parameters = Parameters { factors, tokens: vec![token(1, &noise), token(2, &class)] };
    let zeros: Vec<Vec<f32>> = parameters.tensors().map(|t| vec![0.0; t.len()]).collect();
    Ok(TrainState { step: 0, parameters, first_moments: zeros.clone(), second_moments: zeros })
}

fn chosen(layer: &LayerInfo, config: &TrainConfig) -> bool {
    let in_text_encoder = layer.name.starts_with("text_encoder.");
    let attention = [".to_q", ".to_k", ".to_v", ".to_out.0", ".q_proj", ".k_proj", ".v_proj", ".out_proj"]
        .iter()
        .any(|end| layer.name.ends_with(end));
    (config.train_text_encoder || !in_text_encoder) && (config.layers == LayerChoice::All || attention)
}

/// The learning rate of each tensor, in the order of [`Parameters::tensors`].
fn group_rates(layers: &[LayerInfo], parameters: &Parameters, config: &TrainConfig) -> Vec<f32> {
    let rate = config.learning_rate;
    let of_layer = |f: &LayerFactors| {
        let text = layers.get(f.layer).is_some_and(|l| l.name.starts_with("text_encoder."));
        if text { rate.text_encoder } else { rate.unet }
    };
    let factors = parameters.factors.iter().flat_map(|f| [of_layer(f); 2]);
    factors.chain(parameters.tokens.iter().map(|_| rate.tokens)).collect()
}

fn draw_batch(host: &dyn TrainHost, concept: &Concept, config: &TrainConfig, step: usize) -> Vec<Sample> {
    let captions = host.captions();
    let [channels, height, width] = host.latent_shape();
    let pixels = height * width;
    (0..config.batch_size)
        .map(|lane| {
            let mut data = host.rng(Stream::Data, step, lane);
            let picture = data.below(captions.len());
            let placement = draw_placement(&mut data, &config.augmentation);
            let prompt = templates::prompt(&mut data, concept.kind, captions[picture].as_deref(), config.templates);
            let timestep = host.rng(Stream::Timestep, step, lane).below(host.num_train_timesteps());
            let mut rng = host.rng(Stream::Noise, step, lane);
            let mut noise = rng.normals(channels * pixels);
            if config.noise_offset > 0.0 {
                for channel in noise.chunks_mut(pixels) {
                    let offset = config.noise_offset * rng.normal();
                    channel.iter_mut().for_each(|e| *e += offset);
                }
            }
            let posterior = host.rng(Stream::Posterior, step, lane).normals(channels * pixels);
            Sample { picture, placement, prompt, timestep, noise, posterior }
        })
        .collect()
}

fn draw_placement(rng: &mut Rng, augmentation: &Augmentation) -> Placement {
    let fill = rng.uniform() < augmentation.fill;
    let shrunk = augmentation.min_scale + (1.0 - augmentation.min_scale) * rng.uniform();
    Placement {
        scale: if fill { 1.0 } else { shrunk },
        offset: [rng.uniform(), rng.uniform()],
        flip: augmentation.flip && rng.uniform() < 0.5,
    }
}

/// r(lambda): every element is 1 with probability 1 - lambda, else 0 (equation 3).
fn draw_masks(
    host: &dyn TrainHost,
    parameters: &Parameters,
    erasure: Option<Erasure>,
    batch: usize,
    step: usize,
) -> ErasureMasks {
    let Some(Erasure { lambda, scope, rescale }) = erasure.filter(|e| e.lambda > 0.0) else {
        return Vec::new();
    };
    let kept = if rescale { 1.0 / (1.0 - lambda) } else { 1.0 };
    let mask = |f: &LayerFactors| {
        // The text encoder sees each prompt once per cross-attention, not once per sample: its masks are shared.
        let text = host.layers().get(f.layer).is_some_and(|l| l.name.starts_with("text_encoder."));
        let samples = if scope == ErasureScope::Sample && !text { batch } else { 1 };
        let mut rng = host.rng(Stream::Erasure, step, f.layer);
        // The mask covers all m outputs (the paper's r has size m): the element of an output does not depend on
        // which slot owns it.
        let m = host.layers().get(f.layer).map_or(0, |l| l.rows);
        (0..samples)
            .flat_map(|_| {
                let all: Vec<f32> = (0..m).map(|_| if rng.uniform() < lambda { 0.0 } else { kept }).collect();
                f.rows.iter().map(|&row| all[row as usize]).collect::<Vec<_>>()
            })
            .collect()
    };
    parameters.factors.iter().map(mask).collect()
}

/// Whether the mean norm of the tokens' vectors has reached the limit at which they freeze.
fn tokens_have_grown(tokens: &[TokenFactors], limit: f32) -> bool {
    let norms: Vec<f32> = tokens
        .iter()
        .flat_map(|t| t.values.chunks(t.values.len() / t.layers))
        .map(|v| v.iter().map(|x| x * x).sum::<f32>().sqrt())
        .collect();
    limit > 0.0 && norms.iter().sum::<f32>() / norms.len() as f32 >= limit
}

fn check_finite(state: &TrainState) -> Result<()> {
    match state.parameters.tensors().flatten().find(|x| !x.is_finite()) {
        Some(&value) => Err(Error::NotFinite { what: "a trained parameter".into(), value, step: state.step }),
        None => Ok(()),
    }
}

/// The rows 0..m: every row.
pub(super) fn all_rows(m: usize) -> Vec<u32> {
    (0..m as u32).collect()
}

/// The rows of a partition's slot, or every row.
pub(super) fn rows_of(partition: Option<blocklora_spec::Partition>) -> Arc<dyn Fn(usize) -> Vec<u32>> {
    match partition {
        Some(partition) => Arc::new(move |m| partition.rows(m)),
        None => Arc::new(all_rows),
    }
}
