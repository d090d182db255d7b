//! Learning one concept: the loop that the concept trainers share.
//!
//! ED-LoRA (Gu et al., "Mix-of-Show", NeurIPS 2023) names a concept by two tokens with one vector per cross-attention
//! layer and adapts the attention projections of the UNet and of the text encoder. The other methods differ in a few
//! places, which a [`Recipe`] names: which rows of B exist (BlockLoRA, equation 4), which outputs are erased (equation
//! 3), what A starts as and whether it trains (Orthogonal Adaptation), what the words start as (DreamBooth). Any of them
//! may learn pictures of the prior beside the concept's.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::adamw::AdamW;
use super::host::{ErasureMasks, LayerFactors, Parameters, Placement, Sample, TokenFactors, TrainHost, TrainState};
use super::prior::Prior;
use super::settings::{Augmentation, ConceptSettings, Erasure, ErasureScope, LayerChoice, TokenStyle};
use super::silence::{Silent, norm, silent_step};
use super::templates;
use crate::Partition;
use crate::error::{Error, Result};
use crate::job::LogLevel;
use crate::merge::Layer;
use crate::rng::{Rng, Stream};

/// Tokens that name a concept: one for who it is, one for what it is.
pub(super) const CONCEPT_TOKENS: usize = 2;

/// A [rank, n] of (layer index, layer, the concept's random numbers for this layer).
pub type FrozenA<'a> = dyn Fn(usize, &Layer, &mut Rng) -> Result<Vec<f32>> + 'a;

/// What A starts as.
pub enum StartA<'a> {
    /// Kaiming-uniform with a = sqrt 5, so uniform in ±1/sqrt n, as LoRA has it; trained.
    Uniform,
    /// The [rank, n] values of this function; never trained.
    Frozen(&'a FrozenA<'a>),
}

/// What the concept's two names start as; `learning_rate.tokens` says whether they move.
#[derive(Clone, Copy, Debug)]
pub enum Words<'a> {
    /// The first N(0, token_init_std^2), the second the class word (ED-LoRA).
    Noise,
    /// The first this word, which must be one token of the model's vocabulary, the second the class word (DreamBooth).
    Rare(&'a str),
}

/// In what a method differs from ED-LoRA.
pub struct Recipe<'a> {
    /// The shared settings.
    pub settings: &'a ConceptSettings,
    /// The rows that the adapter owns in a layer of m outputs, ascending: [`rows_of`] or [`all_rows`].
    pub rows_of: &'a dyn Fn(usize) -> Vec<u32>,
    /// Multiplies B A in every layer: the scale of the method's [`TrainPlan`](super::TrainPlan).
    pub scale: f32,
    /// Output erasure.
    pub erasure: Option<Erasure>,
    /// What A starts as.
    pub start_a: StartA<'a>,
    /// What the names start as.
    pub words: Words<'a>,
    /// The prompt of every picture of the concept, with `{}` for the concept; none: captions and templates.
    pub prompt: Option<&'a str>,
}

impl<'a> Recipe<'a> {
    /// ED-LoRA's: every row owned, nothing erased, A trained.
    pub fn new(settings: &'a ConceptSettings) -> Self {
        Self {
            settings,
            rows_of: &all_rows,
            scale: settings.alpha,
            erasure: None,
            start_a: StartA::Uniform,
            words: Words::Noise,
            prompt: None,
        }
    }
}

