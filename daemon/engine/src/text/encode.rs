//! From prompts to what the UNet's cross-attentions read.

use blocklora_spec::TokenVectors;
use candle_core::{DType, Tensor};

use super::prompt::{ConceptSlots, Prompt, TokenisedPrompt};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::nn::{Conditioning, Forward};

/// A concept as prompts name it.
#[derive(Clone, Debug, PartialEq)]
pub struct Concept {
    /// Its name; prompts write it in angle brackets.
    pub name: String,
    /// The tokens that its name stands for: each a vector for every cross-attention ("P+", arXiv 2303.09522), or one for
    /// all.
    pub tokens: Vec<TokenVectors>,
}

impl Concept {
    /// Fails unless `model` can put the tokens into its prompts.
    pub(crate) fn check(&self, model: &Model) -> Result<()> {
        for token in &self.tokens {
            if token.layers.checked_mul(token.width) != Some(token.values.len()) {
                let reason = format!(
                    "token {:?} has {} values for {} vectors of width {}",
                    token.name,
                    token.values.len(),
                    token.layers,
                    token.width
                );
                return Err(Error::Incompatible { adapter: self.name.clone(), reason });
            }
            check_token(model, &self.name, token.layers, token.width)?;
        }
        Ok(())
    }
}

/// Encodes `prompts`, which may name `concepts`.
///
/// [`Conditioning::Shared`] if no prompt uses a token with one vector per cross-attention, else layer-wise. Fails on a
/// concept that is not given, on a prompt that is too long, and on tokens that do not fit the model.
pub fn encode(model: &Model, prompts: &[&str], concepts: &[Concept], with: &Forward) -> Result<Conditioning> {
    let slots: Vec<_> =
        concepts.iter().map(|concept| ConceptSlots { name: &concept.name, tokens: concept.tokens.len() }).collect();
    let mut vectors = Vec::new();
    for (i, concept) in concepts.iter().enumerate() {
        if concepts[..i].iter().any(|other| other.name == concept.name) {
            let reason = "another concept has the same name, so that a prompt cannot tell them apart; rename one";
            return Err(Error::Incompatible { adapter: concept.name.clone(), reason: reason.into() });
        }
        concept.check(model)?;
        for token in &concept.tokens {
            vectors.push(Tensor::from_slice(&token.values, (token.layers, token.width), model.device())?);
        }
    }
    let prompts = prompts
        .iter()
        .map(|prompt| Prompt::parse(prompt).tokenise(model.tokenizer(), &slots))
        .collect::<Result<Vec<_>>>()?;
    encode_with(model, &prompts, &vectors, with)
}

fn check_token(model: &Model, concept: &str, layers: usize, width: usize) -> Result<()> {
    let expected = model.text_encoder().config().hidden_size;
    let cross_attentions = model.cross_attention_layers();
    let reason = if width != expected {
        format!("its tokens have width {width}, the model's {expected}; it belongs to another base model")
    } else if layers != 1 && layers != cross_attentions {
        format!(
            "its tokens have {layers} vectors, the model {cross_attentions} cross-attentions; it belongs to another \
             base model"
        )
    } else {
        return Ok(());
    };
    Err(Error::Incompatible { adapter: concept.to_owned(), reason })
}

