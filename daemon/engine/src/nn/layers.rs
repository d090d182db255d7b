//! The frozen building blocks: convolution and the two normalisations.

use candle_core::{Result, Tensor};

use crate::ops::{self, Frozen};

/// A convolution with zero padding and a square kernel.
#[derive(Clone, Debug)]
pub struct Conv2d {
    /// [O, C, k, k].
    pub weight: Frozen,
    /// `[O]`.
    pub bias: Option<Tensor>,
    /// In both directions.
    pub stride: usize,
    /// On all four sides.
    pub padding: usize,
}

impl Conv2d {
    /// `x` [B, C, H, W] -> [B, O, H', W'].
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::conv2d(x, &self.weight, self.bias.as_ref(), self.stride, self.padding)
    }
}

/// Group normalisation with scale and shift by channel.
#[derive(Clone, Debug)]
pub struct GroupNorm {
    /// `[C]`.
    pub weight: Tensor,
    /// `[C]`.
    pub bias: Tensor,
    /// Number of groups; divides C.
    pub groups: usize,
    /// Added to the variance.
    pub eps: f64,
}

impl GroupNorm {
    /// `x` [B, C, ...] -> the same shape.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::group_norm(x, &self.weight, &self.bias, self.groups, self.eps, false)
    }

    /// The normalisation followed by SiLU. `x` [B, C, ...] -> the same shape.
    pub fn forward_silu(&self, x: &Tensor) -> Result<Tensor> {
        ops::group_norm(x, &self.weight, &self.bias, self.groups, self.eps, true)
    }
}

/// Layer normalisation over the last dimension.
#[derive(Clone, Debug)]
pub struct LayerNorm {
    /// `[n]`.
    pub weight: Tensor,
    /// `[n]`.
    pub bias: Tensor,
    /// Added to the variance.
    pub eps: f64,
}

impl LayerNorm {
    /// `x` [..., n] -> the same shape.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::layer_norm(x, &self.weight, &self.bias, self.eps)
    }
}