/// Trains the host's concept by `recipe`: AdamW on the factors and on the tokens, which freeze once they have grown.
pub fn train_concept(host: &mut dyn TrainHost, recipe: &Recipe<'_>) -> Result<Parameters> {
    let settings = recipe.settings;
    settings.check()?;
    let prior = settings.prior.of_class(&host.concept().class_word);
    check_words(host, recipe)?;
    check_prompts(host, recipe, prior.as_ref())?;
    let prior_pictures = draw_prior_pictures(host, prior.as_ref())?;
    let adamw = AdamW { weight_decay: settings.weight_decay, ..AdamW::default() };
    let mut state = match host.resume()? {
        Some(state) => state,
        None => start(host, recipe)?,
    };
    let token_norm_limit = token_norm_limit(host, recipe)?;
    let groups = groups(host.layers(), &state.parameters, settings);
    let is_silent = settings.silence.weight > 0.0;
    let class = is_silent.then(|| host.embedding(&host.concept().class_word)).transpose()?;
    let (mut gradients, mut of_drift) = (Parameters::default(), Parameters::default());

    while state.step < settings.steps {
        let step = state.step;
        let batch = draw_batch(host, recipe, &prior_pictures, step);
        let of_layer = |layer| host.rng(Stream::Erasure, step, layer);
        let masks = draw_masks(host, &state.parameters, recipe.erasure, batch.len(), of_layer);
        let mut loss = host.loss_and_gradients(&state.parameters, &masks, &batch, &mut gradients)?;
        if let Some(class) = &class {
            let silent = Silent { parameters: &state.parameters, class, prior: &prior_pictures, step };
            loss += silent_step(host, recipe, &silent, &mut gradients, &mut of_drift)?;
        }
        if !loss.is_finite() {
            return Err(Error::not_finite("the loss", loss, step));
        }
        let tokens_are_frozen = token_norm_limit > 0.0 && mean_norm(&state.parameters.tokens) >= token_norm_limit;
        let (first_moments, second_moments) = state.optimiser.split_at_mut(groups.len());
        let moments = first_moments.iter_mut().zip(second_moments);
        let tensors = state.parameters.tensors_mut().zip(gradients.tensors()).zip(moments).zip(&groups);
        for (((theta, gradient), (m, v)), group) in tensors {
            if !(group.is_frozen || group.is_token && tokens_are_frozen) {
                adamw.update(step + 1, settings.rate(group.rate, step), theta, gradient, m, v);
            }
        }
        state.step += 1;
        host.step_done(&state, settings.steps, loss)?;
    }
    check_finite(&state)?;
    Ok(state.parameters)
}

/// The words that the names start as must be tokens of the model, which is better known before pictures are drawn.
fn check_words(host: &dyn TrainHost, recipe: &Recipe<'_>) -> Result<()> {
    host.embedding(&host.concept().class_word)?;
    match recipe.words {
        Words::Noise => Ok(()),
        Words::Rare(word) => host.embedding(word).map(drop),
    }
}

/// Every prompt that training may draw must fit the model.
fn check_prompts(host: &dyn TrainHost, recipe: &Recipe<'_>, prior: Option<&Prior>) -> Result<()> {
    let prompts_of = |caption: &Option<String>| match recipe.prompt {
        Some(prompt) => vec![prompt.to_owned()],
        None => templates::prompts(host.concept().kind, caption.as_deref(), recipe.settings.templates),
    };
    for prompt in host.captions().iter().flat_map(prompts_of).collect::<BTreeSet<_>>() {
        host.check_prompt(&prompt, CONCEPT_TOKENS)?;
    }
    let mut drawn = prior.iter().flat_map(|prior| &prior.pictures);
    drawn.try_for_each(|request| host.check_prompt(&request.prompt, 0))
}

/// A picture of the prior as the host knows it.
pub(super) struct PriorPicture {
    pub(super) index: usize,
    pub(super) prompt: String,
    /// lambda.
    pub(super) weight: f32,
}

/// Has the host draw the pictures of the prior; none without one.
fn draw_prior_pictures(host: &mut dyn TrainHost, prior: Option<&Prior>) -> Result<Vec<PriorPicture>> {
    let mut pictures = Vec::new();
    for prior in prior.iter() {
        for request in &prior.pictures {
            let (prompt, weight) = (&request.prompt, prior.weight);
            pictures.extend(host.generate(request)?.map(|index| PriorPicture {
                index,
                prompt: prompt.clone(),
                weight,
            }));
        }
    }
    Ok(pictures)
}

/// The random numbers that the concept starts from: other ones for each name, or two concepts of one seed would have one
/// A, and their changes would be alike before anything is learned.
fn start_rng(host: &dyn TrainHost, step: u32, lane: usize) -> Rng {
    Rng::new(host.concept().start_seed(host.seed()), Stream::Init, step, lane as u16)
}

/// B = 0; A and the names as the recipe has them.
fn start(host: &dyn TrainHost, recipe: &Recipe<'_>) -> Result<TrainState> {
    let settings = recipe.settings;
    let mut factors = Vec::new();
    for (index, layer) in host.layers().iter().enumerate().filter(|(_, layer)| is_chosen(layer, settings)) {
        let rows = (recipe.rows_of)(layer.rows);
        if rows.is_empty() {
            continue;
        }
        let mut rng = start_rng(host, 0, index);
        let a = match &recipe.start_a {
            StartA::Uniform => {
                let bound = 1.0 / (layer.columns as f32).sqrt();
                (0..settings.rank * layer.columns).map(|_| (2.0 * rng.uniform() - 1.0) * bound).collect()
            }
            StartA::Frozen(values) => values(index, layer, &mut rng)?,
        };
        factors.push(LayerFactors {
            layer: index,
            rank: settings.rank,
            scale: recipe.scale,
            a,
            b: vec![0.0; rows.len() * settings.rank],
            rows: rows.into(),
            a_is_frozen: matches!(recipe.start_a, StartA::Frozen(_)),
        });
    }
    if factors.is_empty() {
        return Err(Error::incompatible("this slot owns no row of any layer of this model: choose another slot"));
    }
    let tokens = start_tokens(host, recipe)?;
    let parameters = Parameters { factors, tokens };
    let zeros: Vec<Vec<f32>> = parameters.tensors().map(|t| vec![0.0; t.len()]).collect();
    Ok(TrainState { step: 0, parameters, optimiser: [zeros.clone(), zeros].concat() })
}

