//! The gradients of attention, by computing the softmax again for some queries at a time.

use candle_core::{Device, Result, Tensor};

use super::attention::{Attention, softmax_step};
use super::cpu::{Shared, Values, parallel, scratch};
use super::simd::dispatch;
use super::tile::{Left, Output, PAD, Right, padded, product};

/// Scores held at a time: half of a second-level cache, for at least [`PAD`] queries.
const SCORES: usize = 1 << 16;

/// dq, dk and dv of those that are tracked.
pub(super) fn gradients(
    op: &Attention,
    q_tensor: &Tensor,
    k_tensor: &Tensor,
    v_tensor: &Tensor,
    y: &Tensor,
    grad: &Tensor,
) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
    let grad = grad.contiguous()?;
    let (grad, y) = (Values::of(&grad)?, Values::of(y)?);
    let (q, k, v) = (Values::of(q_tensor)?, Values::of(k_tensor)?, Values::of(v_tensor)?);
    let inputs = Inputs { q: &q, k: &k, v: &v, y: &y, grad: &grad };
    let new = |tensor: &Tensor| tensor.track_op().then(|| vec![0.0f32; tensor.elem_count()]);
    let (mut dq, mut dk, mut dv) = (new(q_tensor), new(k_tensor), new(v_tensor));
    {
        fn share(data: &mut Option<Vec<f32>>) -> Option<Shared<'_>> {
            data.as_mut().map(|data| Shared::new(data))
        }
        let to = Gradients { dq: share(&mut dq), dk: share(&mut dk), dv: share(&mut dv) };
        parallel(op.batch * op.heads, op.work(), |task| {
            op.backward_head(&inputs, (task / op.heads, task % op.heads), &to);
        });
    }
    let tensor = |data: Option<Vec<f32>>, like: &Tensor| {
        data.map(|data| Tensor::from_vec(data, like.shape(), &Device::Cpu)).transpose()
    };
    Ok((tensor(dq, q_tensor)?, tensor(dk, k_tensor)?, tensor(dv, v_tensor)?))
}

struct Inputs<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    y: &'a [f32],
    grad: &'a [f32],
}

struct Gradients<'a> {
    dq: Option<Shared<'a>>,
    dk: Option<Shared<'a>>,
    dv: Option<Shared<'a>>,
}

dispatch!(
    /// Turns `dweights` [keys, lanes] into dL/dscores: p (g - `mean`), where p = `weights`.
    fn softmax_gradient(weights: &[f32], mean: &[f32], dweights: &mut [f32]) = softmax_gradient_body
);
dispatch!(fn scale_rows(data: &mut [f32], factors: &[f32]) = scale_rows_body);

#[inline(always)]
fn softmax_gradient_body<const FMA: bool>(weights: &[f32], mean: &[f32], dweights: &mut [f32]) {
    for (weights, dweights) in weights.chunks_exact(mean.len()).zip(dweights.chunks_exact_mut(mean.len())) {
        for ((grad, &weight), &mean) in dweights.iter_mut().zip(weights).zip(mean) {
            *grad = weight * (*grad - mean);
        }
    }
}

#[inline(always)]
fn scale_rows_body<const FMA: bool>(data: &mut [f32], factors: &[f32]) {
    for row in data.chunks_exact_mut(factors.len()) {
        row.iter_mut().zip(factors).for_each(|(x, factor)| *x *= factor);
    }
}

impl Attention {
    /// The queries start..end of a head, times `factor`, as rows of `to` [lanes, padded d]; zeros around them.
    fn rows_of(&self, from: &[f32], start: usize, end: usize, factor: f32, to: &mut [f32]) {
        to.fill(0.0);
        for (query, to) in (start..end).zip(to.chunks_exact_mut(padded(self.depth))) {
            let from = &from[query * self.width()..][..self.depth];
            to.iter_mut().zip(from).for_each(|(to, from)| *to = from * factor);
        }
    }

