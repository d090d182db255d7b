//! Scaled dot-product attention, a block of queries at a time, and its gradients by recomputation.

use candle_core::{CpuStorage, CustomOp3, Device, Layout, Result, Shape, Tensor, bail};

use super::cpu::{Matrix, MatrixMut, Shared, Threads, Values, applies, filled, matmul, parallel, scratch, values};
use super::reference;
use super::simd::{dispatch, exp, sum_of, sum_of_pairs};

/// softmax(scale q k^T) v in `heads` heads. `q` [B, T, heads * d], `k` and `v` [B, S, heads * d] -> [B, T, heads * d].
/// `causal` hides later positions (S = T).
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize, scale: f64, causal: bool) -> Result<Tensor> {
    if !applies(q) || !applies(k) || !applies(v) {
        return reference::attention(q, k, v, heads, scale, causal);
    }
    let (batch, queries, width) = q.dims3()?;
    let (_, keys, _) = k.dims3()?;
    if k.dims() != [batch, keys, width] || v.dims() != k.dims() || keys == 0 {
        bail!("attention: q {:?}, k {:?} and v {:?} do not fit together", q.dims(), k.dims(), v.dims());
    }
    if heads == 0 || width % heads != 0 {
        bail!("attention: width {width} does not divide into {heads} heads");
    }
    if causal && keys != queries {
        bail!("attention: causal with {queries} queries and {keys} keys");
    }
    let op = Attention { batch, queries, keys, heads, depth: width / heads, scale: scale as f32, causal };
    q.contiguous()?.apply_op3(&k.contiguous()?, &v.contiguous()?, op)
}

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

/// Elements of a block of scores: half of a second-level cache.
const BLOCK: usize = 1 << 16;

impl Attention {
    fn width(&self) -> usize {
        self.heads * self.depth
    }

    /// Queries handled together.
    fn block(&self) -> usize {
        (BLOCK / self.keys).clamp(16, 128).min(self.queries.max(1))
    }

    /// Keys that the queries before `end` see.
    fn visible(&self, end: usize) -> usize {
        if self.causal { end } else { self.keys }
    }

    fn work(&self) -> usize {
        self.batch * self.queries * self.keys * self.width()
    }

    /// The head's `rows` first rows from `row` on in a [B, rows, heads * d] slice.
    fn head<'a>(&self, data: &'a [f32], of: usize, sample: usize, head: usize, row: usize, rows: usize) -> Matrix<'a> {
        let width = self.width();
        Matrix::strided(&data[(sample * of + row) * width + head * self.depth..], rows, self.depth, width)
    }

    /// Softmax weights of the queries start..end into `weights` [end - start, keys].
    fn weights(&self, q: &[f32], k: &[f32], at: (usize, usize), start: usize, end: usize, weights: &mut [f32]) {
        let ((sample, head), keys) = (at, self.visible(end));
        let q = self.head(q, self.queries, sample, head, start, end - start);
        let k = self.head(k, self.keys, sample, head, 0, keys);
        matmul(MatrixMut::new(weights, end - start, keys), false, q, k.t(), self.scale, Threads::One);
        for (query, row) in (start..end).zip(weights.chunks_exact_mut(keys)) {
            let visible = if self.causal { query + 1 } else { keys };
            let (row, hidden) = row.split_at_mut(visible);
            softmax(row);
            hidden.fill(0.0);
        }
    }
}

dispatch!(fn softmax(row: &mut [f32]) = softmax_body);
dispatch!(fn softmax_gradient(weights: &[f32], grad: &mut [f32]) = softmax_gradient_body);

#[inline(always)]
fn softmax_body<const FMA: bool>(row: &mut [f32]) {
    let mut lanes = [f32::NEG_INFINITY; 16];
    let (chunks, rest) = row.as_chunks::<16>();
    for chunk in chunks {
        for (max, &x) in lanes.iter_mut().zip(chunk) {
            *max = if x > *max { x } else { *max };
        }
    }
    for (max, &x) in lanes.iter_mut().zip(rest) {
        *max = if x > *max { x } else { *max };
    }
    let max = lanes.iter().fold(f32::NEG_INFINITY, |max, &x| if x > max { x } else { max });
    row.iter_mut().for_each(|x| *x = exp::<FMA>(*x - max));
    let row = &mut row[..];
    let inverse = 1.0 / sum_of(row, |x| x);
    row.iter_mut().for_each(|x| *x *= inverse);
}

