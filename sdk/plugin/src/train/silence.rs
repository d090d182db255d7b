//! Silence: an adapter with rows of its own answers to its own concept only.
//!
//! Disjoint rows make merged adapters orthogonal as matrices, not selective: B A x is as large for the words of another
//! concept as for one's own. So beside the concept's loss training lowers the drift
//!
//! > E |eps_adapted(x_t, t, c) - eps_base(x_t, t, c)|^2
//!
//! under prompts c that name a made-up concept, two random vectors for each cross-attention where the learned ones would
//! stand, and under prompts without any concept. Merged with others, the rows then leave the others' pictures alone.
//! Needs a host of ABI 1.1.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::concept::{CONCEPT_TOKENS, PriorPicture, Recipe, Shown, draw_masks, draw_placement, draw_sample};
use super::host::{Parameters, Placement, Sample, TrainHost};
use super::settings::{Erasure, ErasureScope, check_range};
use super::templates;
use crate::error::Result;
use crate::rng::{Rng, Stream};

/// The shortest made-up word and the longest, by the length of the class word: what learned words turned out to be.
const LENGTHS: [f32; 2] = [0.2, 1.1];
/// How often the second made-up word has the class word in it.
const WITH_CLASS: f32 = 0.5;
/// How often a picture is one of the prior's, where there are some, and how often such a one names no concept.
const OF_PRIOR: f32 = 0.5;
const PLAIN: f32 = 0.5;

/// Teaches the adapter's rows to be silent where another concept is named.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Silence {
    /// The loss is the concept's plus weight times the drift under made-up words; 0: none.
    #[schemars(range(min = 0.0, max = 1000.0))]
    pub weight: f32,
    /// The probability with which an output of the change is erased while it is to be silent. Without erasure rows learn
    /// to cancel each other, and do so no longer once the rows of other adapters are there, too.
    #[schemars(range(min = 0.0, max = 0.99))]
    pub erasure: f32,
}

impl Default for Silence {
    fn default() -> Self {
        Self { weight: 0.0, erasure: 0.5 }
    }
}

impl Silence {
    /// Checks every range.
    pub fn check(&self) -> Result<()> {
        check_range("silence.weight", self.weight, 0.0, 1000.0)?;
        check_range("silence.erasure", self.erasure, 0.0, 0.99)
    }
}

/// What one step of silence looks at.
pub(super) struct Silent<'a> {
    /// As they are before the step.
    pub(super) parameters: &'a Parameters,
    /// The class word's embedding `[d]`.
    pub(super) class: &'a [f32],
    /// The prior's pictures, if any.
    pub(super) prior: &'a [PriorPicture],
    pub(super) step: usize,
}

/// Adds the silence of one step to `gradients`, those of the concept's loss, and returns what it adds to that loss:
/// weight times the drift. `of_drift` is room for the drift's own gradients.
pub(super) fn silent_step(
    host: &mut dyn TrainHost,
    recipe: &Recipe<'_>,
    silent: &Silent<'_>,
    gradients: &mut Parameters,
    of_drift: &mut Parameters,
) -> Result<f32> {
    let Silence { weight, erasure } = recipe.settings.silence;
    let &Silent { parameters, class, prior, step } = silent;
    let made_up = with_made_up_words(host, parameters, class, step);
    let batch = draw_silent_batch(host, recipe, prior, step);
    let erasure = Erasure { lambda: erasure, scope: ErasureScope::Sample, rescale: false };
    // Numbers of its own: not the outputs that the concept's loss has just erased. The words have the first lanes.
    let of_layer = |layer| host.rng(Stream::Silence, step, CONCEPT_TOKENS + layer);
    let masks = draw_masks(host, &made_up, Some(erasure), batch.len(), of_layer);
    let drift = host.drift_and_gradients(&made_up, &masks, &batch, of_drift)?;
    add_to_factors(gradients, weight, of_drift);
    Ok(weight * drift)
}

/// The parameters with the words of a concept that nobody has taught: directions at random, of the lengths that learned
/// words have.
///
/// The first word says who it is and has little of the vocabulary in it; the second has grown out of a class word.
fn with_made_up_words(host: &dyn TrainHost, parameters: &Parameters, class: &[f32], step: usize) -> Parameters {
    let mut made_up = parameters.clone();
    for (index, token) in made_up.tokens.iter_mut().enumerate() {
        let mut rng = host.rng(Stream::Silence, step, index);
        let of_class = index > 0 && rng.uniform() < WITH_CLASS;
        for vector in token.values.chunks_mut(class.len()) {
            let [shortest, longest] = LENGTHS;
            let length = norm(class) * (shortest + (longest - shortest) * rng.uniform());
            random_direction(&mut rng, vector, length);
            if of_class {
                vector.iter_mut().zip(class).for_each(|(x, word)| *x += word);
            }
        }
    }
    made_up
}

/// Samples under which the adapter is to be silent: the concept's pictures and the prior's, with prompts that name a
/// made-up concept, or, for some of the prior's, none.
fn draw_silent_batch(host: &dyn TrainHost, recipe: &Recipe<'_>, prior: &[PriorPicture], step: usize) -> Vec<Sample> {
    let settings = recipe.settings;
    let captions = host.captions();
    let draw = |lane: usize| {
        let mut data = host.rng(Stream::Data, step, lane);
        let own = data.below(captions.len());
        let placement = draw_placement(&mut data, &settings.augmentation);
        let named = match recipe.prompt {
            Some(prompt) => prompt.to_owned(),
            None => templates::prompt(&mut data, host.concept().kind, captions[own].as_deref(), settings.templates),
        };
        let of_prior = !prior.is_empty() && data.uniform() < OF_PRIOR;
        let (picture, placement, prompt) = match of_prior.then(|| &prior[data.below(prior.len())]) {
            None => (own, placement, named),
            Some(PriorPicture { index, prompt, .. }) => {
                let plain = data.uniform() < PLAIN;
                (*index, Placement::WHOLE, if plain { prompt.clone() } else { named })
            }
        };
        draw_sample(host, settings, step, lane, Shown { picture, placement, prompt, weight: 1.0 })
    };
    // Lanes behind those of the concept and of the prior.
    (2 * settings.batch_size..3 * settings.batch_size).map(draw).collect()
}

/// gradients += weight * more, for the factors; made-up words have nothing to learn.
fn add_to_factors(gradients: &mut Parameters, weight: f32, more: &Parameters) {
    for (sum, more) in gradients.factors.iter_mut().zip(&more.factors) {
        for (sum, more) in [(&mut sum.a, &more.a), (&mut sum.b, &more.b)] {
            sum.iter_mut().zip(more).for_each(|(sum, more)| *sum += weight * more);
        }
    }
}

fn random_direction(rng: &mut Rng, out: &mut [f32], length: f32) {
    out.copy_from_slice(&rng.normals(out.len()));
    let scale = length / norm(out).max(f32::MIN_POSITIVE);
    out.iter_mut().for_each(|x| *x *= scale);
}

pub(super) fn norm(vector: &[f32]) -> f32 {
    vector.iter().map(|x| x * x).sum::<f32>().sqrt()
}
