//! transformers' `CLIPModel`: a text and a vision transformer that project into one space.

use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::error::{Error, Result};
use crate::model::config::{Activation, TextEncoderConfig};
use crate::nn::LayerNorm;
use crate::ops;
use crate::weights::WeightFile;

/// What both transformers' configs say.
#[derive(Deserialize)]
struct EncoderConfig {
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    #[serde(default = "quick_gelu")]
    hidden_act: String,
    #[serde(default = "epsilon")]
    layer_norm_eps: f64,
}

fn quick_gelu() -> String {
    "quick_gelu".into()
}
fn epsilon() -> f64 {
    1e-5
}

/// `text_config`.
#[derive(Deserialize)]
struct TextConfig {
    #[serde(flatten)]
    encoder: EncoderConfig,
    vocab_size: usize,
    max_position_embeddings: usize,
    eos_token_id: Option<u32>,
}

/// `vision_config`.
#[derive(Deserialize)]
struct VisionConfig {
    #[serde(flatten)]
    encoder: EncoderConfig,
    #[serde(default = "three")]
    num_channels: usize,
    image_size: usize,
    patch_size: usize,
}

fn three() -> usize {
    3
}

/// Both transformers, in f32.
pub struct Clip {
    text_config: TextEncoderConfig,
    eos_token_id: Option<u32>,
    token_embedding: Tensor,
    text_positions: Tensor,
    text_encoder: Encoder,
    final_layer_norm: LayerNorm,
    text_projection: Tensor,
    image_size: usize,
    patch_size: usize,
    patch_embedding: Tensor,
    class_embedding: Tensor,
    vision_positions: Tensor,
    pre_layer_norm: LayerNorm,
    vision_encoder: Encoder,
    post_layer_norm: LayerNorm,
    visual_projection: Tensor,
}

impl Clip {
    /// Loads `config.json` and `model.safetensors` of `folder`; also gives the weight file's digest.
    pub fn load(folder: &Path, device: &Device) -> Result<(Self, String)> {
        let path = folder.join("config.json");
        let text: TextConfig = part(&path, "text_config")?;
        let vision: VisionConfig = part(&path, "vision_config")?;
        let text_activation = text.encoder.check(&path, "text_config")?;
        let vision_activation = vision.encoder.check(&path, "vision_config")?;
        let VisionConfig { image_size, patch_size, num_channels, .. } = vision;
        if num_channels != 3 || patch_size == 0 || image_size % patch_size != 0 || image_size > 4096 {
            let reason = format!(
                "vision_config: {patch_size}-pixel patches of {num_channels} channels do not tile {image_size} pixels"
            );
            return Err(Error::invalid_file(&path, reason));
        }
        let text_config = TextEncoderConfig {
            vocab_size: text.vocab_size,
            hidden_size: text.encoder.hidden_size,
            intermediate_size: text.encoder.intermediate_size,
            num_hidden_layers: text.encoder.num_hidden_layers,
            num_attention_heads: text.encoder.num_attention_heads,
            max_position_embeddings: text.max_position_embeddings,
            hidden_act: text_activation,
            layer_norm_eps: text.encoder.layer_norm_eps,
        };
        let file = WeightFile::open(folder.join("model.safetensors"))?;
        let root = Weights { file: &file, device, prefix: String::new() };
        let (text_model, vision_model) = (root.at("text_model"), root.at("vision_model"));
        let (text_width, vision_width) = (text.encoder.hidden_size, vision.encoder.hidden_size);
        let projection = file.view("text_projection.weight")?.shape().first().copied().unwrap_or(0);
        let patches = (image_size / patch_size).pow(2);
        let words = text_model.at("embeddings");
        let pixels = vision_model.at("embeddings");
        let clip = Self {
            token_embedding: words.tensor("token_embedding.weight", &[text.vocab_size, text_width])?,
            text_positions: words.tensor("position_embedding.weight", &[text.max_position_embeddings, text_width])?,
            text_encoder: Encoder::load(&text_model, &text.encoder, text_activation, true)?,
            final_layer_norm: text_model.layer_norm("final_layer_norm", &text.encoder)?,
            text_projection: root.tensor("text_projection.weight", &[projection, text_width])?,
            patch_embedding: pixels
                .tensor("patch_embedding.weight", &[vision_width, 3, patch_size, patch_size])?
                .reshape((vision_width, 3 * patch_size * patch_size))?,
            class_embedding: pixels.tensor("class_embedding", &[vision_width])?,
            vision_positions: pixels.tensor("position_embedding.weight", &[patches + 1, vision_width])?,
            pre_layer_norm: vision_model.layer_norm("pre_layrnorm", &vision.encoder)?, // sic, in every CLIP file
            vision_encoder: Encoder::load(&vision_model, &vision.encoder, vision_activation, false)?,
            post_layer_norm: vision_model.layer_norm("post_layernorm", &vision.encoder)?,
            visual_projection: root.tensor("visual_projection.weight", &[projection, vision_width])?,
            text_config,
            eos_token_id: text.eos_token_id,
            image_size,
            patch_size,
        };
        Ok((clip, file.digest()))
    }

