//! What every kernel of `kernels/` needs on its way to the card.

use candle_core::cuda_backend::cudarc::driver::{CudaFunction, CudaSlice, CudaView, LaunchConfig};
use candle_core::{CudaDevice, CudaStorage, DType, Device, Layout, Result, bail};

/// A file of `kernels/`.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Module {
    Merge,
    Pointwise,
    Norm,
    Attention,
}

impl Module {
    fn ptx(self) -> &'static str {
        match self {
            Self::Merge => include_str!(concat!(env!("OUT_DIR"), "/merge.ptx")),
            Self::Pointwise => include_str!(concat!(env!("OUT_DIR"), "/pointwise.ptx")),
            Self::Norm => include_str!(concat!(env!("OUT_DIR"), "/norm.ptx")),
            Self::Attention => include_str!(concat!(env!("OUT_DIR"), "/attention.ptx")),
        }
    }

    /// The kernel `name` in this file.
    pub(crate) fn kernel(self, device: &CudaDevice, name: &str) -> Result<CudaFunction> {
        let module = format!("blocklora-{self:?}");
        Ok(device.get_or_load_custom_func(name, &module, self.ptx())?.into_cuda_function())
    }
}

/// `blocks` of `threads` each.
pub(crate) fn blocks(blocks: usize, threads: u32) -> Result<LaunchConfig> {
    let Ok(blocks) = u32::try_from(blocks) else { bail!("{blocks} blocks are more than a card takes") };
    Ok(LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (threads, 1, 1), shared_mem_bytes: 0 })
}

/// The values of a contiguous f32 tensor's storage; `op` names the caller in the error.
pub(crate) fn values<'a>(storage: &'a CudaStorage, layout: &Layout, op: &str) -> Result<CudaView<'a, f32>> {
    let slice: &CudaSlice<f32> = storage.as_cuda_slice()?;
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(slice.slice(start..end)),
        None => bail!("{op}: the input is not contiguous"),
    }
}

/// Has products on cards follow the `precision` of a model that is loaded on `device` (of several, the last one's): of a
/// model in f16 or bf16, tensor cores round factors to 11 bits (TF32), as many as f16 has; sums stay f32. Of a model in
/// f32 nothing is rounded but what cuDNN does.
pub(crate) fn follow(device: &Device, precision: DType) {
    if device.is_cuda() {
        candle_core::cuda::set_gemm_reduced_precision_f32(precision != DType::F32);
    }
}

/// Whether [`follow`] let tensor cores round.
pub(crate) fn may_round() -> bool {
    candle_core::cuda::gemm_reduced_precision_f32()
}
