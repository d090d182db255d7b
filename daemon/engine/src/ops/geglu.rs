//! GEGLU, and its gradient.

use candle_core::{CpuStorage, CustomOp1, D, Layout, Result, Shape, Tensor, bail};

use super::cpu::{Shared, Values, applies, filled, parallel, values};
#[cfg(feature = "cuda")]
use super::cuda;
use super::elementwise::gelu_derivative;
use super::reference;
use super::simd::{dispatch, normal_cdf};

/// GEGLU with erf: the first half of the last dimension times GELU of the second. `x` [..., 2 d] -> [..., d].
pub fn geglu(x: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if cuda::applies(x) {
        return cuda::geglu(x);
    }
    if applies(x) { x.contiguous()?.apply_op1(Geglu) } else { reference::geglu(x) }
}

struct Geglu;

impl CustomOp1 for Geglu {
    fn name(&self) -> &'static str {
        "geglu"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = values(storage, layout, self.name())?;
        let mut dims = layout.dims().to_vec();
        let width = match dims.last() {
            Some(last) if last % 2 == 0 => last / 2,
            _ => bail!("geglu: the last dimension of {dims:?} is not even"),
        };
        if let Some(last) = dims.last_mut() {
            *last = width;
        }
        let y = filled(x.len() / 2, |y| {
            let (tokens, y) = (y.len().checked_div(width).unwrap_or(0), Shared::new(y));
            parallel(tokens, x.len() * 8, |token| {
                // SAFETY: each task has its own token.
                #[allow(unsafe_code)]
                let y = unsafe { y.slice(token * width..(token + 1) * width) };
                let (value, gate) = x[token * 2 * width..][..2 * width].split_at(width);
                forward(value, gate, y);
            });
        });
        Ok((CpuStorage::F32(y), dims.into()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (shape, width, grad) = (x.shape().clone(), x.dim(D::Minus1)? / 2, grad.contiguous()?);
        let (x, grad) = (Values::of(x)?, Values::of(&grad)?);
        let (x, grad) = (&x[..], &grad[..]);
        let dx = filled(x.len(), |dx| {
            let dx = Shared::new(dx);
            parallel(grad.len().checked_div(width).unwrap_or(0), x.len() * 16, |token| {
                let span = token * 2 * width..(token + 1) * 2 * width;
                // SAFETY: each task has its own token.
                #[allow(unsafe_code)]
                let (dvalue, dgate) = unsafe { dx.slice(span.clone()) }.split_at_mut(width);
                let (value, gate) = x[span].split_at(width);
                backward(value, gate, &grad[token * width..(token + 1) * width], dvalue, dgate);
            });
        });
        Tensor::from_vec(dx, shape, &candle_core::Device::Cpu).map(Some)
    }
}

dispatch!(fn forward(value: &[f32], gate: &[f32], y: &mut [f32]) = forward_body);
dispatch!(fn backward(value: &[f32], gate: &[f32], grad: &[f32], dvalue: &mut [f32], dgate: &mut [f32])
    = backward_body);

#[inline(always)]
fn forward_body<const FMA: bool>(value: &[f32], gate: &[f32], y: &mut [f32]) {
    for (y, (&value, &gate)) in y.iter_mut().zip(value.iter().zip(gate)) {
        *y = value * (gate * normal_cdf::<FMA>(gate));
    }
}

#[inline(always)]
fn backward_body<const FMA: bool>(value: &[f32], gate: &[f32], grad: &[f32], dvalue: &mut [f32], dgate: &mut [f32]) {
    for ((dvalue, dgate), (&grad, (&value, &gate))) in
        dvalue.iter_mut().zip(dgate).zip(grad.iter().zip(value.iter().zip(gate)))
    {
        *dvalue = grad * (gate * normal_cdf::<FMA>(gate));
        *dgate = grad * value * gelu_derivative::<FMA>(gate);
    }
}
