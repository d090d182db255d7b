//! Scaled dot-product attention that never holds the matrix of scores: some queries and some keys at a time, with a
//! running softmax (Dao et al., 2022, "FlashAttention"). Queries lie in the lanes of vectors, so that the softmax needs
//! no sum across a vector.

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};
#[cfg(feature = "cuda")]
use candle_core::{CudaStorage, DType};

use super::attention_backward;
use super::cpu::{Shared, applies, filled, parallel, scratch, values};
#[cfg(feature = "cuda")]
use super::cuda;
use super::reference;
use super::simd::{dispatch, exp};
use super::tile::{Left, Output, PAD, Right, product};

/// softmax(scale q k^T) v in `heads` heads. `q` [B, T, heads * d], `k` and `v` [B, S, heads * d] -> [B, T, heads * d].
/// `causal` hides later positions (S = T).
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize, scale: f64, causal: bool) -> Result<Tensor> {
    let op = Attention::new(q, k, v, heads, scale, causal)?;
    #[cfg(feature = "cuda")]
    if [q, k, v].into_iter().all(cuda::applies) && cuda::takes(&op) {
        let [q, k, v] = [q, k, v].map(|x| x.contiguous()?.to_dtype(DType::F16));
        return q?.apply_op3_no_bwd(&k?, &v?, &op);
    }
    if !applies(q) || !applies(k) || !applies(v) {
        return reference::attention(q, k, v, heads, scale, causal);
    }
    q.contiguous()?.apply_op3(&k.contiguous()?, &v.contiguous()?, op)
}

pub(super) struct Attention {
    pub batch: usize,
    pub queries: usize,
    pub keys: usize,
    pub heads: usize,
    /// Width of one head.
    pub depth: usize,
    pub scale: f32,
    pub causal: bool,
}

/// Queries of a task: lanes.
const QUERIES: usize = 4 * PAD;
/// Keys at a time: scores that the first-level cache nearly holds.
const KEYS: usize = 128;

impl Attention {
    /// Checks that the three fit together.
    fn new(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize, scale: f64, causal: bool) -> Result<Self> {
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
        Ok(Self { batch, queries, keys, heads, depth: width / heads, scale: scale as f32, causal })
    }

    pub(super) fn width(&self) -> usize {
        self.heads * self.depth
    }

    pub(super) fn work(&self) -> usize {
        self.batch * self.queries * self.keys * self.width()
    }

    /// Where a head of a sample begins in a [B, rows, heads * d] slice.
    pub(super) fn head(&self, rows: usize, sample: usize, head: usize) -> usize {
        sample * rows * self.width() + head * self.depth
    }

    /// The head's queries start..end times `factor`, transposed: [d, lanes], zeros beyond the last query.
    pub(super) fn lanes_of(&self, from: &[f32], start: usize, end: usize, factor: f32, to: &mut [f32]) {
        let lanes = to.len() / self.depth.max(1);
        for lane in 0..lanes {
            if start + lane < end {
                let from = &from[(start + lane) * self.width()..][..self.depth];
                from.iter().zip(to[lane..].iter_mut().step_by(lanes)).for_each(|(from, to)| *to = from * factor);
            } else {
                to[lane..].iter_mut().step_by(lanes).for_each(|to| *to = 0.0);
            }
        }
    }

    /// The scores of the keys first..first + rows for the queries from `start` on: `scores` [rows, lanes], with `q`
    /// [d, lanes] already scaled. `k` begins at the head's first key.
    pub(super) fn scores(&self, q: &[f32], k: &[f32], first: usize, rows: usize, start: usize, scores: &mut [f32]) {
        let lanes = scores.len() / rows;
        product(
            Output { data: scores, row: lanes },
            false,
            Left { data: &k[first * self.width()..], row: self.width(), step: 1 },
            Right { data: q, step: lanes },
            (rows, lanes, self.depth),
        );
        if self.causal && first + rows > start + 1 {
            for (key, scores) in (first..).zip(scores.chunks_exact_mut(lanes)) {
                // Query start + lane sees the keys up to itself.
                let hidden = key.saturating_sub(start).min(lanes);
                scores[..hidden].fill(f32::NEG_INFINITY);
            }
        }
    }

    /// Keys that some query before `end` sees.
    pub(super) fn visible(&self, end: usize) -> usize {
        if self.causal { end } else { self.keys }
    }

