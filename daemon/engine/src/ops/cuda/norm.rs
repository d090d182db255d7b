//! Group and layer normalisation: `kernels/norm.cu`.

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::PushKernelArg;
use candle_core::{CpuStorage, CudaStorage, CustomOp3, D, DType, Layout, Result, Shape, Tensor, bail};

use crate::cuda::{Module, blocks, values};

/// As [`group_norm`](crate::ops::group_norm).
pub(in crate::ops) fn group_norm(
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
    Norm { span: channels / groups * pixels, pixels, channels, eps, with_silu }.apply(x, weight, bias)
}

/// As [`layer_norm`](crate::ops::layer_norm).
pub(in crate::ops) fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    let channels = x.dim(D::Minus1)?;
    Norm { span: channels, pixels: 1, channels, eps, with_silu: false }.apply(x, weight, bias)
}

/// As many as the kernel is written for.
const THREADS: u32 = 256;

struct Norm {
    /// Elements normalised together.
    span: usize,
    /// Consecutive elements of one channel.
    pixels: usize,
    channels: usize,
    eps: f64,
    with_silu: bool,
}

impl Norm {
    fn apply(self, x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
        if weight.elem_count() != self.channels || bias.elem_count() != self.channels {
            bail!(
                "norm: weight {:?} and bias {:?} do not fit an input of {} channels",
                weight.dims(),
                bias.dims(),
                self.channels
            );
        }
        let (weight, bias) = (weight.to_dtype(DType::F32)?.contiguous()?, bias.to_dtype(DType::F32)?.contiguous()?);
        x.contiguous()?.apply_op3_no_bwd(&weight, &bias, &self)
    }
}

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
        let (device, count) = (&x.device, x_layout.shape().elem_count());
        let x = values(x, x_layout, self.name())?;
        let (weight, bias) = (values(weight, weight_layout, self.name())?, values(bias, bias_layout, self.name())?);
        let mut y = device.alloc_zeros::<f32>(count)?;
        if count > 0 {
            let kernel = Module::Norm.kernel(device, "normalise")?;
            let [span, pixels, channels] = [self.span, self.pixels, self.channels].map(u32::try_from);
            let (Ok(span), Ok(pixels), Ok(channels)) = (span, pixels, channels) else {
                bail!("norm: {:?} is too large for a card", x_layout.dims())
            };
            let (eps, with_silu) = (self.eps as f32, u32::from(self.with_silu));
            let stream = device.cuda_stream();
            let mut launch = stream.launch_builder(&kernel);
            launch.arg(&x).arg(&weight).arg(&bias).arg(&mut y);
            launch.arg(&span).arg(&pixels).arg(&channels).arg(&eps).arg(&with_silu);
            // SAFETY: one block for each span of `x`, and weights for every channel, as `apply` made sure.
            #[allow(unsafe_code)]
            unsafe { launch.launch(blocks(count / self.span, THREADS)?) }.w()?;
        }
        Ok((CudaStorage::wrap_cuda_slice(y, device.clone()), x_layout.shape().clone()))
    }
}
