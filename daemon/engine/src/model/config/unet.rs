//! `unet/config.json`.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::Fields;
use crate::error::{Error, Result};

/// The settings of a `UNet2DConditionModel`, with diffusers' defaults filled in.
#[derive(Clone, Debug, PartialEq)]
pub struct UNetConfig {
    /// The config file, for messages.
    pub path: PathBuf,
    /// Latent height and width that the model was trained with, if stated.
    pub sample_size: Option<(usize, usize)>,
    /// Channels of the latents.
    pub in_channels: usize,
    /// Channels of the prediction.
    pub out_channels: usize,
    /// Channels of each resolution, finest first.
    pub block_out_channels: Vec<usize>,
    /// Resnets of each down block; the mirroring up block has one more.
    pub layers_per_block: Vec<usize>,
    /// Whether each down block has cross-attention.
    pub down_cross_attention: Vec<bool>,
    /// Whether each up block has cross-attention, coarsest first.
    pub up_cross_attention: Vec<bool>,
    /// Transformer blocks in each attention of each down block; the last entry holds for the middle, too.
    pub transformer_layers_per_block: Vec<usize>,
    /// The same for the up blocks, coarsest first.
    pub up_transformer_layers: Vec<usize>,
    /// Attention heads of each resolution (diffusers calls the field `attention_head_dim`).
    pub attention_heads: Vec<usize>,
    /// Width of the prompt encoding.
    pub cross_attention_dim: usize,
    /// Whether the transformers' projections are Linears instead of 1x1 convolutions.
    pub use_linear_projection: bool,
    /// Groups of all group normalisations.
    pub norm_num_groups: usize,
    /// Epsilon of the resnets' group normalisations.
    pub norm_eps: f64,
    /// Kernel of the first convolution.
    pub conv_in_kernel: usize,
    /// Kernel of the last convolution.
    pub conv_out_kernel: usize,
    /// Cosines before sines in the timestep embedding.
    pub flip_sin_to_cos: bool,
    /// Shifts the frequencies of the timestep embedding.
    pub freq_shift: f64,
    /// Divides the outputs of the resnets of down and up blocks.
    pub resnet_out_scale_factor: f64,
    /// Divides the outputs of the resnets of the middle block.
    pub mid_block_scale_factor: f64,
}

impl UNetConfig {
    /// Reads `unet/config.json`.
    pub fn open(path: &Path) -> Result<Self> {
        let mut fields = Fields::open(path)?;
        fields.only("_class_name", "UNet2DConditionModel")?;
        let block_out_channels = fields.sizes("block_out_channels")?;
        let blocks = block_out_channels.len();
        let down_types: Vec<String> = fields.or("down_block_types", Vec::new())?;
        let up_types: Vec<String> = fields.or("up_block_types", Vec::new())?;
        let cross_attention = |field: &str, types: &[String], with: &str, without: &str| -> Result<Vec<bool>> {
            if types.len() != blocks {
                return Err(fields.invalid(field, format!("{} entries for {blocks} blocks", types.len())));
            }
            types
                .iter()
                .map(|name| match name.as_str() {
                    name if name == with => Ok(true),
                    name if name == without => Ok(false),
                    name => Err(fields.unsupported(field, name, &format!("{with} and {without} are"))),
                })
                .collect()
        };
        let down_cross_attention =
            cross_attention("down_block_types", &down_types, "CrossAttnDownBlock2D", "DownBlock2D")?;
        let up_cross_attention = cross_attention("up_block_types", &up_types, "CrossAttnUpBlock2D", "UpBlock2D")?;
        let layers_per_block = per_block(&mut fields, "layers_per_block", blocks, 2)?;
        let transformer_layers_per_block = per_block(&mut fields, "transformer_layers_per_block", blocks, 1)?;
        let up_transformer_layers = fields
            .per_block("reverse_transformer_layers_per_block", blocks, None)?
            .unwrap_or_else(|| transformer_layers_per_block.iter().rev().copied().collect());
        let by_dim = per_block(&mut fields, "attention_head_dim", blocks, 8)?;
        let attention_heads = fields.per_block("num_attention_heads", blocks, None)?.unwrap_or(by_dim);
        let config = Self {
            path: path.to_owned(),
            sample_size: sample_size(&mut fields)?,
            in_channels: fields.size_or("in_channels", 4)?,
            out_channels: fields.size_or("out_channels", 4)?,
            layers_per_block,
            down_cross_attention,
            up_cross_attention,
            transformer_layers_per_block,
            up_transformer_layers,
            attention_heads,
            cross_attention_dim: fields.size_or("cross_attention_dim", 1280)?,
            use_linear_projection: fields.or("use_linear_projection", false)?,
            norm_num_groups: fields.size_or("norm_num_groups", 32)?,
            norm_eps: fields.number_or("norm_eps", 1e-5)?,
            conv_in_kernel: fields.size_or("conv_in_kernel", 3)?,
            conv_out_kernel: fields.size_or("conv_out_kernel", 3)?,
            flip_sin_to_cos: fields.or("flip_sin_to_cos", true)?,
            freq_shift: fields.number_or("freq_shift", 0.0)?,
            resnet_out_scale_factor: fields.number_or("resnet_out_scale_factor", 1.0)?,
            mid_block_scale_factor: fields.number_or("mid_block_scale_factor", 1.0)?,
            block_out_channels,
        };
        for (field, only) in [
            ("act_fn", Value::from("silu")),
            ("mid_block_type", "UNetMidBlock2DCrossAttn".into()),
            ("downsample_padding", 1.into()),
            ("center_input_sample", false.into()),
            ("only_cross_attention", false.into()),
            ("mid_block_only_cross_attention", false.into()),
            ("dual_cross_attention", false.into()),
            ("time_embedding_type", "positional".into()),
            ("resnet_time_scale_shift", "default".into()),
            ("resnet_skip_time_act", false.into()),
            ("attention_type", "default".into()),
            ("dropout", 0.into()),
        ] {
            fields.only(field, only)?;
        }
        // upcast_attention only guards half precision; activations are f32 here. The rest shapes parts that are off
        // as long as the fields that switch them on are null, which `finish` checks.
        fields.ignore(&["upcast_attention", "addition_embed_type_num_heads"]);
        config.check(&fields)?;
        fields.finish()?;
        Ok(config)
    }

