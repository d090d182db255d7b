//! diffusers' `ResnetBlock2D`, `Downsample2D` and `Upsample2D`.

use candle_core::{Result, Tensor};

use super::loader::Scope;
use super::{Conv2d, GroupNorm, Linear};
use crate::error;
use crate::nn::Forward;
use crate::ops;

/// `ResnetBlock2D` with "default" time scaling: two 3x3 convolutions, each after group norm and SiLU, around a skip.
#[derive(Clone, Debug)]
pub struct ResnetBlock2D {
    norm1: GroupNorm,
    conv1: Conv2d,
    time_emb_proj: Option<Linear>,
    norm2: GroupNorm,
    conv2: Conv2d,
    conv_shortcut: Option<Conv2d>,
    output_scale_factor: f64,
}

/// What the resnets of one model have in common.
#[derive(Clone, Copy, Debug)]
pub struct ResnetSettings {
    /// Width of the time embedding; none in the VAE.
    pub time_embedding: Option<usize>,
    /// Groups of both normalisations.
    pub groups: usize,
    /// Epsilon of both normalisations.
    pub eps: f64,
    /// Divides the output.
    pub output_scale_factor: f64,
}

impl ResnetBlock2D {
    /// Loads a block from `inputs` to `outputs` channels.
    pub fn load(scope: &Scope, inputs: usize, outputs: usize, settings: ResnetSettings) -> error::Result<Self> {
        let ResnetSettings { time_embedding, groups, eps, output_scale_factor } = settings;
        Ok(Self {
            norm1: scope.at("norm1").group_norm(inputs, groups, eps)?,
            conv1: scope.at("conv1").conv2d(inputs, outputs, 3, 1, 1)?,
            time_emb_proj: match time_embedding {
                Some(width) => Some(scope.at("time_emb_proj").linear(width, outputs, true)?),
                None => None,
            },
            norm2: scope.at("norm2").group_norm(outputs, groups, eps)?,
            conv2: scope.at("conv2").conv2d(outputs, outputs, 3, 1, 1)?,
            conv_shortcut: if inputs == outputs {
                None
            } else {
                Some(scope.at("conv_shortcut").conv2d(inputs, outputs, 1, 1, 0)?)
            },
            output_scale_factor,
        })
    }

    /// `x` [B, C, H, W], `temb` [B, time_embedding] (none in the VAE) -> [B, outputs, H, W].
    pub fn forward(&self, x: &Tensor, temb: Option<&Tensor>) -> Result<Tensor> {
        let mut h = self.conv1.forward(&self.norm1.forward_silu(x)?)?;
        if let (Some(time_emb_proj), Some(temb)) = (&self.time_emb_proj, temb) {
            let shift = time_emb_proj.forward(&ops::silu(temb)?, &Forward::default())?;
            h = h.broadcast_add(&shift.unsqueeze(2)?.unsqueeze(3)?)?;
        }
        let h = self.conv2.forward(&self.norm2.forward_silu(&h)?)?;
        let y = match &self.conv_shortcut {
            Some(conv) => (conv.forward(x)? + h)?,
            None => (x + h)?,
        };
        if self.output_scale_factor == 1.0 { Ok(y) } else { y / self.output_scale_factor }
    }
}

/// `Downsample2D` of the VAE: pads right and below only, then a 3x3 convolution of stride 2.
pub fn downsample_padded_right(conv: &Conv2d, x: &Tensor) -> Result<Tensor> {
    conv.forward(&x.pad_with_zeros(3, 0, 1)?.pad_with_zeros(2, 0, 1)?)
}

/// `Upsample2D`: nearest neighbour to twice the size, or to `size` (H, W) where a skip connection is one smaller,
/// then a 3x3 convolution.
pub fn upsample(conv: &Conv2d, x: &Tensor, size: Option<(usize, usize)>) -> Result<Tensor> {
    let mut y = ops::upsample_nearest2x(x)?;
    if let Some((height, width)) = size {
        // Nearest interpolation from n to 2n - 1 repeats the same sources as to 2n, less the last one.
        if (y.dim(2)?, y.dim(3)?) != (height, width) {
            y = y.narrow(2, 0, height)?.narrow(3, 0, width)?.contiguous()?;
        }
    }
    conv.forward(&y)
}