    /// Its text encoder's settings.
    pub fn text_config(&self) -> &TextEncoderConfig {
        &self.text_config
    }

    /// The side of the pictures that it takes, in pixels.
    pub fn image_size(&self) -> usize {
        self.image_size
    }

    /// `pixels` [N, 3, H, W], normalised -> features [N, d], not normalised.
    pub fn image_features(&self, pixels: &Tensor) -> Result<Tensor> {
        let (n, p) = (pixels.dim(0)?, self.patch_size);
        let grid = self.image_size / p;
        // A convolution whose stride is its kernel is a Linear on each patch.
        let patches = pixels.reshape((n, 3, grid, p, grid, p))?.permute((0, 2, 4, 1, 3, 5))?.contiguous()?;
        let patches = ops::linear(&patches.reshape((n, grid * grid, 3 * p * p))?, &self.patch_embedding, None)?;
        let class = self.class_embedding.reshape((1, 1, ()))?.repeat((n, 1, 1))?;
        let h = Tensor::cat(&[class, patches], 1)?.broadcast_add(&self.vision_positions)?;
        let h = self.vision_encoder.forward(&self.pre_layer_norm.forward(&h)?)?;
        let pooled = self.post_layer_norm.forward(&h.narrow(1, 0, 1)?.squeeze(1)?.contiguous()?)?;
        Ok(ops::linear(&pooled, &self.visual_projection, None)?)
    }

    /// Prompts as token ids, each with its end token -> features [N, d], not normalised.
    pub fn text_features(&self, prompts: &[Vec<u32>]) -> Result<Tensor> {
        // The mask is causal: what follows the end token does not change its state.
        let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
        let padded: Vec<u32> =
            prompts.iter().flat_map(|ids| ids.iter().copied().chain([0].into_iter().cycle()).take(longest)).collect();
        let ids = Tensor::from_vec(padded, prompts.len() * longest, self.token_embedding.device())?;
        let h = self.token_embedding.index_select(&ids, 0)?.reshape((prompts.len(), longest, ()))?;
        let h = h.broadcast_add(&self.text_positions.narrow(0, 0, longest)?)?;
        let h = self.final_layer_norm.forward(&self.text_encoder.forward(&h)?)?;
        let mut pooled = Vec::with_capacity(prompts.len());
        for (i, ids) in prompts.iter().enumerate() {
            pooled.push(h.narrow(0, i, 1)?.narrow(1, self.end_of(ids), 1)?.squeeze(1)?);
        }
        Ok(ops::linear(&Tensor::cat(&pooled, 0)?, &self.text_projection, None)?)
    }

    /// Where the prompt ends: at its first end token. Configs older than transformers 4.31 say 2, which is wrong;
    /// their end token is the highest of all.
    fn end_of(&self, ids: &[u32]) -> usize {
        let end = match self.eos_token_id {
            None | Some(2) => ids.iter().copied().max().unwrap_or(0),
            Some(end) => end,
        };
        ids.iter().position(|&id| id == end).unwrap_or(ids.len() - 1)
    }
}

fn part<T: DeserializeOwned>(path: &Path, field: &str) -> Result<T> {
    let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
    let invalid = |reason: String| Error::invalid_file(path, reason);
    let mut config: Value = serde_json::from_slice(&bytes).map_err(|e| invalid(format!("not JSON: {e}")))?;
    let part = config.get_mut(field).map(Value::take).ok_or_else(|| {
        invalid(format!("{field} is missing; the folder must hold a CLIPModel with both a text and a vision encoder"))
    })?;
    serde_json::from_value(part).map_err(|e| invalid(format!("{field}: {e}")))
}