/// Turns dL/dweights into dL/dscores: p (g - sum of p g).
#[inline(always)]
fn softmax_gradient_body<const FMA: bool>(weights: &[f32], grad: &mut [f32]) {
    let (weights, grad) = (&weights[..grad.len()], grad);
    let mean = sum_of_pairs(weights, grad, |weight, grad| weight * grad);
    for (grad, &weight) in grad.iter_mut().zip(weights) {
        *grad = weight * (*grad - mean);
    }
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let name = self.name();
        let (q, k, v) = (values(q, q_layout, name)?, values(k, k_layout, name)?, values(v, v_layout, name)?);
        let (block, width) = (self.block(), self.width());
        let blocks = self.queries.div_ceil(block);
        let y = filled(q.len(), |y| {
            let y = Shared::new(y);
            parallel(self.batch * self.heads * blocks, self.work(), |task| {
                let (start, task) = (task % blocks * block, task / blocks);
                let (head, sample) = (task % self.heads, task / self.heads);
                let end = self.queries.min(start + block);
                let keys = self.visible(end);
                scratch((end - start) * keys, |weights| {
                    self.weights(q, k, (sample, head), start, end, weights);
                    let first = (sample * self.queries + start) * width + head * self.depth;
                    // SAFETY: each task has its own queries of its own head.
                    #[allow(unsafe_code)]
                    let y = unsafe { y.matrix(first, end - start, self.depth, width) };
                    let v = self.head(v, self.keys, sample, head, 0, keys);
                    matmul(y, false, Matrix::new(weights, end - start, keys), v, 1.0, Threads::One);
                });
            });
        });
        Ok((CpuStorage::F32(y), q_layout.shape().clone()))
    }

    fn bwd(
        &self,
        q_tensor: &Tensor,
        k_tensor: &Tensor,
        v_tensor: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let grad = Values::of(&grad)?;
        let (q, k, v) = (Values::of(q_tensor)?, Values::of(k_tensor)?, Values::of(v_tensor)?);
        let (q, k, v, grad) = (&q[..], &k[..], &v[..], &grad[..]);
        let new = |tensor: &Tensor| tensor.track_op().then(|| vec![0.0f32; tensor.elem_count()]);
        let (mut dq, mut dk, mut dv) = (new(q_tensor), new(k_tensor), new(v_tensor));
        {
            fn share(data: &mut Option<Vec<f32>>) -> Option<Shared<'_>> {
                data.as_mut().map(|data| Shared::new(data))
            }
            let (dq, dk, dv) = (share(&mut dq), share(&mut dk), share(&mut dv));
            parallel(self.batch * self.heads, self.work(), |task| {
                self.backward_head(q, k, v, grad, (task / self.heads, task % self.heads), dq, dk, dv);
            });
        }
        let tensor = |data: Option<Vec<f32>>, like: &Tensor| {
            data.map(|data| Tensor::from_vec(data, like.shape(), &Device::Cpu)).transpose()
        };
        Ok((tensor(dq, q_tensor)?, tensor(dk, k_tensor)?, tensor(dv, v_tensor)?))
    }
}

impl Attention {
    /// With P = softmax(scale q k^T): dv = P^T g, dP = g v^T, dS = P (dP - sum of P dP), dq = scale dS k and
    /// dk = scale dS^T q, over the queries block by block in order.
    #[allow(clippy::too_many_arguments)]
    fn backward_head(
        &self,
        q: &[f32],
        k: &[f32],
        v: &[f32],
        grad: &[f32],
        at: (usize, usize),
        dq: Option<Shared>,
        dk: Option<Shared>,
        dv: Option<Shared>,
    ) {
        let ((sample, head), block, width) = (at, self.block(), self.width());
        for start in (0..self.queries).step_by(block) {
            let end = self.queries.min(start + block);
            let (rows, keys) = (end - start, self.visible(end));
            let grad = self.head(grad, self.queries, sample, head, start, rows);
            scratch(2 * rows * keys, |buffer| {
                let (weights, dscores) = buffer.split_at_mut(rows * keys);
                self.weights(q, k, at, start, end, weights);
                let first_key = sample * self.keys * width + head * self.depth;
                if let Some(dv) = dv {
                    // SAFETY: each task has its own head of its own sample.
                    #[allow(unsafe_code)]
                    let dv = unsafe { dv.matrix(first_key, keys, self.depth, width) };
                    matmul(dv, true, Matrix::new(weights, rows, keys).t(), grad, 1.0, Threads::One);
                }
                if dq.is_none() && dk.is_none() {
                    return;
                }
                let values = self.head(v, self.keys, sample, head, 0, keys);
                matmul(MatrixMut::new(dscores, rows, keys), false, grad, values.t(), 1.0, Threads::One);
                for (weights, dscores) in weights.chunks_exact(keys).zip(dscores.chunks_exact_mut(keys)) {
                    softmax_gradient(weights, dscores);
                }
                let dscores = Matrix::new(dscores, rows, keys);
                if let Some(dq) = dq {
                    let first = (sample * self.queries + start) * width + head * self.depth;
                    // SAFETY: as above.
                    #[allow(unsafe_code)]
                    let dq = unsafe { dq.matrix(first, rows, self.depth, width) };
                    let k = self.head(k, self.keys, sample, head, 0, keys);
                    matmul(dq, false, dscores, k, self.scale, Threads::One);
                }
                if let Some(dk) = dk {
                    // SAFETY: as above.
                    #[allow(unsafe_code)]
                    let dk = unsafe { dk.matrix(first_key, keys, self.depth, width) };
                    let q = self.head(q, self.queries, sample, head, start, rows);
                    matmul(dk, true, dscores.t(), q, self.scale, Threads::One);
                }
            });
        }
    }
}
