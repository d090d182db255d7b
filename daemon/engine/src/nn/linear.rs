//! The one Linear of the engine, and what a forward pass may add to it.

use candle_core::{Result, Tensor};

use crate::ops::{self, Frozen, LoraBranch};

/// The index of an adaptable Linear, in the order in which the model lists them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LayerId(pub usize);

/// A LoRA branch under training on one Linear: factors that carry gradients.
#[derive(Clone, Debug)]
pub struct TrainingAdapter {
    /// A, [r, n].
    pub a: Tensor,
    /// The owned rows' block of B, [rows, r].
    pub b: Tensor,
    /// Which rows, the erasure mask and the scale.
    pub branch: LoraBranch,
}

/// Receives the inputs of adaptable Linears during a forward pass.
pub trait Recorder {
    /// `input` [batch, tokens, n] is about to enter the Linear `layer`.
    fn record(&self, layer: LayerId, input: &Tensor) -> Result<()>;
}

/// What a forward pass adds to the live weights. The default adds nothing.
#[derive(Clone, Copy, Default)]
pub struct Forward<'a> {
    /// Training adapters by [`LayerId`]; layers beyond the end have none.
    pub adapters: &'a [Option<TrainingAdapter>],
    /// Gets every adaptable Linear's input.
    pub recorder: Option<&'a dyn Recorder>,
}

/// y = W x + b on the live weight, and the training adapter's branch where there is one.
#[derive(Clone, Debug)]
pub struct Linear {
    weight: Frozen,
    bias: Option<Tensor>,
    layer: Option<LayerId>,
}

impl Linear {
    /// `weight` [m, n], `bias` `[m]`; `layer` names the Linear if adapters may change it.
    pub fn new(weight: Frozen, bias: Option<Tensor>, layer: Option<LayerId>) -> Self {
        Self { weight, bias, layer }
    }

    /// `x` [batch, tokens, n] -> [batch, tokens, m].
    pub fn forward(&self, x: &Tensor, with: &Forward) -> Result<Tensor> {
        let adapter = self.layer.and_then(|layer| with.adapters.get(layer.0).and_then(Option::as_ref));
        if let (Some(layer), Some(recorder)) = (self.layer, with.recorder) {
            recorder.record(layer, x)?;
        }
        match adapter {
            None => ops::linear(x, &self.weight, self.bias.as_ref()),
            Some(TrainingAdapter { a, b, branch }) => {
                ops::linear_lora(x, &self.weight, self.bias.as_ref(), a, b, branch)
            }
        }
    }
}
