//! What the UNet's cross-attentions read: encoded prompts.

use candle_core::{Result, Tensor};

/// Encoded prompts for a batch.
#[derive(Clone, Debug)]
pub enum Conditioning {
    /// All cross-attentions read the same encoding, [B, S, d].
    Shared(Tensor),
    /// Each cross-attention reads its own encoding [B, S, d], in forward order: down blocks, middle, up blocks.
    LayerWise(Vec<Tensor>),
}

impl Conditioning {
    /// The encoding [B, S, d] that cross-attention `index` reads; an error beyond the end.
    pub fn layer(&self, index: usize) -> Result<&Tensor> {
        match self {
            Self::Shared(encoding) => Ok(encoding),
            Self::LayerWise(encodings) => match encodings.get(index) {
                Some(encoding) => Ok(encoding),
                None => candle_core::bail!(
                    "layer-wise conditioning has {} encodings, but cross-attention {index} asks for its own",
                    encodings.len()
                ),
            },
        }
    }

    /// All encodings; one where it is shared.
    pub fn encodings(&self) -> &[Tensor] {
        match self {
            Self::Shared(encoding) => std::slice::from_ref(encoding),
            Self::LayerWise(encodings) => encodings,
        }
    }

    /// Number of prompts B.
    pub fn batch(&self) -> Result<usize> {
        self.layer(0)?.dim(0)
    }

    /// The same with `f` applied to each encoding.
    pub fn map(&self, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(match self {
            Self::Shared(encoding) => Self::Shared(f(encoding)?),
            Self::LayerWise(encodings) => Self::LayerWise(encodings.iter().map(f).collect::<Result<_>>()?),
        })
    }

    /// Prompts `start..start + len` of the batch.
    pub fn narrow(&self, start: usize, len: usize) -> Result<Self> {
        self.map(|encoding| encoding.narrow(0, start, len)?.contiguous())
    }

    /// All prompts of `parts`, one after the other. Shared encodings are repeated where another part is layer-wise.
    pub fn cat(parts: &[&Self]) -> Result<Self> {
        let layers = parts.iter().find_map(|part| match part {
            Self::Shared(_) => None,
            Self::LayerWise(encodings) => Some(encodings.len()),
        });
        let cat = |index| {
            let encodings = parts.iter().map(|part| part.layer(index)).collect::<Result<Vec<_>>>()?;
            Tensor::cat(&encodings, 0)
        };
        Ok(match layers {
            None => Self::Shared(cat(0)?),
            Some(layers) => Self::LayerWise((0..layers).map(cat).collect::<Result<_>>()?),
        })
    }
}