fn start_tokens(host: &dyn TrainHost, recipe: &Recipe<'_>) -> Result<Vec<TokenFactors>> {
    let concept = host.concept();
    let class = host.embedding(&concept.class_word)?;
    let layers = match recipe.settings.tokens {
        TokenStyle::LayerWise => host.cross_attention_layers(),
        TokenStyle::Plain => 1,
    };
    let first: Vec<f32> = match recipe.words {
        Words::Noise => {
            let mut rng = start_rng(host, 1, 0);
            class.iter().map(|_| recipe.settings.token_init_std * rng.normal()).collect()
        }
        Words::Rare(word) => host.embedding(word)?,
    };
    let token = |number: usize, start: &[f32]| TokenFactors {
        name: format!("{}-{number}", concept.name),
        layers,
        values: start.repeat(layers),
    };
    Ok(vec![token(1, &first), token(2, &class)])
}

fn is_chosen(layer: &Layer, settings: &ConceptSettings) -> bool {
    (settings.train_text_encoder || !layer.is_text_encoder())
        && (settings.layers == LayerChoice::All || layer.is_attention())
}

/// How one tensor of [`Parameters::tensors`] moves.
struct Group {
    /// Its learning rate before the schedule.
    rate: f32,
    is_frozen: bool,
    is_token: bool,
}

/// Those of all tensors, in their order.
fn groups(layers: &[Layer], parameters: &Parameters, settings: &ConceptSettings) -> Vec<Group> {
    let rates = settings.learning_rate;
    let of_factors = |f: &LayerFactors| {
        let text = layers.get(f.layer).is_some_and(Layer::is_text_encoder);
        let rate = if text { rates.text_encoder } else { rates.unet };
        [f.a_is_frozen, false].map(|is_frozen| Group { rate, is_frozen, is_token: false })
    };
    let of_token = |_: &TokenFactors| Group { rate: rates.tokens, is_frozen: false, is_token: true };
    parameters.factors.iter().flat_map(of_factors).chain(parameters.tokens.iter().map(of_token)).collect()
}

/// The concept's samples, and behind them as many of the prior's pictures where there are some.
fn draw_batch(host: &dyn TrainHost, recipe: &Recipe<'_>, prior: &[PriorPicture], step: usize) -> Vec<Sample> {
    let settings = recipe.settings;
    let captions = host.captions();
    // loss = mean over the concept's + weight * mean over the prior's, where the host divides by the number of both.
    let is_learned = prior.iter().any(|picture| picture.weight > 0.0);
    let weight = if is_learned { 2.0 } else { 1.0 };
    let concept = (0..settings.batch_size).map(|lane| {
        let mut data = host.rng(Stream::Data, step, lane);
        let picture = data.below(captions.len());
        let placement = draw_placement(&mut data, &settings.augmentation);
        let caption = captions[picture].as_deref();
        let prompt = match recipe.prompt {
            Some(prompt) => prompt.to_owned(),
            None => templates::prompt(&mut data, host.concept().kind, caption, settings.templates),
        };
        draw_sample(host, settings, step, lane, Shown { picture, placement, prompt, weight })
    });
    let beside = if is_learned { settings.batch_size } else { 0 };
    let prior = (settings.batch_size..settings.batch_size + beside).map(|lane| {
        let mut data = host.rng(Stream::Data, step, lane);
        let PriorPicture { index, prompt, weight } = &prior[data.below(prior.len())];
        let shown =
            Shown { picture: *index, placement: Placement::WHOLE, prompt: prompt.clone(), weight: 2.0 * weight };
        draw_sample(host, settings, step, lane, shown)
    });
    concept.chain(prior).collect()
}

/// What a sample shows the model.
pub(super) struct Shown {
    pub(super) picture: usize,
    pub(super) placement: Placement,
    pub(super) prompt: String,
    pub(super) weight: f32,
}

