//! Group and layer normalisation. Both normalise a contiguous span and differ in how the scale runs along it.

use candle_core::{CpuStorage, CustomOp1, D, Layout, Result, Shape, Tensor, bail};

use super::cpu::{Shared, Values, applies, filled, parallel, small_weight, values};
#[cfg(feature = "cuda")]
use super::cuda;
use super::elementwise::silu_derivative;
use super::reference;
use super::simd::{dispatch, fma, sigmoid, sum_of_pairs};

/// Group normalisation over [C / groups, H, W], then scale and shift by channel, then SiLU if asked.
/// `x` [B, C, ...].
pub fn group_norm(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    groups: usize,
    eps: f64,
    with_silu: bool,
) -> Result<Tensor> {
    if x.rank() < 2 || groups == 0 || x.dim(1)? % groups != 0 {
        bail!("group norm: {:?} does not divide into {groups} groups of channels", x.dims());
    }
    let channels = x.dim(1)?;
    let pixels: usize = x.dims()[2..].iter().product();
    let spans = Spans { channels, span: channels / groups * pixels, pixels, eps: eps as f32, with_silu };
    #[cfg(feature = "cuda")]
    if cuda::applies(x) {
        return cuda::norm(x, weight, bias, spans);
    }
    if !applies(x) {
        return reference::group_norm(x, weight, bias, groups, eps, with_silu);
    }
    x.contiguous()?.apply_op1(Norm::new(weight, bias, spans)?)
}

/// Layer normalisation over the last dimension. `x` [..., n].
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    let channels = x.dim(D::Minus1)?;
    let spans = Spans { channels, span: channels, pixels: 1, eps: eps as f32, with_silu: false };
    #[cfg(feature = "cuda")]
    if cuda::applies(x) {
        return cuda::norm(x, weight, bias, spans);
    }
    if !applies(x) {
        return reference::layer_norm(x, weight, bias, eps);
    }
    x.contiguous()?.apply_op1(Norm::new(weight, bias, spans)?)
}

/// Elements of a task, roughly.
const TASK: usize = 1 << 12;

/// What is normalised together.
pub(super) struct Spans {
    pub channels: usize,
    /// Elements normalised together.
    pub span: usize,
    /// Consecutive elements of one channel.
    pub pixels: usize,
    pub eps: f32,
    pub with_silu: bool,
}

impl Spans {
    /// Checks that every channel has its scale and its shift.
    pub(super) fn check(&self, weight: &Tensor, bias: &Tensor) -> Result<()> {
        let Self { channels, .. } = self;
        if weight.elem_count() != *channels || bias.elem_count() != *channels {
            bail!(
                "norm: weight {:?} and bias {:?} do not fit an input of {channels} channels",
                weight.dims(),
                bias.dims()
            );
        }
        Ok(())
    }
}

struct Norm {
    /// Scale and shift of each channel.
    weight: Vec<f32>,
    bias: Vec<f32>,
    spans: Spans,
}

impl Norm {
    fn new(weight: &Tensor, bias: &Tensor, spans: Spans) -> Result<Self> {
        spans.check(weight, bias)?;
        let (weight, bias) = (small_weight(&weight.contiguous()?)?, small_weight(&bias.contiguous()?)?);
        Ok(Self { weight, bias, spans })
    }

    /// Elements of a task: whole spans.
    fn task_len(&self) -> usize {
        (TASK / self.spans.span.max(1)).max(1) * self.spans.span
    }
}

impl CustomOp1 for Norm {
    fn name(&self) -> &'static str {
        "norm"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = values(storage, layout, self.name())?;
        let len = self.task_len();
        let y = filled(x.len(), |y| {
            let (total, y) = (x.len(), Shared::new(y));
            parallel(total.div_ceil(len.max(1)), total * 8, |task| {
                let range = task * len..total.min((task + 1) * len);
                // SAFETY: each task has its own spans.
                #[allow(unsafe_code)]
                let y = unsafe { y.slice(range.clone()) };
                forward(self, &x[range.clone()], range.start, y);
            });
        });
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (shape, grad, len) = (x.shape().clone(), grad.contiguous()?, self.task_len());
        let (x, grad) = (Values::of(x)?, Values::of(&grad)?);
        let (x, grad) = (&x[..], &grad[..]);
        let dx = filled(x.len(), |dx| {
            let (total, dx) = (x.len(), Shared::new(dx));
            parallel(total.div_ceil(len.max(1)), total * 16, |task| {
                let range = task * len..total.min((task + 1) * len);
                // SAFETY: each task has its own spans.
                #[allow(unsafe_code)]
                let dx = unsafe { dx.slice(range.clone()) };
                backward(self, &x[range.clone()], &grad[range.clone()], range.start, dx);
            });
        });
        Tensor::from_vec(dx, shape, &candle_core::Device::Cpu).map(Some)
    }
}

dispatch!(fn forward(norm: &Norm, x: &[f32], first: usize, y: &mut [f32]) = forward_spans);
dispatch!(fn backward(norm: &Norm, x: &[f32], grad: &[f32], first: usize, dx: &mut [f32]) = backward_spans);

impl Norm {
    /// Weight and bias of the channels of the span at element `start`.
    #[inline(always)]
    fn affine(&self, start: usize) -> (&[f32], &[f32]) {
        let first = start / self.spans.pixels % self.weight.len();
        let channels = first..first + self.spans.span / self.spans.pixels;
        (&self.weight[channels.clone()], &self.bias[channels])
    }
}

