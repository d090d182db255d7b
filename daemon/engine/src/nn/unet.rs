//! diffusers' `UNet2DConditionModel`: the parts that Stable Diffusion 1 and 2 use.

use candle_core::{DType, Tensor};

use super::loader::Scope;
use super::resnet::{ResnetBlock2D, ResnetSettings, upsample};
use super::transformer::{Transformer2DModel, TransformerSettings};
use super::{Conditioning, Conv2d, Forward, GroupNorm, Linear};
use crate::error::{Error, Result};
use crate::model::config::UNetConfig;
use crate::ops;

/// `CrossAttnDownBlock2D`, or `DownBlock2D` where there are no attentions.
#[derive(Clone, Debug)]
struct DownBlock {
    resnets: Vec<ResnetBlock2D>,
    attentions: Vec<Transformer2DModel>,
    downsampler: Option<Conv2d>,
}

/// `UNetMidBlock2DCrossAttn`.
#[derive(Clone, Debug)]
struct MidBlock {
    resnets: Vec<ResnetBlock2D>,
    attentions: Vec<Transformer2DModel>,
}

/// `CrossAttnUpBlock2D`, or `UpBlock2D` where there are no attentions.
#[derive(Clone, Debug)]
struct UpBlock {
    resnets: Vec<ResnetBlock2D>,
    attentions: Vec<Transformer2DModel>,
    upsampler: Option<Conv2d>,
}

/// A stretch of the forward pass; the numbers are those of block and resnet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Segment {
    In,
    Down(usize, usize),
    Downsample(usize),
    Middle,
    Up(usize, usize),
    Upsample(usize),
    Out,
}

impl Segment {
    /// Whether its output is kept for the way up.
    pub(super) fn gives_skip(self) -> bool {
        matches!(self, Self::In | Self::Down(..) | Self::Downsample(_))
    }

    /// Whether it reads the last output kept.
    pub(super) fn takes_skip(self) -> bool {
        matches!(self, Self::Up(..))
    }
}

/// The denoising network.
#[derive(Clone, Debug)]
pub struct UNet {
    config: UNetConfig,
    time_embedding: [Linear; 2],
    conv_in: Conv2d,
    down_blocks: Vec<DownBlock>,
    mid_block: MidBlock,
    up_blocks: Vec<UpBlock>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
    cross_attentions: usize,
}

