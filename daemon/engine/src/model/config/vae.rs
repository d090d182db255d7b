//! `vae/config.json`.

use std::path::Path;

use serde_json::Value;

use super::Fields;
use super::unet::sample_size;
use crate::error::Result;

/// The settings of an `AutoencoderKL`, with diffusers' defaults filled in.
#[derive(Clone, Debug, PartialEq)]
pub struct VaeConfig {
    /// Picture height and width that it was trained with, if stated.
    pub sample_size: Option<(usize, usize)>,
    /// Channels of a picture.
    pub in_channels: usize,
    /// Channels of a decoded picture.
    pub out_channels: usize,
    /// Channels of the latents.
    pub latent_channels: usize,
    /// Channels of each resolution, finest first.
    pub block_out_channels: Vec<usize>,
    /// Resnets of each down block; an up block has one more.
    pub layers_per_block: usize,
    /// Groups of all group normalisations.
    pub norm_num_groups: usize,
    /// The UNet sees latents times this.
    pub scaling_factor: f64,
    /// Whether the middle blocks have attention.
    pub mid_block_add_attention: bool,
    /// Whether a 1x1 convolution follows the encoder.
    pub use_quant_conv: bool,
    /// Whether a 1x1 convolution precedes the decoder.
    pub use_post_quant_conv: bool,
}

impl VaeConfig {
    /// Reads `vae/config.json`.
    pub fn open(path: &Path) -> Result<Self> {
        let mut fields = Fields::open(path)?;
        fields.only("_class_name", "AutoencoderKL")?;
        let block_out_channels = fields.sizes("block_out_channels")?;
        for (field, only) in [("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")] {
            let types: Vec<String> = fields.or(field, Vec::new())?;
            if types.len() != block_out_channels.len() {
                let reason = format!("{} entries for {} blocks", types.len(), block_out_channels.len());
                return Err(fields.invalid(field, reason));
            }
            if let Some(other) = types.iter().find(|name| *name != only) {
                return Err(fields.unsupported(field, other, &format!("{only} is")));
            }
        }
        let config = Self {
            sample_size: sample_size(&mut fields)?,
            in_channels: fields.size_or("in_channels", 3)?,
            out_channels: fields.size_or("out_channels", 3)?,
            latent_channels: fields.size_or("latent_channels", 4)?,
            layers_per_block: fields.size_or("layers_per_block", 1)?,
            norm_num_groups: fields.size_or("norm_num_groups", 32)?,
            scaling_factor: fields.number_or("scaling_factor", 0.18215)?,
            mid_block_add_attention: fields.or("mid_block_add_attention", true)?,
            use_quant_conv: fields.or("use_quant_conv", true)?,
            use_post_quant_conv: fields.or("use_post_quant_conv", true)?,
            block_out_channels,
        };
        fields.only("act_fn", "silu")?;
        fields.only("shift_factor", Value::Null)?;
        fields.only("latents_mean", Value::Null)?;
        fields.only("latents_std", Value::Null)?;
        // force_upcast only guards half precision; activations are f32 here.
        fields.ignore(&["force_upcast"]);
        for &channels in &config.block_out_channels {
            if !channels.is_multiple_of(config.norm_num_groups) {
                let reason = format!("{} groups do not divide {channels} channels", config.norm_num_groups);
                return Err(fields.invalid("norm_num_groups", reason));
            }
        }
        if config.scaling_factor <= 0.0 {
            return Err(fields.invalid("scaling_factor", "must be above 0"));
        }
        for (field, channels) in [("in_channels", config.in_channels), ("out_channels", config.out_channels)] {
            if channels != 3 {
                return Err(fields.unsupported(field, channels, "only 3, for RGB"));
            }
        }
        fields.finish()?;
        Ok(config)
    }
}