    /// One head's output for the queries start..end.
    fn forward(&self, q: &[f32], k: &[f32], v: &[f32], start: usize, end: usize, write: impl FnOnce(&[f32], &[f32])) {
        let (depth, lanes) = (self.depth, (end - start).next_multiple_of(PAD));
        let keys = self.visible(end);
        scratch(depth * lanes * 2 + lanes * 2 + KEYS.min(keys) * lanes, |buffer| {
            let (q_lanes, buffer) = buffer.split_at_mut(depth * lanes);
            let (sums, buffer) = buffer.split_at_mut(depth * lanes);
            let (maximum, buffer) = buffer.split_at_mut(lanes);
            let (total, scores) = buffer.split_at_mut(lanes);
            self.lanes_of(q, start, end, self.scale, q_lanes);
            sums.fill(0.0);
            maximum.fill(f32::NEG_INFINITY);
            total.fill(0.0);
            for first in (0..keys).step_by(KEYS) {
                let rows = KEYS.min(keys - first);
                let scores = &mut scores[..rows * lanes];
                self.scores(q_lanes, k, first, rows, start, scores);
                softmax_step(scores, maximum, total, sums);
                product(
                    Output { data: sums, row: lanes },
                    true,
                    Left { data: &v[first * self.width()..], row: 1, step: self.width() },
                    Right { data: scores, step: lanes },
                    (depth, lanes, rows),
                );
            }
            write(sums, total);
        });
    }
}

dispatch!(
    /// Turns `scores` [keys, lanes] into e^(score - maximum), where the running `maximum` takes them in, and brings
    /// `total` and `sums` [d, lanes] of the keys before to the same maximum; `total` takes the new ones in.
    pub(super) fn softmax_step(scores: &mut [f32], maximum: &mut [f32], total: &mut [f32], sums: &mut [f32])
        = softmax_step_body
);

#[inline(always)]
fn softmax_step_body<const FMA: bool>(scores: &mut [f32], maximum: &mut [f32], total: &mut [f32], sums: &mut [f32]) {
    let lanes = maximum.len();
    for first in (0..lanes).step_by(PAD) {
        let mut largest = [f32::NEG_INFINITY; PAD];
        for scores in scores.chunks_exact(lanes) {
            for (largest, &score) in largest.iter_mut().zip(&scores[first..first + PAD]) {
                *largest = if score > *largest { score } else { *largest };
            }
        }
        let mut shrink = [0.0; PAD];
        for ((largest, maximum), shrink) in largest.iter_mut().zip(&mut maximum[first..]).zip(&mut shrink) {
            *largest = if *maximum > *largest { *maximum } else { *largest };
            *shrink = exp::<FMA>(*maximum - *largest);
            *maximum = *largest;
        }
        let mut added = [0.0; PAD];
        for scores in scores.chunks_exact_mut(lanes) {
            for ((score, largest), added) in scores[first..first + PAD].iter_mut().zip(&largest).zip(&mut added) {
                *score = exp::<FMA>(*score - largest);
                *added += *score;
            }
        }
        for ((total, shrink), added) in total[first..].iter_mut().zip(&shrink).zip(&added) {
            *total = *total * shrink + added;
        }
        if shrink != [1.0; PAD] {
            for sums in sums.chunks_exact_mut(lanes) {
                sums[first..first + PAD].iter_mut().zip(&shrink).for_each(|(sum, shrink)| *sum *= shrink);
            }
        }
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
        let (width, blocks) = (self.width(), self.queries.div_ceil(QUERIES));
        let y = filled(q.len(), |y| {
            let y = Shared::new(y);
            parallel(self.batch * self.heads * blocks, self.work(), |task| {
                let (start, task) = (task % blocks * QUERIES, task / blocks);
                let (head, sample) = (task % self.heads, task / self.heads);
                let end = self.queries.min(start + QUERIES);
                let (of_q, of_k) = (self.head(self.queries, sample, head), self.head(self.keys, sample, head));
                self.forward(&q[of_q..], &k[of_k..], &v[of_k..], start, end, |sums, total| {
                    let lanes = total.len();
                    for (lane, query) in (start..end).enumerate() {
                        let first = of_q + query * width;
                        // SAFETY: each task has its own queries of its own head.
                        #[allow(unsafe_code)]
                        let y = unsafe { y.slice(first..first + self.depth) };
                        let inverse = 1.0 / total[lane];
                        y.iter_mut().zip(sums[lane..].iter().step_by(lanes)).for_each(|(y, sum)| *y = sum * inverse);
                    }
                });
            });
        });
        Ok((CpuStorage::F32(y), q_layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        q: &CudaStorage,
        q_layout: &Layout,
        k: &CudaStorage,
        k_layout: &Layout,
        v: &CudaStorage,
        v_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        cuda::attention(self, (q, q_layout), (k, k_layout), (v, v_layout))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        attention_backward::gradients(self, q, k, v, y, grad)
    }
}
