//! SiLU, GELU, quick-GELU and GEGLU: `kernels/pointwise.cu`.

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::PushKernelArg;
use candle_core::{CpuStorage, CudaStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};

use crate::cuda::{Module, blocks, values};

/// The function that the kernel `name` computes of each element.
pub(in crate::ops) fn pointwise(x: &Tensor, name: &'static str) -> Result<Tensor> {
    x.contiguous()?.apply_op1_no_bwd(&Pointwise { name, halves: false })
}

/// GEGLU with erf. `x` [..., 2 d] -> [..., d].
pub(in crate::ops) fn geglu(x: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op1_no_bwd(&Pointwise { name: "geglu", halves: true })
}

const THREADS: u32 = 256;

struct Pointwise {
    name: &'static str,
    /// Whether the last dimension's second half gates the first.
    halves: bool,
}

impl CustomOp1 for Pointwise {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        bail!("{} is for a card", self.name)
    }

    fn cuda_fwd(&self, storage: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let x = values(storage, layout, self.name)?;
        let mut dims = layout.dims().to_vec();
        let Some(width) = dims.last_mut() else { bail!("{}: a scalar", self.name) };
        if self.halves {
            if *width % 2 != 0 {
                bail!("{}: the last dimension of {:?} is not even", self.name, layout.dims());
            }
            *width /= 2;
        }
        let width = *width;
        let count: usize = dims.iter().product();
        let device = &storage.device;
        let mut y = device.alloc_zeros::<f32>(count)?;
        if count > 0 {
            let kernel = Module::Pointwise.kernel(device, self.name)?;
            let stream = device.cuda_stream();
            let mut launch = stream.launch_builder(&kernel);
            launch.arg(&x).arg(&mut y).arg(&count);
            if self.halves {
                launch.arg(&width);
            }
            // SAFETY: the kernel reads what `x` has and writes `count` values.
            #[allow(unsafe_code)]
            unsafe { launch.launch(blocks(count.div_ceil(THREADS as usize), THREADS)?) }.w()?;
        }
        Ok((CudaStorage::wrap_cuda_slice(y, device.clone()), dims.into()))
    }
}
