//! `text_encoder/config.json`.

use std::path::Path;

use super::Fields;
use crate::error::Result;

/// The activation between the Linears of CLIP's MLPs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// x * sigmoid(1.702 x), as in SD 1.
    QuickGelu,
    /// GELU with erf, as in SD 2.
    Gelu,
}

/// The settings of a `CLIPTextModel`, with transformers' defaults filled in.
#[derive(Clone, Debug, PartialEq)]
pub struct TextEncoderConfig {
    /// Number of tokens.
    pub vocab_size: usize,
    /// Width d of the encoding.
    pub hidden_size: usize,
    /// Width between the Linears of the MLPs.
    pub intermediate_size: usize,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Attention heads.
    pub num_attention_heads: usize,
    /// Longest prompt T, begin and end included.
    pub max_position_embeddings: usize,
    /// Activation of the MLPs.
    pub hidden_act: Activation,
    /// Epsilon of the layer normalisations.
    pub layer_norm_eps: f64,
}

impl TextEncoderConfig {
    /// Reads `text_encoder/config.json`. Unlike the diffusers configs, transformers' carry settings of text generation
    /// and of other model types, so only what CLIPTextModel reads is looked at.
    pub fn open(path: &Path) -> Result<Self> {
        let mut fields = Fields::open(path)?;
        let types: Vec<String> = fields.or("architectures", vec!["CLIPTextModel".into()])?;
        if types != ["CLIPTextModel"] {
            return Err(fields.unsupported("architectures", types.join(", "), "only CLIPTextModel"));
        }
        fields.only("model_type", "clip_text_model")?;
        let config = Self {
            vocab_size: fields.size_or("vocab_size", 49408)?,
            hidden_size: fields.size_or("hidden_size", 512)?,
            intermediate_size: fields.size_or("intermediate_size", 2048)?,
            num_hidden_layers: fields.size_or("num_hidden_layers", 12)?,
            num_attention_heads: fields.size_or("num_attention_heads", 8)?,
            max_position_embeddings: fields.size_or("max_position_embeddings", 77)?,
            hidden_act: match fields.or("hidden_act", "quick_gelu".to_owned())?.as_str() {
                "quick_gelu" => Activation::QuickGelu,
                "gelu" => Activation::Gelu,
                other => return Err(fields.unsupported("hidden_act", other, "quick_gelu and gelu are")),
            },
            layer_norm_eps: fields.number_or("layer_norm_eps", 1e-5)?,
        };
        if !config.hidden_size.is_multiple_of(config.num_attention_heads) {
            let reason = format!("{} heads do not divide {}", config.num_attention_heads, config.hidden_size);
            return Err(fields.invalid("num_attention_heads", reason));
        }
        Ok(config)
    }
}