    fn check(&self, fields: &Fields) -> Result<()> {
        for (&channels, &heads) in self.block_out_channels.iter().zip(&self.attention_heads) {
            if !channels.is_multiple_of(self.norm_num_groups) {
                let reason = format!("{} groups do not divide {channels} channels", self.norm_num_groups);
                return Err(fields.invalid("norm_num_groups", reason));
            }
            if !channels.is_multiple_of(heads) {
                return Err(fields.invalid("attention_head_dim", format!("{heads} heads do not divide {channels}")));
            }
        }
        for (field, factor) in [
            ("resnet_out_scale_factor", self.resnet_out_scale_factor),
            ("mid_block_scale_factor", self.mid_block_scale_factor),
        ] {
            if factor == 0.0 {
                return Err(fields.invalid(field, "must not be 0"));
            }
        }
        let first = self.block_out_channels[0];
        if !first.is_multiple_of(2) {
            return Err(fields.invalid("block_out_channels", format!("the first, {first}, must be even")));
        }
        if self.freq_shift >= (first / 2) as f64 {
            return Err(fields.invalid("freq_shift", format!("must be below {}", first / 2)));
        }
        for (field, kernel) in [("conv_in_kernel", self.conv_in_kernel), ("conv_out_kernel", self.conv_out_kernel)] {
            if kernel.is_multiple_of(2) {
                return Err(fields.unsupported(field, kernel, "odd kernels are"));
            }
        }
        Ok(())
    }

    /// An error for block lists that do not mirror each other.
    pub(crate) fn mismatch(&self, field: &str) -> Error {
        Error::invalid_file(&self.path, format!("{field}: does not mirror the down blocks"))
    }
}

fn per_block(fields: &mut Fields, field: &str, blocks: usize, default: usize) -> Result<Vec<usize>> {
    Ok(fields.per_block(field, blocks, Some(default))?.unwrap_or_default())
}

/// One number for a square, or [height, width].
pub(super) fn sample_size(fields: &mut Fields) -> Result<Option<(usize, usize)>> {
    match fields.take::<Value>("sample_size")? {
        None => Ok(None),
        Some(value) => {
            let sides = match &value {
                Value::Array(sides) if sides.len() == 2 => [sides[0].as_u64(), sides[1].as_u64()],
                side => [side.as_u64(), side.as_u64()],
            };
            match sides {
                [Some(h @ 1..=65536), Some(w @ 1..=65536)] => Ok(Some((h as usize, w as usize))),
                _ => Err(fields.invalid("sample_size", format!("{value} is neither a size nor [height, width]"))),
            }
        }
    }
}
