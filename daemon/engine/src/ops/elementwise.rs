//! SiLU, GELU and quick-GELU, and their derivatives.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

use super::cpu::{Shared, Values, applies, filled, parallel, values};
#[cfg(feature = "cuda")]
use super::cuda;
use super::reference;
use super::simd::{dispatch, normal_cdf, normal_pdf, sigmoid};

/// A function of one element at a time.
#[derive(Clone, Copy)]
enum Function {
    Silu,
    Gelu,
    QuickGelu,
}

/// x * sigmoid(x).
pub fn silu(x: &Tensor) -> Result<Tensor> {
    apply(x, Function::Silu, reference::silu)
}

/// GELU with erf, as diffusers' and transformers' "gelu".
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    apply(x, Function::Gelu, reference::gelu)
}

/// x * sigmoid(1.702 x), CLIP's "quick_gelu".
pub fn quick_gelu(x: &Tensor) -> Result<Tensor> {
    apply(x, Function::QuickGelu, reference::quick_gelu)
}

fn apply(x: &Tensor, function: Function, otherwise: fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if cuda::applies(x) {
        return cuda::pointwise(x, function.name());
    }
    if applies(x) { x.contiguous()?.apply_op1(function) } else { otherwise(x) }
}

/// Elements per task.
const CHUNK: usize = 1 << 14;
/// Elementary steps per element, roughly.
const COST: usize = 16;

impl CustomOp1 for Function {
    fn name(&self) -> &'static str {
        match self {
            Self::Silu => "silu",
            Self::Gelu => "gelu",
            Self::QuickGelu => "quick_gelu",
        }
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = values(storage, layout, self.name())?;
        let y = filled(x.len(), |y| {
            let y = Shared::new(y);
            parallel(x.len().div_ceil(CHUNK), x.len() * COST, |task| {
                let range = task * CHUNK..x.len().min((task + 1) * CHUNK);
                // SAFETY: each task has its own range.
                #[allow(unsafe_code)]
                let y = unsafe { y.slice(range.clone()) };
                forward(*self, &x[range], y);
            });
        });
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (shape, grad) = (x.shape().clone(), grad.contiguous()?);
        let (x, grad) = (Values::of(x)?, Values::of(&grad)?);
        let (x, grad) = (&x[..], &grad[..]);
        let dx = filled(x.len(), |dx| {
            let dx = Shared::new(dx);
            parallel(x.len().div_ceil(CHUNK), x.len() * COST, |task| {
                let range = task * CHUNK..x.len().min((task + 1) * CHUNK);
                // SAFETY: each task has its own range.
                #[allow(unsafe_code)]
                let dx = unsafe { dx.slice(range.clone()) };
                backward(*self, &x[range.clone()], &grad[range], dx);
            });
        });
        Tensor::from_vec(dx, shape, &candle_core::Device::Cpu).map(Some)
    }
}

dispatch!(fn forward(function: Function, x: &[f32], y: &mut [f32]) = forward_body);
dispatch!(fn backward(function: Function, x: &[f32], grad: &[f32], dx: &mut [f32]) = backward_body);

#[inline(always)]
fn forward_body<const FMA: bool>(function: Function, x: &[f32], y: &mut [f32]) {
    let pairs = y.iter_mut().zip(x);
    match function {
        Function::Silu => pairs.for_each(|(y, &x)| *y = x * sigmoid::<FMA>(x)),
        Function::Gelu => pairs.for_each(|(y, &x)| *y = x * normal_cdf::<FMA>(x)),
        Function::QuickGelu => pairs.for_each(|(y, &x)| *y = x * sigmoid::<FMA>(1.702 * x)),
    }
}

#[inline(always)]
fn backward_body<const FMA: bool>(function: Function, x: &[f32], grad: &[f32], dx: &mut [f32]) {
    let triples = dx.iter_mut().zip(x.iter().zip(grad));
    match function {
        Function::Silu => triples.for_each(|(dx, (&x, &grad))| *dx = grad * silu_derivative::<FMA>(x)),
        Function::Gelu => triples.for_each(|(dx, (&x, &grad))| *dx = grad * gelu_derivative::<FMA>(x)),
        Function::QuickGelu => triples.for_each(|(dx, (&x, &grad))| {
            let s = sigmoid::<FMA>(1.702 * x);
            *dx = grad * s * (1.0 + 1.702 * x * (1.0 - s));
        }),
    }
}

/// d/dx of x sigmoid(x).
#[inline(always)]
pub(super) fn silu_derivative<const FMA: bool>(x: f32) -> f32 {
    let s = sigmoid::<FMA>(x);
    s * (1.0 + x * (1.0 - s))
}

/// d/dx of x cdf(x).
#[inline(always)]
pub(super) fn gelu_derivative<const FMA: bool>(x: f32) -> f32 {
    normal_cdf::<FMA>(x) + x * normal_pdf::<FMA>(x)
}