/// Encodes tokenised prompts with the concepts' vectors as tensors, through which gradients flow: what training uses.
///
/// `vectors[k]` is [layers, d] in f32, layers being 1 or the model's number L of cross-attentions, and stands at every
/// [`super::Slot`] whose `vector` is k. Gradients reach the vectors (each row through the encoding of its own
/// cross-attention) and the factors of the text encoder's training adapters in `with`; the embedding table and all
/// weights are frozen.
///
/// If no prompt has a slot with L > 1 vectors the result is [`Conditioning::Shared`] [N, T, d]. Else it is layer-wise,
/// L tensors [N, T, d]: the prompts that have such a slot run through the text encoder as one batch [L * K, T, d],
/// cross-attention-major, and the K' others as another [K', T, d]; the recorder and per-sample erasure masks in `with`
/// see these batches, so masks of text-encoder layers are best shared, `[rows]`.
pub fn encode_with(
    model: &Model,
    prompts: &[TokenisedPrompt],
    vectors: &[Tensor],
    with: &Forward,
) -> Result<Conditioning> {
    for vector in vectors {
        let (layers, width) = vector.dims2()?;
        check_token(model, "in training", layers, width)?;
    }
    for prompt in prompts {
        if let Some(slot) = prompt.slots.iter().find(|slot| slot.vector >= vectors.len()) {
            return Err(Error::option("slot", slot.vector, format!("only {} token vectors are given", vectors.len())));
        }
    }
    let layers = model.cross_attention_layers();
    let is_layer_wise =
        |prompt: &&TokenisedPrompt| layers > 1 && prompt.slots.iter().any(|slot| vectors[slot.vector].dims()[0] > 1);
    let (layered, plain): (Vec<_>, Vec<_>) = prompts.iter().partition(is_layer_wise);
    let encode = |prompts: &[&TokenisedPrompt], layers| -> Result<Tensor> {
        Ok(model.text_encoder().forward(&embed(model, prompts, vectors, layers)?, with)?)
    };
    if layered.is_empty() {
        return Ok(Conditioning::Shared(encode(&plain, 1)?));
    }
    let all = encode(&layered, layers)?;
    let plain_encoding = if plain.is_empty() { None } else { Some(encode(&plain, 1)?) };
    // Row of each prompt once the layer-wise encodings of one layer and the plain ones are put together.
    let (mut next_layered, mut next_plain) = (0, layered.len());
    let order: Vec<u32> = prompts
        .iter()
        .map(|prompt| {
            let next = if is_layer_wise(&prompt) { &mut next_layered } else { &mut next_plain };
            *next += 1;
            *next as u32 - 1
        })
        .collect();
    let order = Tensor::from_vec(order, prompts.len(), model.device())?;
    let mut encodings = Vec::with_capacity(layers);
    for layer in 0..layers {
        let encoding = all.narrow(0, layer * layered.len(), layered.len())?.contiguous()?;
        encodings.push(match &plain_encoding {
            None => encoding,
            Some(plain) => Tensor::cat(&[&encoding, plain], 0)?.index_select(&order, 0)?,
        });
    }
    Ok(Conditioning::LayerWise(encodings))
}

/// Embeddings of `prompts` for the first `layers` cross-attentions, [layers * K, T, d].
fn embed(model: &Model, prompts: &[&TokenisedPrompt], vectors: &[Tensor], layers: usize) -> Result<Tensor> {
    let device = model.device();
    let (count, length) = (prompts.len(), model.tokenizer().length());
    let ids: Vec<u32> = prompts.iter().flat_map(|prompt| prompt.ids.iter().copied()).collect();
    let words = model.text_encoder().embed(&Tensor::from_vec(ids, (count, length), device)?)?;
    let width = words.dim(2)?;

    let mut keep = vec![1f32; count * length];
    // Which row of the stacked vectors is added to which row of the embeddings.
    let (mut sources, mut targets) = (Vec::new(), Vec::new());
    let firsts: Vec<usize> = vectors
        .iter()
        .scan(0, |next, vector| {
            let first = *next;
            *next += vector.dims()[0];
            Some(first)
        })
        .collect();
    for (k, prompt) in prompts.iter().enumerate() {
        for slot in &prompt.slots {
            keep[k * length + slot.position] = 0.0;
            for layer in 0..layers {
                let row = if vectors[slot.vector].dims()[0] == 1 { 0 } else { layer };
                sources.push((firsts[slot.vector] + row) as u32);
                targets.push(((layer * count + k) * length + slot.position) as u32);
            }
        }
    }
    let keep = Tensor::from_vec(keep, (count, length, 1), device)?;
    let words = words.broadcast_mul(&keep)?.repeat((layers, 1, 1))?;
    if sources.is_empty() {
        return Ok(words);
    }
    let stacked = Tensor::cat(vectors, 0)?.to_dtype(DType::F32)?;
    let rows = stacked.index_select(&Tensor::from_slice(&sources, sources.len(), device)?, 0)?;
    let targets = Tensor::from_slice(&targets, targets.len(), device)?;
    let flat = words.reshape((layers * count * length, width))?.index_add(&targets, &rows, 0)?;
    Ok(flat.reshape((layers * count, length, width))?)
}