/// A sample with its random numbers.
pub(super) fn draw_sample(
    host: &dyn TrainHost,
    settings: &ConceptSettings,
    step: usize,
    lane: usize,
    shown: Shown,
) -> Sample {
    let Shown { picture, placement, prompt, weight } = shown;
    let [channels, height, width] = host.latent_shape();
    let pixels = height * width;
    let timestep = host.rng(Stream::Timestep, step, lane).below(host.num_train_timesteps());
    let mut rng = host.rng(Stream::Noise, step, lane);
    let mut noise = rng.normals(channels * pixels);
    if settings.noise_offset > 0.0 {
        for channel in noise.chunks_mut(pixels) {
            let offset = settings.noise_offset * rng.normal();
            channel.iter_mut().for_each(|e| *e += offset);
        }
    }
    let posterior = host.rng(Stream::Posterior, step, lane).normals(channels * pixels);
    Sample { picture, placement, prompt, timestep, noise, posterior, weight }
}

pub(super) fn draw_placement(rng: &mut Rng, augmentation: &Augmentation) -> Placement {
    let fill = rng.uniform() < augmentation.fill;
    let shrunk = augmentation.min_scale + (1.0 - augmentation.min_scale) * rng.uniform();
    // 1 would fill the canvas; the next smaller number is a whole picture, as large as it fits.
    let shrunk = shrunk.min(1.0_f32.next_down());
    Placement {
        scale: if fill { 1.0 } else { shrunk },
        offset: [rng.uniform(), rng.uniform()],
        flip: augmentation.flip && rng.uniform() < 0.5,
    }
}

/// r(lambda) of a step with `batch` samples: every element is 1 with probability 1 - lambda, else 0 (BlockLoRA,
/// equation 3). `rng_of` gives the random numbers of a layer.
pub fn draw_masks(
    host: &dyn TrainHost,
    parameters: &Parameters,
    erasure: Option<Erasure>,
    batch: usize,
    rng_of: impl Fn(usize) -> Rng,
) -> ErasureMasks {
    let Some(Erasure { lambda, scope, rescale }) = erasure.filter(|e| e.lambda > 0.0) else {
        return Vec::new();
    };
    let kept = if rescale { 1.0 / (1.0 - lambda) } else { 1.0 };
    let mask = |f: &LayerFactors| {
        let layer = host.layers().get(f.layer);
        // The text encoder sees each prompt once per cross-attention, not once per sample: its masks are shared.
        let text = layer.is_some_and(Layer::is_text_encoder);
        let samples = if scope == ErasureScope::Sample && !text { batch } else { 1 };
        let mut rng = rng_of(f.layer);
        // The mask covers all m outputs (the paper's r has size m): the element of an output does not depend on
        // which slot owns it.
        let m = layer.map_or(0, |l| l.rows);
        (0..samples)
            .flat_map(|_| {
                let all: Vec<f32> = (0..m).map(|_| if rng.uniform() < lambda { 0.0 } else { kept }).collect();
                f.rows.iter().map(|&row| all[row as usize]).collect::<Vec<_>>()
            })
            .collect()
    };
    parameters.factors.iter().map(mask).collect()
}

/// The mean norm at which the tokens freeze; 0: they never do. A limit that they reach before they have learned anything
/// was made for another model's embeddings, and is not kept.
fn token_norm_limit(host: &dyn TrainHost, recipe: &Recipe<'_>) -> Result<f32> {
    let limit = recipe.settings.token_norm_limit;
    let start = mean_norm(&start_tokens(host, recipe)?);
    if limit == 0.0 || start < limit {
        return Ok(limit);
    }
    if recipe.settings.learning_rate.tokens > 0.0 {
        let message = format!(
            "token_norm_limit = {limit} is not kept: on this model the words are {start:.2} long before they have learned \
             anything"
        );
        host.log(LogLevel::Warning, &message);
    }
    Ok(0.0)
}

/// The mean norm of the tokens' vectors.
fn mean_norm(tokens: &[TokenFactors]) -> f32 {
    let norms: Vec<f32> = tokens.iter().flat_map(|t| t.values.chunks(t.values.len() / t.layers)).map(norm).collect();
    norms.iter().sum::<f32>() / norms.len() as f32
}

fn check_finite(state: &TrainState) -> Result<()> {
    match state.parameters.tensors().flatten().find(|x| !x.is_finite()) {
        Some(&value) => Err(Error::not_finite("a trained parameter", value, state.step)),
        None => Ok(()),
    }
}

/// The rows 0..m: every row.
pub fn all_rows(m: usize) -> Vec<u32> {
    (0..m as u32).collect()
}

/// The rows of a partition's slot, or every row.
pub fn rows_of(partition: Option<Partition>) -> Arc<dyn Fn(usize) -> Vec<u32>> {
    match partition {
        Some(partition) => Arc::new(move |m| partition.rows(m)),
        None => Arc::new(all_rows),
    }
}
