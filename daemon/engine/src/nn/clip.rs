//! transformers' `CLIPTextModel`.

use candle_core::{DType, Result, Tensor};

use super::loader::Scope;
use super::{Forward, LayerNorm, Linear};
use crate::error;
use crate::model::config::{Activation, TextEncoderConfig};
use crate::ops;

/// `CLIPEncoderLayer`: causal self-attention and an MLP, each after a layer norm and around a skip.
#[derive(Clone, Debug)]
struct EncoderLayer {
    layer_norm1: LayerNorm,
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    out_proj: Linear,
    layer_norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    heads: usize,
    activation: Activation,
}

impl EncoderLayer {
    fn load(scope: &Scope, config: &TextEncoderConfig) -> error::Result<Self> {
        let (width, mlp) = (config.hidden_size, config.intermediate_size);
        let attention = scope.at("self_attn");
        Ok(Self {
            layer_norm1: scope.at("layer_norm1").layer_norm(width, config.layer_norm_eps)?,
            q_proj: attention.at("q_proj").adaptable_linear(width, width, true)?,
            k_proj: attention.at("k_proj").adaptable_linear(width, width, true)?,
            v_proj: attention.at("v_proj").adaptable_linear(width, width, true)?,
            out_proj: attention.at("out_proj").adaptable_linear(width, width, true)?,
            layer_norm2: scope.at("layer_norm2").layer_norm(width, config.layer_norm_eps)?,
            fc1: scope.at("mlp.fc1").adaptable_linear(width, mlp, true)?,
            fc2: scope.at("mlp.fc2").adaptable_linear(mlp, width, true)?,
            heads: config.num_attention_heads,
            activation: config.hidden_act,
        })
    }

    fn forward(&self, x: &Tensor, with: &Forward) -> Result<Tensor> {
        let h = self.layer_norm1.forward(x)?;
        let q = self.q_proj.forward(&h, with)?;
        let k = self.k_proj.forward(&h, with)?;
        let v = self.v_proj.forward(&h, with)?;
        let scale = ((q.dim(2)? / self.heads) as f64).powf(-0.5);
        let h = ops::attention(&q, &k, &v, self.heads, scale, true)?;
        let x = (x + self.out_proj.forward(&h, with)?)?;
        let h = self.fc1.forward(&self.layer_norm2.forward(&x)?, with)?;
        let h = match self.activation {
            Activation::QuickGelu => ops::quick_gelu(&h)?,
            Activation::Gelu => ops::gelu(&h)?,
        };
        &x + self.fc2.forward(&h, with)?
    }
}

/// The prompt encoder.
#[derive(Clone, Debug)]
pub struct ClipTextEncoder {
    token_embedding: Tensor,
    position_embedding: Tensor,
    layers: Vec<EncoderLayer>,
    final_layer_norm: LayerNorm,
    config: TextEncoderConfig,
}

impl ClipTextEncoder {
    /// Loads the encoder that `config` describes. Errors name the tensor that is missing or of another shape.
    pub fn load(scope: &Scope, config: &TextEncoderConfig) -> error::Result<Self> {
        let scope = scope.at("text_model");
        let embeddings = scope.at("embeddings");
        let width = config.hidden_size;
        let mut layers = Vec::new();
        for i in 0..config.num_hidden_layers {
            layers.push(EncoderLayer::load(&scope.at("encoder.layers").at(i), config)?);
        }
        Ok(Self {
            token_embedding: embeddings.tensor("token_embedding.weight", &[config.vocab_size, width])?,
            position_embedding: embeddings
                .tensor("position_embedding.weight", &[config.max_position_embeddings, width])?,
            layers,
            final_layer_norm: scope.at("final_layer_norm").layer_norm(width, config.layer_norm_eps)?,
            config: config.clone(),
        })
    }

    /// Its config.
    pub fn config(&self) -> &TextEncoderConfig {
        &self.config
    }

    /// Token embeddings only, without positions, in f32: `ids` [N, T] (u32) -> [N, T, d].
    pub fn embed(&self, ids: &Tensor) -> Result<Tensor> {
        let (batch, tokens) = ids.dims2()?;
        let rows = self.token_embedding.index_select(&ids.flatten_all()?, 0)?;
        rows.to_dtype(DType::F32)?.reshape((batch, tokens, self.config.hidden_size))
    }

    /// Adds positions to `embeddings` [N, T, d], runs all layers under the causal mask and the final layer norm
    /// -> [N, T, d].
    pub fn forward(&self, embeddings: &Tensor, with: &Forward) -> Result<Tensor> {
        let tokens = embeddings.dim(1)?;
        let positions = self.position_embedding.narrow(0, 0, tokens)?.to_dtype(DType::F32)?;
        let mut h = embeddings.broadcast_add(&positions)?;
        for layer in &self.layers {
            h = layer.forward(&h, with)?;
        }
        self.final_layer_norm.forward(&h)
    }
}
