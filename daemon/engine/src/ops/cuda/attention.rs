//! Attention without the matrix of scores: `kernels/attention.cu`.

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{LaunchConfig, PushKernelArg, sys};
use candle_core::{CpuStorage, CudaStorage, CustomOp3, DType, Layout, Result, Shape, Tensor, bail};
use half::f16;

use crate::cuda::{Module, may_round};

/// As [`attention`](crate::ops::attention); none where the kernel does not apply: the model is f32, or a head is wider
/// than [`DEPTH_MAX`].
pub(in crate::ops) fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: usize,
    scale: f64,
    causal: bool,
) -> Result<Option<Tensor>> {
    let (batch, queries, width) = q.dims3()?;
    let keys = k.dim(1)?;
    if k.dims() != [batch, keys, width] || v.dims() != k.dims() || keys == 0 {
        bail!("attention: q {:?}, k {:?} and v {:?} do not fit together", q.dims(), k.dims(), v.dims());
    }
    if heads == 0 || width % heads != 0 {
        bail!("attention: width {width} does not divide into {heads} heads");
    }
    if causal && keys != queries {
        bail!("attention: causal with {queries} queries and {keys} keys");
    }
    let depth = width / heads;
    if !may_round() || depth > DEPTH_MAX {
        return Ok(None);
    }
    let op = Attention { batch, queries, keys, heads, depth, scale: scale as f32, causal };
    let [q, k, v] = [q, k, v].map(|x| x.contiguous()?.to_dtype(DType::F16));
    Ok(Some(q?.apply_op3_no_bwd(&k?, &v?, &op)?))
}

/// Of a head: its tiles then fit into the shared memory of every card since 2020 (99 KiB).
const DEPTH_MAX: usize = 160;
/// As the kernel has them.
const QUERIES: usize = 64;
const KEYS: usize = 32;
const THREADS: u32 = 128;

struct Attention {
    batch: usize,
    queries: usize,
    keys: usize,
    heads: usize,
    /// Width of one head.
    depth: usize,
    scale: f32,
    causal: bool,
}

impl CustomOp3 for Attention {
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
        let device = &q.device;
        let contiguous = |layout: &Layout| match layout.contiguous_offsets() {
            Some((start, end)) => Ok(start..end),
            None => bail!("attention: the input is not contiguous"),
        };
        let q = q.as_cuda_slice::<f16>()?.slice(contiguous(q_layout)?);
        let k = k.as_cuda_slice::<f16>()?.slice(contiguous(k_layout)?);
        let v = v.as_cuda_slice::<f16>()?.slice(contiguous(v_layout)?);
        let mut y = device.alloc_zeros::<f32>(q_layout.shape().elem_count())?;
        let padded = self.depth.next_multiple_of(16);
        let halves = QUERIES * padded + KEYS * padded + QUERIES * KEYS;
        let shared = (2 * halves + 4 * (QUERIES * KEYS + QUERIES * padded)) as u32;
        let sizes =
            [self.batch, self.queries.div_ceil(QUERIES), self.queries, self.keys, self.heads, self.depth, padded];
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
        let causal = u32::from(self.causal);
        let stream = device.cuda_stream();
        let mut launch = stream.launch_builder(&kernel);
        launch.arg(&q).arg(&k).arg(&v).arg(&mut y);
        launch.arg(&queries).arg(&keys).arg(&heads).arg(&depth).arg(&padded).arg(&self.scale).arg(&causal);
        let grid =
            LaunchConfig { grid_dim: (blocks, heads, batch), block_dim: (THREADS, 1, 1), shared_mem_bytes: shared };
        // SAFETY: `attention` made sure that the sizes are those of the tensors, and the kernel stays within them.
        #[allow(unsafe_code)]
        unsafe { launch.launch(grid) }.w()?;
        Ok((CudaStorage::wrap_cuda_slice(y, device.clone()), q_layout.shape().clone()))
    }
}
