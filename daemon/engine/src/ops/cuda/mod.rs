//! The operations that have kernels of their own on a card (`kernels/`), for forward passes without gradients. Training
//! and the other operations run there as [`reference`](super::reference) has them, on cuBLAS and cuDNN.

mod attention;
mod norm;
mod pointwise;

pub(super) use attention::{attention, takes};
pub(super) use norm::norm;
pub(super) use pointwise::{geglu, pointwise};

use candle_core::{DType, Tensor};

/// Whether the kernels apply: f32 on a card, without gradients.
pub(super) fn applies(x: &Tensor) -> bool {
    x.dtype() == DType::F32 && x.device().is_cuda() && !x.track_op()
}