impl EncoderConfig {
    fn check(&self, path: &Path, part: &str) -> Result<Activation> {
        let Self { hidden_size, num_attention_heads: heads, num_hidden_layers: layers, .. } = self;
        if *heads == 0 || hidden_size % heads != 0 || *layers > 1000 {
            let reason = format!("{part}: {layers} layers of {heads} attention heads on {hidden_size} channels");
            return Err(Error::invalid_file(path, reason));
        }
        match self.hidden_act.as_str() {
            "quick_gelu" => Ok(Activation::QuickGelu),
            "gelu" => Ok(Activation::Gelu),
            other => Err(Error::Unsupported {
                path: path.to_owned(),
                field: format!("{part}.hidden_act"),
                value: other.to_owned(),
                supported: "quick_gelu and gelu are".into(),
            }),
        }
    }
}

/// A place in the weight file.
struct Weights<'a> {
    file: &'a Arc<WeightFile>,
    device: &'a Device,
    prefix: String,
}

impl Weights<'_> {
    fn at(&self, name: impl std::fmt::Display) -> Self {
        Self { prefix: format!("{}{name}.", self.prefix), ..*self }
    }

    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let view = self.file.view(&format!("{}{name}", self.prefix))?;
        view.expect_shape(shape)?;
        view.load(DType::F32, self.device)
    }

    fn linear(&self, name: &str, inputs: usize, outputs: usize) -> Result<Linear> {
        let at = self.at(name);
        Ok(Linear { weight: at.tensor("weight", &[outputs, inputs])?, bias: at.tensor("bias", &[outputs])? })
    }

    fn layer_norm(&self, name: &str, config: &EncoderConfig) -> Result<LayerNorm> {
        let (at, shape) = (self.at(name), [config.hidden_size]);
        let (weight, bias) = (at.tensor("weight", &shape)?, at.tensor("bias", &shape)?);
        Ok(LayerNorm { weight, bias, eps: config.layer_norm_eps })
    }
}

struct Linear {
    weight: Tensor,
    bias: Tensor,
}

impl Linear {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        ops::linear(x, &self.weight, Some(&self.bias))
    }
}

/// `CLIPEncoder`: layers of self-attention and an MLP, each after a layer norm and around a skip.
struct Encoder {
    layers: Vec<EncoderLayer>,
    heads: usize,
    activation: Activation,
    causal: bool,
}

struct EncoderLayer {
    layer_norm1: LayerNorm,
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    out_proj: Linear,
    layer_norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
}

impl Encoder {
    fn load(weights: &Weights, config: &EncoderConfig, activation: Activation, causal: bool) -> Result<Self> {
        let (width, mlp) = (config.hidden_size, config.intermediate_size);
        let layer = |i: usize| {
            let layer = weights.at("encoder.layers").at(i);
            let attention = layer.at("self_attn");
            Ok(EncoderLayer {
                layer_norm1: layer.layer_norm("layer_norm1", config)?,
                q_proj: attention.linear("q_proj", width, width)?,
                k_proj: attention.linear("k_proj", width, width)?,
                v_proj: attention.linear("v_proj", width, width)?,
                out_proj: attention.linear("out_proj", width, width)?,
                layer_norm2: layer.layer_norm("layer_norm2", config)?,
                fc1: layer.linear("mlp.fc1", width, mlp)?,
                fc2: layer.linear("mlp.fc2", mlp, width)?,
            })
        };
        let layers = (0..config.num_hidden_layers).map(layer).collect::<Result<_>>()?;
        Ok(Self { layers, heads: config.num_attention_heads, activation, causal })
    }

    /// `x` [N, T, width] -> the same shape.
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let mut x = x.clone();
        for layer in &self.layers {
            let h = layer.layer_norm1.forward(&x)?;
            let (q, k, v) = (layer.q_proj.forward(&h)?, layer.k_proj.forward(&h)?, layer.v_proj.forward(&h)?);
            let scale = ((q.dim(2)? / self.heads) as f64).powf(-0.5);
            x = (x + layer.out_proj.forward(&ops::attention(&q, &k, &v, self.heads, scale, self.causal)?)?)?;
            let h = layer.fc1.forward(&layer.layer_norm2.forward(&x)?)?;
            let h = match self.activation {
                Activation::QuickGelu => ops::quick_gelu(&h)?,
                Activation::Gelu => ops::gelu(&h)?,
            };
            x = (x + layer.fc2.forward(&h)?)?;
        }
        Ok(x)
    }
}
