//! Group and layer normalisation. Both normalise a contiguous span and differ in how the scale runs along it.

use candle_core::{CpuStorage, CustomOp1, D, Layout, Result, Shape, Tensor, bail};

use super::cpu::{Shared, Values, applies, filled, parallel, small_weight, values};
use super::elementwise::silu_derivative;
use super::reference;
use super::simd::{dispatch, fma, sigmoid, sum_of};

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
    if !applies(x) {
        return reference::group_norm(x, weight, bias, groups, eps, with_silu);
    }
    if x.rank() < 2 || groups == 0 || x.dim(1)? % groups != 0 {
        bail!("group norm: {:?} does not divide into {groups} groups of channels", x.dims());
    }
    let channels = x.dim(1)?;
    let pixels: usize = x.dims()[2..].iter().product();
    let norm = Norm::new(weight, bias, channels, channels / groups * pixels, pixels, eps, with_silu)?;
    x.contiguous()?.apply_op1(norm)
}

/// Layer normalisation over the last dimension. `x` [..., n].
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    if !applies(x) {
        return reference::layer_norm(x, weight, bias, eps);
    }
    let width = x.dim(D::Minus1)?;
    x.contiguous()?.apply_op1(Norm::new(weight, bias, width, width, 1, eps, false)?)
}

struct Norm {
    /// Scale and shift of each channel.
    weight: Vec<f32>,
    bias: Vec<f32>,
    /// Elements normalised together.
    span: usize,
    /// Consecutive elements of one channel.
    pixels: usize,
    eps: f32,
    with_silu: bool,
}

impl Norm {
    fn new(
        weight: &Tensor,
        bias: &Tensor,
        channels: usize,
        span: usize,
        pixels: usize,
        eps: f64,
        with_silu: bool,
    ) -> Result<Self> {
        if weight.elem_count() != channels || bias.elem_count() != channels {
            bail!(
                "norm: weight {:?} and bias {:?} do not fit an input of {channels} channels",
                weight.dims(),
                bias.dims()
            );
        }
        let (weight, bias) = (small_weight(&weight.contiguous()?)?, small_weight(&bias.contiguous()?)?);
        Ok(Self { weight, bias, span, pixels, eps: eps as f32, with_silu })
    }

    /// The channels of span `i`.
    fn channels(&self, i: usize) -> std::ops::Range<usize> {
        let per_span = self.span / self.pixels;
        let start = i * per_span % self.weight.len();
        start..start + per_span
    }
}

impl CustomOp1 for Norm {
    fn name(&self) -> &'static str {
        "norm"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = values(storage, layout, self.name())?;
        let span = self.span;
        let y = filled(x.len(), |y| {
            let y = Shared::new(y);
            parallel(x.len().checked_div(span).unwrap_or(0), x.len() * 8, |i| {
                // SAFETY: each task has its own span.
                #[allow(unsafe_code)]
                let y = unsafe { y.slice(i * span..(i + 1) * span) };
                let channels = self.channels(i);
                forward(
                    &x[i * span..(i + 1) * span],
                    &self.weight[channels.clone()],
                    &self.bias[channels],
                    self.pixels,
                    self.eps,
                    self.with_silu,
                    y,
                );
            });
        });
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (shape, grad, span) = (x.shape().clone(), grad.contiguous()?, self.span);
        let (x, grad) = (Values::of(x)?, Values::of(&grad)?);
        let (x, grad) = (&x[..], &grad[..]);
        let dx = filled(x.len(), |dx| {
            let dx = Shared::new(dx);
            parallel(x.len().checked_div(span).unwrap_or(0), x.len() * 16, |i| {
                let range = i * span..(i + 1) * span;
                // SAFETY: each task has its own span.
                #[allow(unsafe_code)]
                let dx = unsafe { dx.slice(range.clone()) };
                let channels = self.channels(i);
                backward(
                    &x[range.clone()],
                    &grad[range],
                    &self.weight[channels.clone()],
                    &self.bias[channels],
                    self.pixels,
                    self.eps,
                    self.with_silu,
                    dx,
                );
            });
        });
        Tensor::from_vec(dx, shape, &candle_core::Device::Cpu).map(Some)
    }
}

dispatch!(fn forward(x: &[f32], weight: &[f32], bias: &[f32], pixels: usize, eps: f32, with_silu: bool, y: &mut [f32])
    = forward_body);
dispatch!(fn backward(x: &[f32], grad: &[f32], weight: &[f32], bias: &[f32], pixels: usize, eps: f32, with_silu: bool,
    dx: &mut [f32]) = backward_body);

/// The sum of term(i) for i in 0..n: blocks in f32, their sums in f64, so that a long span keeps its accuracy.
#[inline(always)]
fn long_sum(n: usize, term: impl Fn(usize) -> f32) -> f64 {
    const BLOCK: usize = 4096;
    let mut total = 0.0;
    let mut start = 0;
    while start < n {
        let len = BLOCK.min(n - start);
        total += f64::from(sum_of(len, |i| term(start + i)));
        start += len;
    }
    total
}

/// Mean and 1 / sqrt(variance + eps).
#[inline(always)]
fn statistics(x: &[f32], eps: f32) -> (f32, f32) {
    let n = x.len() as f64;
    let mean = (long_sum(x.len(), |i| x[i]) / n) as f32;
    let variance = long_sum(x.len(), |i| {
        let centred = x[i] - mean;
        centred * centred
    }) / n;
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
    let (x, dx) = (&x[..], &mut dx[..x.len()]);
    let mean_g = (long_sum(x.len(), |i| dx[i]) / n) as f32;
    let mean_gn = (long_sum(x.len(), |i| dx[i] * ((x[i] - mean) * inverse)) / n) as f32;
    for (dx, &x) in dx.iter_mut().zip(x) {
        *dx = inverse * (*dx - mean_g - (x - mean) * inverse * mean_gn);
    }
}
