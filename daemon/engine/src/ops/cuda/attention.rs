//! Attention without the matrix of scores: `kernels/attention.cu`.

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{LaunchConfig, PushKernelArg, sys};
use candle_core::{CudaStorage, Layout, Result, Shape, bail};
use half::f16;

use crate::cuda::{Module, may_round};
use crate::ops::attention::Attention;

/// Whether the kernel is for this: the model is not f32, and no head is wider than [`DEPTH_MAX`].
pub(in crate::ops) fn takes(op: &Attention) -> bool {
    may_round() && op.depth <= DEPTH_MAX
}

/// Of a head: its tiles then fit into the shared memory of every card since 2020 (99 KiB).
const DEPTH_MAX: usize = 160;
/// As the kernel has them.
const QUERIES: usize = 64;
const KEYS: usize = 32;
const THREADS: u32 = 128;

/// What `op` makes of `q`, `k` and `v`, each in f16 with its layout.
pub(in crate::ops) fn attention(
    op: &Attention,
    (q, q_layout): (&CudaStorage, &Layout),
    (k, k_layout): (&CudaStorage, &Layout),
    (v, v_layout): (&CudaStorage, &Layout),
) -> Result<(CudaStorage, Shape)> {
    let device = &q.device;
    let contiguous = |layout: &Layout| match layout.contiguous_offsets() {
        Some((start, end)) => Ok(start..end),
        None => bail!("attention: the input is not contiguous"),
    };
    let q = q.as_cuda_slice::<f16>()?.slice(contiguous(q_layout)?);
    let k = k.as_cuda_slice::<f16>()?.slice(contiguous(k_layout)?);
    let v = v.as_cuda_slice::<f16>()?.slice(contiguous(v_layout)?);
    let mut y = device.alloc_zeros::<f32>(q_layout.shape().elem_count())?;
    let padded = op.depth.next_multiple_of(16);
    let halves = QUERIES * padded + KEYS * padded + QUERIES * KEYS;
    let shared = (2 * halves + 4 * (QUERIES * KEYS + QUERIES * padded)) as u32;
    let sizes = [op.batch, op.queries.div_ceil(QUERIES), op.queries, op.keys, op.heads, op.depth, padded];
    let [Ok(batch), Ok(blocks), Ok(queries), Ok(keys), Ok(heads), Ok(depth), Ok(padded)] = sizes.map(u32::try_from)
    else {
        bail!("attention: {sizes:?} is too large for a card")
    };
    if queries == 0 || batch == 0 {
        return Ok((CudaStorage::wrap_cuda_slice(y, device.clone()), q_layout.shape().clone()));
    }
    let kernel = Module::Attention.kernel(device, "attention")?;
    let most = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    kernel.set_attribute(most, shared as i32).w()?;
    let causal = u32::from(op.causal);
    let stream = device.cuda_stream();
    let mut launch = stream.launch_builder(&kernel);
    launch.arg(&q).arg(&k).arg(&v).arg(&mut y);
    launch.arg(&queries).arg(&keys).arg(&heads).arg(&depth).arg(&padded).arg(&op.scale).arg(&causal);
    let grid = LaunchConfig { grid_dim: (blocks, heads, batch), block_dim: (THREADS, 1, 1), shared_mem_bytes: shared };
    // SAFETY: `Attention::new` made sure that the sizes are those of the tensors, and the kernel stays within them.
    #[allow(unsafe_code)]
    unsafe { launch.launch(grid) }.w()?;
    Ok((CudaStorage::wrap_cuda_slice(y, device.clone()), q_layout.shape().clone()))
}