    /// With P = softmax(scale q k^T): dv = P^T g, dP = g v^T, dS = P (dP - g y), dq = scale dS k and
    /// dk = scale dS^T q, over the queries block by block in order.
    fn backward_head(&self, inputs: &Inputs, (sample, head): (usize, usize), to: &Gradients) {
        let (depth, width, row) = (self.depth, self.width(), padded(self.depth));
        let (of_q, of_k) = (self.head(self.queries, sample, head), self.head(self.keys, sample, head));
        let (q, y, grad) = (&inputs.q[of_q..], &inputs.y[of_q..], &inputs.grad[of_q..]);
        let (k, v) = (&inputs.k[of_k..], &inputs.v[of_k..]);
        let block = (SCORES / self.keys / PAD * PAD).clamp(PAD, 4 * PAD);
        let wants_scores = to.dq.is_some() || to.dk.is_some();
        scratch(2 * self.keys * row, |sums| {
            // [keys, padded d] each.
            sums.fill(0.0);
            let (dk, dv) = sums.split_at_mut(self.keys * row);
            for start in (0..self.queries).step_by(block) {
                let end = self.queries.min(start + block);
                let (lanes, keys) = (padded(end - start), self.visible(end));
                scratch(2 * keys * lanes + 3 * depth * lanes + 2 * lanes * row + 3 * lanes, |buffer| {
                    let (weights, buffer) = buffer.split_at_mut(keys * lanes);
                    let (dweights, buffer) = buffer.split_at_mut(keys * lanes);
                    let (q_lanes, buffer) = buffer.split_at_mut(depth * lanes);
                    let (grad_lanes, buffer) = buffer.split_at_mut(depth * lanes);
                    let (dq_lanes, buffer) = buffer.split_at_mut(depth * lanes);
                    let (q_rows, buffer) = buffer.split_at_mut(lanes * row);
                    let (grad_rows, buffer) = buffer.split_at_mut(lanes * row);
                    let (maximum, buffer) = buffer.split_at_mut(lanes);
                    let (total, mean) = buffer.split_at_mut(lanes);
                    self.lanes_of(q, start, end, self.scale, q_lanes);
                    self.scores(q_lanes, k, 0, keys, start, weights);
                    maximum.fill(f32::NEG_INFINITY);
                    total.fill(0.0);
                    softmax_step(weights, maximum, total, &mut []);
                    total.iter_mut().for_each(|total| *total = 1.0 / *total);
                    scale_rows(weights, total);
                    self.rows_of(grad, start, end, 1.0, grad_rows);
                    if to.dv.is_some() {
                        product(
                            Output { data: dv, row },
                            true,
                            Left { data: weights, row: lanes, step: 1 },
                            Right { data: grad_rows, step: row },
                            (keys, row, end - start),
                        );
                    }
                    if !wants_scores {
                        return;
                    }
                    self.lanes_of(grad, start, end, 1.0, grad_lanes);
                    product(
                        Output { data: dweights, row: lanes },
                        false,
                        Left { data: v, row: width, step: 1 },
                        Right { data: grad_lanes, step: lanes },
                        (keys, lanes, depth),
                    );
                    mean.fill(0.0);
                    for (mean, query) in mean.iter_mut().zip(start..end) {
                        let at = query * width..query * width + depth;
                        *mean = grad[at.clone()].iter().zip(&y[at]).map(|(grad, y)| grad * y).sum();
                    }
                    softmax_gradient(weights, mean, dweights);
                    if to.dk.is_some() {
                        self.rows_of(q, start, end, self.scale, q_rows);
                        product(
                            Output { data: dk, row },
                            true,
                            Left { data: dweights, row: lanes, step: 1 },
                            Right { data: q_rows, step: row },
                            (keys, row, end - start),
                        );
                    }
                    if let Some(dq) = to.dq {
                        product(
                            Output { data: dq_lanes, row: lanes },
                            false,
                            Left { data: k, row: 1, step: width },
                            Right { data: dweights, step: lanes },
                            (depth, lanes, keys),
                        );
                        for (lane, query) in (start..end).enumerate() {
                            let first = of_q + query * width;
                            // SAFETY: each task has its own head of its own sample.
                            #[allow(unsafe_code)]
                            let dq = unsafe { dq.slice(first..first + depth) };
                            let from = dq_lanes[lane..].iter().step_by(lanes);
                            dq.iter_mut().zip(from).for_each(|(dq, from)| *dq = from * self.scale);
                        }
                    }
                });
            }
            for (to, from) in [(to.dk, &*dk), (to.dv, &*dv)] {
                let Some(to) = to else { continue };
                for (key, from) in from.chunks_exact(row).enumerate() {
                    let first = of_k + key * width;
                    // SAFETY: as above.
                    #[allow(unsafe_code)]
                    unsafe { to.slice(first..first + depth) }.copy_from_slice(&from[..depth]);
                }
            }
        });
    }
}
