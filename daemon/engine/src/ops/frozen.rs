//! Weights that never train: a tensor, or a part of the mapped model file that is read in place.

use candle_core::{Device, Result, Tensor};

use super::cpu::{Weight, with_weight};
use crate::weights::{Floats, WeightView};

/// A weight as the operations take it.
#[derive(Clone, Debug)]
pub struct Frozen(Source);

#[derive(Clone, Debug)]
enum Source {
    Tensor(Tensor),
    /// Its [`WeightView::floats`] are there.
    Mapped(WeightView),
}

impl Frozen {
    /// The weight in the mapped file itself, without a copy; none if its bytes cannot be read as they lie there.
    pub fn mapped(view: WeightView) -> Option<Self> {
        view.floats().is_some().then(|| Self(Source::Mapped(view)))
    }

    /// Its shape.
    pub fn dims(&self) -> &[usize] {
        match &self.0 {
            Source::Tensor(tensor) => tensor.dims(),
            Source::Mapped(view) => view.shape(),
        }
    }

    /// It as a tensor on `device`: a copy if it is mapped.
    pub fn tensor(&self, device: &Device) -> Result<Tensor> {
        match &self.0 {
            Source::Tensor(tensor) => tensor.to_device(device),
            Source::Mapped(view) => Tensor::from_raw_buffer(view.bytes(), view.dtype(), view.shape(), device),
        }
    }

    /// The same without gaps.
    pub(super) fn contiguous(self) -> Result<Self> {
        Ok(match self.0 {
            Source::Tensor(tensor) => Self(Source::Tensor(tensor.contiguous()?)),
            mapped => Self(mapped),
        })
    }

    /// Calls `f` with its values, which must be contiguous and in main memory.
    pub(super) fn with<R>(&self, f: impl FnOnce(Weight) -> Result<R>) -> Result<R> {
        match &self.0 {
            Source::Tensor(tensor) => with_weight(tensor, f),
            Source::Mapped(view) => match view.floats() {
                Some(Floats::F32(values)) => f(Weight::F32(values)),
                Some(Floats::F16(values)) => f(Weight::F16(values)),
                Some(Floats::Bf16(values)) => f(Weight::Bf16(values)),
                None => candle_core::bail!("the weight {} cannot be read in place", view.name()),
            },
        }
    }
}

impl From<Tensor> for Frozen {
    fn from(tensor: Tensor) -> Self {
        Self(Source::Tensor(tensor))
    }
}

impl From<&Tensor> for Frozen {
    fn from(tensor: &Tensor) -> Self {
        Self(Source::Tensor(tensor.clone()))
    }
}

impl From<&Self> for Frozen {
    fn from(weight: &Self) -> Self {
        weight.clone()
    }
}