/// Whole spans; `first` is their first element's index in the input.
#[inline(always)]
fn forward_spans<const FMA: bool>(norm: &Norm, x: &[f32], first: usize, y: &mut [f32]) {
    for (i, (x, y)) in x.chunks_exact(norm.spans.span).zip(y.chunks_exact_mut(norm.spans.span)).enumerate() {
        let (weight, bias) = norm.affine(first + i * norm.spans.span);
        forward_body::<FMA>(x, weight, bias, norm.spans.pixels, norm.spans.eps, norm.spans.with_silu, y);
    }
}

/// As [`forward_spans`].
#[inline(always)]
fn backward_spans<const FMA: bool>(norm: &Norm, x: &[f32], grad: &[f32], first: usize, dx: &mut [f32]) {
    let spans = x
        .chunks_exact(norm.spans.span)
        .zip(grad.chunks_exact(norm.spans.span))
        .zip(dx.chunks_exact_mut(norm.spans.span));
    for (i, ((x, grad), dx)) in spans.enumerate() {
        let (weight, bias) = norm.affine(first + i * norm.spans.span);
        backward_body::<FMA>(x, grad, weight, bias, norm.spans.pixels, norm.spans.eps, norm.spans.with_silu, dx);
    }
}

/// The sum of term(a[i], b[i]): blocks in f32, their sums in f64, so that a long span keeps its accuracy.
#[inline(always)]
fn long_sum(a: &[f32], b: &[f32], term: impl Fn(f32, f32) -> f32) -> f64 {
    a.chunks(4096).zip(b.chunks(4096)).map(|(a, b)| f64::from(sum_of_pairs(a, b, &term))).sum()
}

/// Mean and 1 / sqrt(variance + eps).
#[inline(always)]
fn statistics(x: &[f32], eps: f32) -> (f32, f32) {
    let n = x.len() as f64;
    let mean = (long_sum(x, x, |x, _| x) / n) as f32;
    let variance = long_sum(x, x, |x, _| (x - mean) * (x - mean)) / n;
    (mean, (1.0 / (variance + f64::from(eps)).sqrt()) as f32)
}

#[inline(always)]
fn forward_body<const FMA: bool>(
    x: &[f32],
    weight: &[f32],
    bias: &[f32],
    pixels: usize,
    eps: f32,
    with_silu: bool,
    y: &mut [f32],
) {
    let (mean, inverse) = statistics(x, eps);
    if pixels == 1 {
        for ((y, &x), (&weight, &bias)) in y.iter_mut().zip(x).zip(weight.iter().zip(bias)) {
            let normed = fma::<FMA>((x - mean) * inverse, weight, bias);
            *y = if with_silu { normed * sigmoid::<FMA>(normed) } else { normed };
        }
        return;
    }
    for (channel, (y, x)) in y.chunks_exact_mut(pixels).zip(x.chunks_exact(pixels)).enumerate() {
        let (weight, bias) = (weight[channel], bias[channel]);
        if with_silu {
            for (y, &x) in y.iter_mut().zip(x) {
                let normed = fma::<FMA>((x - mean) * inverse, weight, bias);
                *y = normed * sigmoid::<FMA>(normed);
            }
        } else {
            for (y, &x) in y.iter_mut().zip(x) {
                *y = fma::<FMA>((x - mean) * inverse, weight, bias);
            }
        }
    }
}

/// With n = (x - mean) / sigma and g = dL/dn: dx = (g - mean(g) - n mean(g n)) / sigma.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn backward_body<const FMA: bool>(
    x: &[f32],
    grad: &[f32],
    weight: &[f32],
    bias: &[f32],
    pixels: usize,
    eps: f32,
    with_silu: bool,
    dx: &mut [f32],
) {
    let (mean, inverse) = statistics(x, eps);
    if pixels == 1 {
        for ((dx, &grad), &weight) in dx.iter_mut().zip(grad).zip(weight) {
            *dx = grad * weight;
        }
        if with_silu {
            for ((dx, &x), (&weight, &bias)) in dx.iter_mut().zip(x).zip(weight.iter().zip(bias)) {
                *dx *= silu_derivative::<FMA>(fma::<FMA>((x - mean) * inverse, weight, bias));
            }
        }
    } else {
        let planes = dx.chunks_exact_mut(pixels).zip(grad.chunks_exact(pixels)).zip(x.chunks_exact(pixels));
        for (channel, ((dx, grad), x)) in planes.enumerate() {
            let (weight, bias) = (weight[channel], bias[channel]);
            if with_silu {
                for ((dx, &grad), &x) in dx.iter_mut().zip(grad).zip(x) {
                    let normed = fma::<FMA>((x - mean) * inverse, weight, bias);
                    *dx = grad * weight * silu_derivative::<FMA>(normed);
                }
            } else {
                for (dx, &grad) in dx.iter_mut().zip(grad) {
                    *dx = grad * weight;
                }
            }
        }
    }
    let n = x.len() as f64;
    let mean_g = (long_sum(dx, dx, |g, _| g) / n) as f32;
    let mean_gn = (long_sum(dx, x, |g, x| g * ((x - mean) * inverse)) / n) as f32;
    for (dx, &x) in dx.iter_mut().zip(x) {
        *dx = inverse * (*dx - mean_g - (x - mean) * inverse * mean_gn);
    }
}
