//! Nearest-neighbour upsampling by two, and its gradient.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

use super::cpu::{Shared, Values, applies, filled, parallel, values};
use super::reference;

/// Each pixel twice in both directions. `x` [B, C, H, W] -> [B, C, 2 H, 2 W].
pub fn upsample_nearest2x(x: &Tensor) -> Result<Tensor> {
    if applies(x) { x.contiguous()?.apply_op1(Upsample) } else { reference::upsample_nearest2x(x) }
}

struct Upsample;

impl CustomOp1 for Upsample {
    fn name(&self) -> &'static str {
        "upsample-nearest-2x"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = values(storage, layout, self.name())?;
        let (batch, channels, height, width) = layout.shape().dims4()?;
        let plane = height * width;
        let y = filled(4 * x.len(), |y| {
            let y = Shared::new(y);
            parallel(batch * channels, 4 * x.len(), |image| {
                // SAFETY: each task has its own image plane.
                #[allow(unsafe_code)]
                let y = unsafe { y.slice(image * 4 * plane..(image + 1) * 4 * plane) };
                for row in 0..height {
                    let source = &x[image * plane + row * width..][..width];
                    let (upper, lower) = y[row * 4 * width..][..4 * width].split_at_mut(2 * width);
                    for (pair, &value) in upper.chunks_exact_mut(2).zip(source) {
                        pair.fill(value);
                    }
                    lower.copy_from_slice(upper);
                }
            });
        });
        Ok((CpuStorage::F32(y), (batch, channels, 2 * height, 2 * width).into()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (batch, channels, height, width) = x.dims4()?;
        let grad = grad.contiguous()?;
        let grad = Values::of(&grad)?;
        let (grad, plane) = (&grad[..], height * width);
        let dx = filled(batch * channels * plane, |dx| {
            let dx = Shared::new(dx);
            parallel(batch * channels, grad.len(), |image| {
                // SAFETY: each task has its own image plane.
                #[allow(unsafe_code)]
                let dx = unsafe { dx.slice(image * plane..(image + 1) * plane) };
                for row in 0..height {
                    let (upper, lower) = grad[image * 4 * plane + row * 4 * width..][..4 * width].split_at(2 * width);
                    let pairs = upper.chunks_exact(2).zip(lower.chunks_exact(2));
                    for (dx, (upper, lower)) in dx[row * width..][..width].iter_mut().zip(pairs) {
                        *dx = upper[0] + upper[1] + (lower[0] + lower[1]);
                    }
                }
            });
        });
        Tensor::from_vec(dx, (batch, channels, height, width), &candle_core::Device::Cpu).map(Some)
    }
}
