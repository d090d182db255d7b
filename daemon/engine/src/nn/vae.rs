//! diffusers' `AutoencoderKL`.

use candle_core::{Result, Tensor};

use super::loader::Scope;
use super::resnet::{ResnetBlock2D, ResnetSettings, downsample_padded_right, upsample};
use super::transformer::{to_pixels, to_tokens};
use super::{Conv2d, Forward, GroupNorm, Linear};
use crate::error;
use crate::model::config::VaeConfig;
use crate::ops;

const EPS: f64 = 1e-6;

/// Elements of a feature map beside which memory that is kept for later counts, and the time of getting it anew does not.
const LARGE: usize = 1 << 25;

/// Single-head attention over the pixels of the middle block.
#[derive(Clone, Debug)]
struct PixelAttention {
    group_norm: GroupNorm,
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
}

impl PixelAttention {
    /// Files written before diffusers 0.18 name the projections `query`, `key`, `value`, `proj_attn`.
    fn load(scope: &Scope, width: usize, groups: usize) -> error::Result<Self> {
        let linear = |name: &str, old: &str| {
            let old_file = scope.has(&format!("{old}.weight"));
            scope.at(if old_file { old } else { name }).linear(width, width, true)
        };
        Ok(Self {
            group_norm: scope.at("group_norm").group_norm(width, groups, EPS)?,
            to_q: linear("to_q", "query")?,
            to_k: linear("to_k", "key")?,
            to_v: linear("to_v", "value")?,
            to_out: linear("to_out.0", "proj_attn")?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (_, channels, height, width) = x.dims4()?;
        let none = Forward::default();
        let h = to_tokens(&self.group_norm.forward(x)?)?;
        let q = self.to_q.forward(&h, &none)?;
        let k = self.to_k.forward(&h, &none)?;
        let v = self.to_v.forward(&h, &none)?;
        let h = ops::attention(&q, &k, &v, 1, (channels as f64).powf(-0.5), false)?;
        x + to_pixels(&self.to_out.forward(&h, &none)?, height, width)?
    }
}

/// `UNetMidBlock2D`.
#[derive(Clone, Debug)]
struct MidBlock {
    resnets: [ResnetBlock2D; 2],
    attention: Option<PixelAttention>,
}

impl MidBlock {
    fn load(scope: &Scope, width: usize, config: &VaeConfig) -> error::Result<Self> {
        let resnet = |i| ResnetBlock2D::load(&scope.at("resnets").at(i), width, width, config.resnet());
        Ok(Self {
            resnets: [resnet(0)?, resnet(1)?],
            attention: if config.mid_block_add_attention {
                Some(PixelAttention::load(&scope.at("attentions.0"), width, config.norm_num_groups)?)
            } else {
                None
            },
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut h = self.resnets[0].forward(x, None)?;
        if let Some(attention) = &self.attention {
            h = attention.forward(&h)?;
        }
        self.resnets[1].forward(&h, None)
    }
}

/// `DownEncoderBlock2D` (the convolution halves the size) or `UpDecoderBlock2D` (it follows a doubling).
#[derive(Clone, Debug)]
struct Block {
    resnets: Vec<ResnetBlock2D>,
    resize: Option<Conv2d>,
}

impl VaeConfig {
    fn resnet(&self) -> ResnetSettings {
        ResnetSettings { time_embedding: None, groups: self.norm_num_groups, eps: EPS, output_scale_factor: 1.0 }
    }
}

#[derive(Clone, Debug)]
struct Encoder {
    conv_in: Conv2d,
    down_blocks: Vec<Block>,
    mid_block: MidBlock,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl Encoder {
    fn load(scope: &Scope, config: &VaeConfig) -> error::Result<Self> {
        let channels = &config.block_out_channels;
        let mut inputs = channels[0];
        let mut down_blocks = Vec::new();
        for (i, &outputs) in channels.iter().enumerate() {
            let scope = scope.at("down_blocks").at(i);
            let mut resnets = Vec::new();
            for j in 0..config.layers_per_block {
                resnets.push(ResnetBlock2D::load(&scope.at("resnets").at(j), inputs, outputs, config.resnet())?);
                inputs = outputs;
            }
            let resize = if i + 1 < channels.len() {
                Some(scope.at("downsamplers.0.conv").conv2d(outputs, outputs, 3, 2, 0)?)
            } else {
                None
            };
            down_blocks.push(Block { resnets, resize });
        }
        Ok(Self {
            conv_in: scope.at("conv_in").conv2d(config.in_channels, channels[0], 3, 1, 1)?,
            down_blocks,
            mid_block: MidBlock::load(&scope.at("mid_block"), inputs, config)?,
            conv_norm_out: scope.at("conv_norm_out").group_norm(inputs, config.norm_num_groups, EPS)?,
            conv_out: scope.at("conv_out").conv2d(inputs, 2 * config.latent_channels, 3, 1, 1)?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut h = self.conv_in.forward(x)?;
        for block in &self.down_blocks {
            for resnet in &block.resnets {
                h = resnet.forward(&h, None)?;
            }
            if let Some(conv) = &block.resize {
                h = downsample_padded_right(conv, &h)?;
            }
        }
        let h = self.mid_block.forward(&h)?;
        self.conv_out.forward(&self.conv_norm_out.forward_silu(&h)?)
    }
}

#[derive(Clone, Debug)]
struct Decoder {
    conv_in: Conv2d,
    mid_block: MidBlock,
    up_blocks: Vec<Block>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl Decoder {
    fn load(scope: &Scope, config: &VaeConfig) -> error::Result<Self> {
        let channels = &config.block_out_channels;
        let last = channels[channels.len() - 1];
        let mut inputs = last;
        let mut up_blocks = Vec::new();
        for (i, &outputs) in channels.iter().rev().enumerate() {
            let scope = scope.at("up_blocks").at(i);
            let mut resnets = Vec::new();
            for j in 0..config.layers_per_block + 1 {
                resnets.push(ResnetBlock2D::load(&scope.at("resnets").at(j), inputs, outputs, config.resnet())?);
                inputs = outputs;
            }
            let resize = if i + 1 < channels.len() {
                Some(scope.at("upsamplers.0.conv").conv2d(outputs, outputs, 3, 1, 1)?)
            } else {
                None
            };
            up_blocks.push(Block { resnets, resize });
        }
        Ok(Self {
            conv_in: scope.at("conv_in").conv2d(config.latent_channels, last, 3, 1, 1)?,
            mid_block: MidBlock::load(&scope.at("mid_block"), last, config)?,
            up_blocks,
            conv_norm_out: scope.at("conv_norm_out").group_norm(channels[0], config.norm_num_groups, EPS)?,
            conv_out: scope.at("conv_out").conv2d(channels[0], config.out_channels, 3, 1, 1)?,
        })
    }

    fn forward(&self, z: &Tensor) -> Result<Tensor> {
        let mut h = self.mid_block.forward(&self.conv_in.forward(z)?)?;
        for block in &self.up_blocks {
            // Tensors of the levels before, and of the UNet, are of other sizes and would not make room for these.
            if h.elem_count() >= LARGE {
                ops::give_back_freed_pages();
            }
            for resnet in &block.resnets {
                h = resnet.forward(&h, None)?;
            }
            if let Some(conv) = &block.resize {
                h = upsample(conv, &h, None)?;
            }
        }
        self.conv_out.forward(&self.conv_norm_out.forward_silu(&h)?)
    }
}

/// The autoencoder between pictures and latents.
#[derive(Clone, Debug)]
pub struct Vae {
    encoder: Encoder,
    decoder: Decoder,
    quant_conv: Option<Conv2d>,
    post_quant_conv: Option<Conv2d>,
    config: VaeConfig,
}

impl Vae {
    /// Loads the autoencoder that `config` describes. Errors name the tensor that is missing or of another shape.
    pub fn load(scope: &Scope, config: &VaeConfig) -> error::Result<Self> {
        let latent = config.latent_channels;
        Ok(Self {
            encoder: Encoder::load(&scope.at("encoder"), config)?,
            decoder: Decoder::load(&scope.at("decoder"), config)?,
            quant_conv: if config.use_quant_conv {
                Some(scope.at("quant_conv").conv2d(2 * latent, 2 * latent, 1, 1, 0)?)
            } else {
                None
            },
            post_quant_conv: if config.use_post_quant_conv {
                Some(scope.at("post_quant_conv").conv2d(latent, latent, 1, 1, 0)?)
            } else {
                None
            },
            config: config.clone(),
        })
    }

    /// Its config.
    pub fn config(&self) -> &VaeConfig {
        &self.config
    }

    /// Latents are multiplied by this before the UNet sees them.
    pub fn scaling_factor(&self) -> f64 {
        self.config.scaling_factor
    }

    /// Pixels per latent in each direction.
    pub fn downscale(&self) -> usize {
        1 << (self.config.block_out_channels.len() - 1)
    }

    /// Pictures `x` [B, 3, H, W] in -1..1 -> mean and log variance of the posterior, each [B, C, H/f, W/f], unscaled.
    pub fn encode(&self, x: &Tensor) -> Result<(Tensor, Tensor)> {
        let mut moments = self.encoder.forward(x)?;
        if let Some(conv) = &self.quant_conv {
            moments = conv.forward(&moments)?;
        }
        let channels = self.config.latent_channels;
        let mean = moments.narrow(1, 0, channels)?.contiguous()?;
        let logvar = moments.narrow(1, channels, channels)?.contiguous()?.clamp(-30f32, 20f32)?;
        Ok((mean, logvar))
    }

    /// Unscaled latents `z` [B, C, h, w] -> pictures [B, 3, h f, w f], about -1..1.
    pub fn decode(&self, z: &Tensor) -> Result<Tensor> {
        match &self.post_quant_conv {
            Some(conv) => self.decoder.forward(&conv.forward(z)?),
            None => self.decoder.forward(z),
        }
    }
}
