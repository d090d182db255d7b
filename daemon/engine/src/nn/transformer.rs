//! diffusers' `Transformer2DModel` and its `BasicTransformerBlock`.

use candle_core::{Result, Tensor};

use super::loader::Scope;
use super::{Conditioning, Conv2d, Forward, GroupNorm, LayerNorm, Linear};
use crate::error;
use crate::ops;

/// Multi-head attention, self or cross.
#[derive(Clone, Debug)]
pub struct Attention {
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
    heads: usize,
}

impl Attention {
    fn load(scope: &Scope, width: usize, context: usize, heads: usize) -> error::Result<Self> {
        Ok(Self {
            to_q: scope.at("to_q").adaptable_linear(width, width, false)?,
            to_k: scope.at("to_k").adaptable_linear(context, width, false)?,
            to_v: scope.at("to_v").adaptable_linear(context, width, false)?,
            to_out: scope.at("to_out.0").adaptable_linear(width, width, true)?,
            heads,
        })
    }

    /// `x` [B, T, n] attends to `context` [B, S, d] -> [B, T, n].
    fn forward(&self, x: &Tensor, context: &Tensor, with: &Forward) -> Result<Tensor> {
        let q = self.to_q.forward(x, with)?;
        let k = self.to_k.forward(context, with)?;
        let v = self.to_v.forward(context, with)?;
        let scale = ((q.dim(2)? / self.heads) as f64).powf(-0.5);
        self.to_out.forward(&ops::attention(&q, &k, &v, self.heads, scale, false)?, with)
    }
}

/// `FeedForward` with GEGLU: n -> 2 * 4n -> 4n -> n.
#[derive(Clone, Debug)]
struct FeedForward {
    proj: Linear,
    out: Linear,
}

impl FeedForward {
    fn load(scope: &Scope, width: usize) -> error::Result<Self> {
        Ok(Self {
            proj: scope.at("net.0.proj").adaptable_linear(width, 8 * width, true)?,
            out: scope.at("net.2").adaptable_linear(4 * width, width, true)?,
        })
    }

    fn forward(&self, x: &Tensor, with: &Forward) -> Result<Tensor> {
        self.out.forward(&ops::geglu(&self.proj.forward(x, with)?)?, with)
    }
}

/// Self-attention, cross-attention and feed-forward, each after a layer norm and around a skip.
#[derive(Clone, Debug)]
struct BasicTransformerBlock {
    norm1: LayerNorm,
    attn1: Attention,
    norm2: LayerNorm,
    attn2: Attention,
    norm3: LayerNorm,
    ff: FeedForward,
    /// Which encoding of a layer-wise prompt attn2 reads.
    cross_attention: usize,
}

impl BasicTransformerBlock {
    fn load(scope: &Scope, width: usize, settings: &TransformerSettings, index: usize) -> error::Result<Self> {
        const EPS: f64 = 1e-5;
        Ok(Self {
            norm1: scope.at("norm1").layer_norm(width, EPS)?,
            attn1: Attention::load(&scope.at("attn1"), width, width, settings.heads)?,
            norm2: scope.at("norm2").layer_norm(width, EPS)?,
            attn2: Attention::load(&scope.at("attn2"), width, settings.cross_attention_dim, settings.heads)?,
            norm3: scope.at("norm3").layer_norm(width, EPS)?,
            ff: FeedForward::load(&scope.at("ff"), width)?,
            cross_attention: index,
        })
    }

    fn forward(&self, x: &Tensor, context: &Conditioning, with: &Forward) -> Result<Tensor> {
        let context = context.layer(self.cross_attention)?;
        let h = self.norm1.forward(x)?;
        let x = (x + self.attn1.forward(&h, &h, with)?)?;
        let x = (&x + self.attn2.forward(&self.norm2.forward(&x)?, context, with)?)?;
        &x + self.ff.forward(&self.norm3.forward(&x)?, with)?
    }
}

/// What a [`Transformer2DModel`] is built from.
#[derive(Clone, Copy, Debug)]
pub struct TransformerSettings {
    /// Attention heads.
    pub heads: usize,
    /// Number of `BasicTransformerBlock`s.
    pub layers: usize,
    /// Width of the prompt encoding.
    pub cross_attention_dim: usize,
    /// Groups of the normalisation.
    pub groups: usize,
    /// Projections are Linears (SD 2) instead of 1x1 convolutions (SD 1).
    pub use_linear_projection: bool,
}

#[derive(Clone, Debug)]
enum Projection {
    Conv(Conv2d),
    Linear(Linear),
}

impl Projection {
    fn load(scope: &Scope, width: usize, linear: bool) -> error::Result<Self> {
        Ok(if linear {
            Self::Linear(scope.adaptable_linear(width, width, true)?)
        } else {
            Self::Conv(scope.conv2d(width, width, 1, 1, 0)?)
        })
    }
}

/// Transformer blocks over the pixels of a feature map.
#[derive(Clone, Debug)]
pub struct Transformer2DModel {
    norm: GroupNorm,
    proj_in: Projection,
    transformer_blocks: Vec<BasicTransformerBlock>,
    proj_out: Projection,
}

impl Transformer2DModel {
    /// Loads one of `width` channels; `cross_attentions` counts the cross-attentions of the model so far.
    pub fn load(
        scope: &Scope,
        width: usize,
        settings: &TransformerSettings,
        cross_attentions: &mut usize,
    ) -> error::Result<Self> {
        let linear = settings.use_linear_projection;
        let norm = scope.at("norm").group_norm(width, settings.groups, 1e-6)?;
        let proj_in = Projection::load(&scope.at("proj_in"), width, linear)?;
        let mut transformer_blocks = Vec::new();
        for i in 0..settings.layers {
            let scope = scope.at("transformer_blocks").at(i);
            transformer_blocks.push(BasicTransformerBlock::load(&scope, width, settings, *cross_attentions)?);
            *cross_attentions += 1;
        }
        Ok(Self {
            norm,
            proj_in,
            transformer_blocks,
            proj_out: Projection::load(&scope.at("proj_out"), width, linear)?,
        })
    }

    /// `x` [B, C, H, W] -> the same shape.
    pub fn forward(&self, x: &Tensor, context: &Conditioning, with: &Forward) -> Result<Tensor> {
        let (_, _, height, width) = x.dims4()?;
        let h = self.norm.forward(x)?;
        let mut h = match &self.proj_in {
            Projection::Conv(conv) => to_tokens(&conv.forward(&h)?)?,
            Projection::Linear(linear) => linear.forward(&to_tokens(&h)?, with)?,
        };
        for block in &self.transformer_blocks {
            h = block.forward(&h, context, with)?;
        }
        let h = match &self.proj_out {
            Projection::Conv(conv) => conv.forward(&to_pixels(&h, height, width)?)?,
            Projection::Linear(linear) => to_pixels(&linear.forward(&h, with)?, height, width)?,
        };
        h + x
    }
}

/// [B, C, H, W] -> [B, H W, C].
pub fn to_tokens(x: &Tensor) -> Result<Tensor> {
    x.flatten_from(2)?.transpose(1, 2)?.contiguous()
}

/// [B, H W, C] -> [B, C, H, W].
pub fn to_pixels(x: &Tensor, height: usize, width: usize) -> Result<Tensor> {
    let (batch, _, channels) = x.dims3()?;
    x.transpose(1, 2)?.contiguous()?.reshape((batch, channels, height, width))
}
