//! Group and layer normalisation: `kernels/norm.cu`.

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::PushKernelArg;
use candle_core::{CpuStorage, CudaStorage, CustomOp3, DType, Layout, Result, Shape, Tensor, bail};

use crate::cuda::{Module, blocks, values};
use crate::ops::norm::Spans;

/// As [`group_norm`](crate::ops::group_norm) and [`layer_norm`](crate::ops::layer_norm).
pub(in crate::ops) fn norm(x: &Tensor, weight: &Tensor, bias: &Tensor, spans: Spans) -> Result<Tensor> {
    spans.check(weight, bias)?;
    let (weight, bias) = (weight.to_dtype(DType::F32)?.contiguous()?, bias.to_dtype(DType::F32)?.contiguous()?);
    x.contiguous()?.apply_op3_no_bwd(&weight, &bias, &Norm(spans))
}

/// As many as the kernel is written for.
const THREADS: u32 = 256;

struct Norm(Spans);

impl CustomOp3 for Norm {
    fn name(&self) -> &'static str {
        "norm"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        bail!("this norm is for a card")
    }

    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_layout: &Layout,
        weight: &CudaStorage,
        weight_layout: &Layout,
        bias: &CudaStorage,
        bias_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (spans, device, count) = (&self.0, &x.device, x_layout.shape().elem_count());
        let x = values(x, x_layout, self.name())?;
        let (weight, bias) = (values(weight, weight_layout, self.name())?, values(bias, bias_layout, self.name())?);
        let mut y = device.alloc_zeros::<f32>(count)?;
        if count > 0 {
            let kernel = Module::Norm.kernel(device, "normalise")?;
            let [span, pixels, channels] = [spans.span, spans.pixels, spans.channels].map(u32::try_from);
            let (Ok(span), Ok(pixels), Ok(channels)) = (span, pixels, channels) else {
                bail!("norm: {:?} is too large for a card", x_layout.dims())
            };
            let (eps, with_silu) = (spans.eps, u32::from(spans.with_silu));
            let stream = device.cuda_stream();
            let mut launch = stream.launch_builder(&kernel);
            launch.arg(&x).arg(&weight).arg(&bias).arg(&mut y);
            launch.arg(&span).arg(&pixels).arg(&channels).arg(&eps).arg(&with_silu);
            // SAFETY: one block for each span of `x`, and weights for every channel, as `Spans::check` made sure.
            #[allow(unsafe_code)]
            unsafe { launch.launch(blocks(count / spans.span, THREADS)?) }.w()?;
        }
        Ok((CudaStorage::wrap_cuda_slice(y, device.clone()), x_layout.shape().clone()))
    }
}
