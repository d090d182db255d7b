//! The Linears of known models.

use crate::merge::strategy::LayerInfo;

/// A model whose shapes a benchmark takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Shape {
    /// Stable Diffusion 1.5.
    Sd15,
}

impl std::str::FromStr for Shape {
    type Err = crate::Error;
    fn from_str(name: &str) -> Result<Self, Self::Err> {
        match name {
            "sd15" => Ok(Self::Sd15),
            _ => Err(crate::Error::option("shape", name, "the known shape is sd15")),
        }
    }
}

impl Shape {
    /// The Linears that adapters change by default: every attention's query, key, value and output projections in
    /// the UNet (128 in SD 1.5) and in the text encoder (48).
    pub fn attention_layers(self) -> Vec<LayerInfo> {
        let Self::Sd15 = self;
        const CONTEXT: usize = 768;
        // Where the UNet's transformer blocks are, how many there, and their width.
        let places = [
            ("down_blocks.0", 2, 320),
            ("down_blocks.1", 2, 640),
            ("down_blocks.2", 2, 1280),
            ("mid_block", 1, 1280),
            ("up_blocks.1", 3, 1280),
            ("up_blocks.2", 3, 640),
            ("up_blocks.3", 3, 320),
        ];
        let mut layers = Vec::new();
        for (place, count, width) in places {
            for block in 0..count {
                for (attention, context) in [("attn1", width), ("attn2", CONTEXT)] {
                    for (linear, columns) in
                        [("to_q", width), ("to_k", context), ("to_v", context), ("to_out.0", width)]
                    {
                        let name = format!("unet.{place}.attentions.{block}.transformer_blocks.0.{attention}.{linear}");
                        layers.push(LayerInfo { name, rows: width, columns });
                    }
                }
            }
        }
        for layer in 0..12 {
            for linear in ["q_proj", "k_proj", "v_proj", "out_proj"] {
                let name = format!("text_encoder.text_model.encoder.layers.{layer}.self_attn.{linear}");
                layers.push(LayerInfo { name, rows: CONTEXT, columns: CONTEXT });
            }
        }
        layers
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sd15_has_176_attention_linears() {
        let layers = Shape::Sd15.attention_layers();
        let rank4: usize = layers.iter().take(128).map(|layer| 4 * (layer.rows + layer.columns)).sum();
        assert_eq!((layers.len(), rank4), (176, 797_184)); // as published for adapters of rank 4
    }
}