impl UNet {
    /// Loads the network that `config` describes. Errors name the tensor that is missing or of another shape.
    pub fn load(scope: &Scope, config: &UNetConfig) -> Result<Self> {
        let channels = &config.block_out_channels;
        let (first, last) = (channels[0], channels[channels.len() - 1]);
        let time_width = 4 * first;
        let resnet = ResnetSettings {
            time_embedding: Some(time_width),
            groups: config.norm_num_groups,
            eps: config.norm_eps,
            output_scale_factor: config.resnet_out_scale_factor,
        };
        let transformer = |block: usize, layers: usize| TransformerSettings {
            heads: config.attention_heads[block],
            layers,
            cross_attention_dim: config.cross_attention_dim,
            groups: config.norm_num_groups,
            use_linear_projection: config.use_linear_projection,
        };
        let kernel = config.conv_in_kernel;
        let conv_in = scope.at("conv_in").conv2d(config.in_channels, first, kernel, 1, (kernel - 1) / 2)?;
        let time_embedding = [
            scope.at("time_embedding.linear_1").linear(first, time_width, true)?,
            scope.at("time_embedding.linear_2").linear(time_width, time_width, true)?,
        ];
        let mut cross_attentions = 0;
        let blocks = channels.len();

        // Channels of every skip connection, in the order in which the way down leaves them.
        let mut skips = vec![first];
        let mut down_blocks = Vec::new();
        let mut inputs = first;
        for (i, &outputs) in channels.iter().enumerate() {
            let scope = scope.at("down_blocks").at(i);
            let (mut resnets, mut attentions) = (Vec::new(), Vec::new());
            for j in 0..config.layers_per_block[i] {
                resnets.push(ResnetBlock2D::load(&scope.at("resnets").at(j), inputs, outputs, resnet)?);
                if config.down_cross_attention[i] {
                    let settings = transformer(i, config.transformer_layers_per_block[i]);
                    let scope = scope.at("attentions").at(j);
                    attentions.push(Transformer2DModel::load(&scope, outputs, &settings, &mut cross_attentions)?);
                }
                inputs = outputs;
                skips.push(outputs);
            }
            let downsampler = if i + 1 < blocks {
                skips.push(outputs);
                Some(scope.at("downsamplers.0.conv").conv2d(outputs, outputs, 3, 2, 1)?)
            } else {
                None
            };
            down_blocks.push(DownBlock { resnets, attentions, downsampler });
        }

        let mid = scope.at("mid_block");
        let mid_resnet = ResnetSettings { output_scale_factor: config.mid_block_scale_factor, ..resnet };
        let settings = transformer(blocks - 1, config.transformer_layers_per_block[blocks - 1]);
        let mid_block = MidBlock {
            resnets: vec![
                ResnetBlock2D::load(&mid.at("resnets.0"), last, last, mid_resnet)?,
                ResnetBlock2D::load(&mid.at("resnets.1"), last, last, mid_resnet)?,
            ],
            attentions: vec![Transformer2DModel::load(
                &mid.at("attentions.0"),
                last,
                &settings,
                &mut cross_attentions,
            )?],
        };

        let mut up_blocks = Vec::new();
        let mut inputs = last;
        for i in 0..blocks {
            // Up block i mirrors down block `mirror`.
            let mirror = blocks - 1 - i;
            let outputs = channels[mirror];
            let scope = scope.at("up_blocks").at(i);
            let (mut resnets, mut attentions) = (Vec::new(), Vec::new());
            for j in 0..config.layers_per_block[mirror] + 1 {
                let skip = skips.pop().ok_or_else(|| config.mismatch("up_block_types"))?;
                resnets.push(ResnetBlock2D::load(&scope.at("resnets").at(j), inputs + skip, outputs, resnet)?);
                if config.up_cross_attention[i] {
                    let settings = transformer(mirror, config.up_transformer_layers[i]);
                    let scope = scope.at("attentions").at(j);
                    attentions.push(Transformer2DModel::load(&scope, outputs, &settings, &mut cross_attentions)?);
                }
                inputs = outputs;
            }
            let upsampler = if i + 1 < blocks {
                Some(scope.at("upsamplers.0.conv").conv2d(outputs, outputs, 3, 1, 1)?)
            } else {
                None
            };
            up_blocks.push(UpBlock { resnets, attentions, upsampler });
        }

        let kernel = config.conv_out_kernel;
        Ok(Self {
            conv_norm_out: scope.at("conv_norm_out").group_norm(first, config.norm_num_groups, config.norm_eps)?,
            conv_out: scope.at("conv_out").conv2d(first, config.out_channels, kernel, 1, (kernel - 1) / 2)?,
            config: config.clone(),
            time_embedding,
            conv_in,
            down_blocks,
            mid_block,
            up_blocks,
            cross_attentions,
        })
    }

    /// Number of cross-attentions; layer-wise prompts have one encoding for each.
    pub fn cross_attentions(&self) -> usize {
        self.cross_attentions
    }

    /// Its config.
    pub fn config(&self) -> &UNetConfig {
        &self.config
    }

    /// The model's prediction (noise or velocity, as the scheduler config says) for noisy `latents` [B, C, H, W] at
    /// `timesteps`, one per sample, under `context`. The result has the shape of `latents`.
    pub fn forward(
        &self,
        latents: &Tensor,
        timesteps: &[f32],
        context: &Conditioning,
        with: &Forward,
    ) -> Result<Tensor> {
        if self.goes_by_samples(latents, with)? {
            self.check(latents, timesteps, context)?;
            return self.forward_each(latents, timesteps, context, with.adapters);
        }
        self.forward_all(latents, timesteps, context, with)
    }

    /// [`Self::forward`] of the whole batch, layer by layer.
    pub(super) fn forward_all(
        &self,
        latents: &Tensor,
        timesteps: &[f32],
        context: &Conditioning,
        with: &Forward,
    ) -> Result<Tensor> {
        let temb = self.check_and_embed(latents, timesteps, context)?;
        let mut h = latents.clone();
        let mut skips: Vec<Tensor> = Vec::new();
        for segment in self.segments() {
            let skip = if segment.takes_skip() { skips.pop() } else { None };
            let size = skips.last().map(|skip| skip.dims()).and_then(|dims| Some((*dims.get(2)?, *dims.get(3)?)));
            h = self.run(segment, &h, skip.as_ref(), size, &temb, context, with)?;
            if segment.gives_skip() {
                skips.push(h.clone());
            }
        }
        Ok(h)
    }

    /// The forward pass in order: each stretch reads the one before it, and some a skip connection.
    pub(super) fn segments(&self) -> Vec<Segment> {
        let mut segments = vec![Segment::In];
        for (i, block) in self.down_blocks.iter().enumerate() {
            segments.extend((0..block.resnets.len()).map(|j| Segment::Down(i, j)));
            segments.extend(block.downsampler.as_ref().map(|_| Segment::Downsample(i)));
        }
        segments.push(Segment::Middle);
        for (i, block) in self.up_blocks.iter().enumerate() {
            segments.extend((0..block.resnets.len()).map(|j| Segment::Up(i, j)));
            segments.extend(block.upsampler.as_ref().map(|_| Segment::Upsample(i)));
        }
        segments.push(Segment::Out);
        segments
    }

