//! Attention without the matrix of scores: `kernels/attention.cu`.

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{LaunchConfig, PushKernelArg, sys};
use candle_core::{CpuStorage, CudaStorage, CustomOp3, DType, Layout, Result, Shape, Tensor, bail};
use half::f16;

use crate::cuda::{Module, may_round};
use crate::ops::attention::Attention;

/// Whether the kernel is for this: the model is not f32, and no head is wider than [`DEPTH_MAX`].
pub(in crate::ops) fn takes(op: &Attention) -> bool {
    may_round() && op.depth <= DEPTH_MAX
}

/// As [`attention`](crate::ops::attention), with factors in f16.
pub(in crate::ops) fn attention(q: &Tensor, k: &Tensor, v: &Tensor, op: Attention) -> Result<Tensor> {
    let [q, k, v] = [q, k, v].map(|x| x.contiguous()?.to_dtype(DType::F16));
    q?.apply_op3_no_bwd(&k?, &v?, &OnCard(op))
}

/// Of a head: its tiles then fit into the shared memory of every card since 2020 (99 KiB).
const DEPTH_MAX: usize = 160;
/// As the kernel has them.
const QUERIES: usize = 64;
const KEYS: usize = 32;
const THREADS: u32 = 128;

struct OnCard(Attention);

impl CustomOp3 for OnCard {
    fn name(&self) -> &'static str {
        "attention"
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
        bail!("this attention is for a card")
    }

    fn cuda_fwd(
        &self,
        q: &CudaStorage,
        q_layout: &Layout,
        k: &CudaStorage,
        k_layout: &Layout,
        v: &CudaStorage,
        v_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (op, device) = (&self.0, &q.device);
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
        let grid =
            LaunchConfig { grid_dim: (blocks, heads, batch), block_dim: (THREADS, 1, 1), shared_mem_bytes: shared };
        // SAFETY: `Attention::new` made sure that the sizes are those of the tensors, and the kernel stays within them.
        #[allow(unsafe_code)]
        unsafe { launch.launch(grid) }.w()?;
        Ok((CudaStorage::wrap_cuda_slice(y, device.clone()), q_layout.shape().clone()))
    }
}