    /// One stretch. `skip` is the skip connection that it takes, `size` height and width of the next one.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn run(
        &self,
        segment: Segment,
        h: &Tensor,
        skip: Option<&Tensor>,
        size: Option<(usize, usize)>,
        temb: &Tensor,
        context: &Conditioning,
        with: &Forward,
    ) -> Result<Tensor> {
        let temb = Some(temb);
        let attend = |attention: Option<&Transformer2DModel>, h: Tensor| match attention {
            Some(attention) => attention.forward(&h, context, with),
            None => Ok(h),
        };
        Ok(match segment {
            Segment::In => self.conv_in.forward(h)?,
            Segment::Down(i, j) => {
                let block = &self.down_blocks[i];
                attend(block.attentions.get(j), block.resnets[j].forward(h, temb)?)?
            }
            Segment::Downsample(i) => match &self.down_blocks[i].downsampler {
                Some(conv) => conv.forward(h)?,
                None => h.clone(),
            },
            Segment::Middle => {
                let block = &self.mid_block;
                let h = attend(block.attentions.first(), block.resnets[0].forward(h, temb)?)?;
                block.resnets[1].forward(&h, temb)?
            }
            Segment::Up(i, j) => {
                let block = &self.up_blocks[i];
                let skip = skip.ok_or_else(|| self.config.mismatch("up_block_types"))?;
                attend(block.attentions.get(j), block.resnets[j].forward(&Tensor::cat(&[h, skip], 1)?, temb)?)?
            }
            Segment::Upsample(i) => match &self.up_blocks[i].upsampler {
                Some(conv) => upsample(conv, h, size)?,
                None => h.clone(),
            },
            Segment::Out => self.conv_out.forward(&self.conv_norm_out.forward_silu(h)?)?,
        })
    }

    /// Checks, and embeds the timesteps.
    pub(super) fn check_and_embed(
        &self,
        latents: &Tensor,
        timesteps: &[f32],
        context: &Conditioning,
    ) -> Result<Tensor> {
        self.check(latents, timesteps, context)?;
        self.time_embedding(timesteps, latents.device())
    }

    /// Checks that one timestep and one prompt is there for each of `latents`.
    pub(super) fn check(&self, latents: &Tensor, timesteps: &[f32], context: &Conditioning) -> Result<()> {
        let batch = latents.dims4()?.0;
        self.check_batch("timesteps", timesteps.len(), batch)?;
        self.check_batch("conditioning", context.batch()?, batch)?;
        if let Conditioning::LayerWise(encodings) = context
            && encodings.len() != self.cross_attentions
        {
            let reason =
                format!("the UNet has {} cross-attentions, one encoding is needed for each", self.cross_attentions);
            return Err(Error::option("layer-wise conditioning", encodings.len(), reason));
        }
        Ok(())
    }

    /// `Timesteps` and `TimestepEmbedding`: sinusoids of `timesteps`, then two Linears -> [B, 4 * first width].
    fn time_embedding(&self, timesteps: &[f32], device: &candle_core::Device) -> Result<Tensor> {
        let width = self.config.block_out_channels[0];
        let half = width / 2;
        let shift = self.config.freq_shift;
        let mut sinusoids = Vec::with_capacity(timesteps.len() * width);
        for &t in timesteps {
            // In f32 like diffusers: at t near 1000 the rounding of the product shows in the sixth digit.
            let angle = |i: usize| t * ((-(10_000f32.ln()) * i as f32) / (half as f64 - shift) as f32).exp();
            let sin = (0..half).map(|i| angle(i).sin());
            let cos = (0..half).map(|i| angle(i).cos());
            if self.config.flip_sin_to_cos {
                sinusoids.extend(cos.chain(sin));
            } else {
                sinusoids.extend(sin.chain(cos));
            }
        }
        let x = Tensor::from_vec(sinusoids, (timesteps.len(), width), device)?.to_dtype(DType::F32)?;
        let none = Forward::default();
        let [linear_1, linear_2] = &self.time_embedding;
        Ok(linear_2.forward(&ops::silu(&linear_1.forward(&x, &none)?)?, &none)?)
    }

    fn check_batch(&self, what: &str, got: usize, batch: usize) -> Result<()> {
        if got == batch {
            Ok(())
        } else {
            Err(Error::option(what, got, format!("the batch has {batch} latents, one is needed for each")))
        }
    }
}
