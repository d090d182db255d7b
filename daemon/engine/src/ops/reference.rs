//! Each operation in the plainest form that candle can differentiate correctly: the yardstick of the kernels.
//!
//! No `softmax_last_dim` and no `nn::LayerNorm` here: candle 0.11 has no backward for them.

use std::sync::Arc;

use candle_core::{D, DType, Result, Tensor};

/// What turns a training adapter's factors into a branch of a Linear: h = W0 x + scale * r ⊙ (B A x) on `rows`
/// (BlockLoRA, equations 3 and 4).
#[derive(Clone, Debug)]
pub struct LoraBranch {
    /// The output rows R_i that the adapter owns; B has one row for each.
    pub rows: Arc<[u32]>,
    /// Erasure mask r(lambda) on the owned rows, `[b]` (shared by the whole batch) or [batch, b]; none: all ones.
    pub mask: Option<Tensor>,
    /// Multiplies the branch.
    pub scale: f64,
}

fn to_f32(weight: &Tensor) -> Result<Tensor> {
    weight.to_dtype(DType::F32)
}

/// x W^T + bias. `x` [..., n], `weight` [m, n], `bias` `[m]` -> [..., m].
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let y = x.broadcast_matmul(&to_f32(weight)?.t()?)?;
    match bias {
        Some(bias) => y.broadcast_add(&to_f32(bias)?),
        None => Ok(y),
    }
}

/// [`linear`] plus a training adapter: `a` [r, n], `b` [rows, r]. `x` is [batch, tokens, n].
pub fn linear_lora(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    a: &Tensor,
    b: &Tensor,
    branch: &LoraBranch,
) -> Result<Tensor> {
    let y = linear(x, weight, bias)?;
    let mut z = x.broadcast_matmul(&a.t()?)?.broadcast_matmul(&b.t()?)?;
    if let Some(mask) = &branch.mask {
        let mask = if mask.rank() == 2 { mask.unsqueeze(1)? } else { mask.clone() };
        z = z.broadcast_mul(&mask)?;
    }
    let rows = Tensor::from_slice(&branch.rows, branch.rows.len(), x.device())?;
    let last = y.rank() - 1;
    y.index_add(&rows, &(z * branch.scale)?.contiguous()?, last)
}

/// Convolution with zero padding. `x` [B, C, H, W], `weight` [O, C, k, k], `bias` `[O]` -> [B, O, H', W'].
pub fn conv2d(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, stride: usize, padding: usize) -> Result<Tensor> {
    let y = x.conv2d(&to_f32(weight)?, padding, stride, 1, 1)?;
    match bias {
        Some(bias) => y.broadcast_add(&to_f32(bias)?.reshape((1, (), 1, 1))?),
        None => Ok(y),
    }
}

/// Group normalisation over [C / groups, H, W], then scale and shift by channel, then SiLU if asked.
/// `x` [B, C, ...].
pub fn group_norm(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    groups: usize,
    eps: f64,
    with_silu: bool,
) -> Result<Tensor> {
    let dims = x.dims().to_vec();
    let (batch, channels) = (dims[0], dims[1]);
    let grouped = x.reshape((batch, groups, ()))?;
    let centred = grouped.broadcast_sub(&grouped.mean_keepdim(D::Minus1)?)?;
    let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
    let normed = centred.broadcast_div(&(variance + eps)?.sqrt()?)?.reshape(dims.as_slice())?;
    let mut by_channel = vec![1; dims.len()];
    by_channel[1] = channels;
    let y = normed
        .broadcast_mul(&to_f32(weight)?.reshape(by_channel.as_slice())?)?
        .broadcast_add(&to_f32(bias)?.reshape(by_channel.as_slice())?)?;
    if with_silu { silu(&y) } else { Ok(y) }
}

/// Layer normalisation over the last dimension. `x` [..., n].
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
    centred.broadcast_div(&(variance + eps)?.sqrt()?)?.broadcast_mul(&to_f32(weight)?)?.broadcast_add(&to_f32(bias)?)
}

/// softmax(scale q k^T) v in `heads` heads. `q` [B, T, heads * d], `k` and `v` [B, S, heads * d] -> [B, T, heads * d].
/// `causal` hides later positions (S = T).
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize, scale: f64, causal: bool) -> Result<Tensor> {
    let (batch, tokens, width) = q.dims3()?;
    let split = |x: &Tensor| -> Result<Tensor> {
        x.reshape((batch, x.dim(1)?, heads, width / heads))?.transpose(1, 2)?.contiguous()
    };
    let (q, k, v) = (split(q)?, split(k)?, split(v)?);
    let mut scores = (q.matmul(&k.transpose(2, 3)?.contiguous()?)? * scale)?;
    if causal {
        let hidden: Vec<f32> =
            (0..tokens * tokens).map(|i| if i % tokens > i / tokens { f32::NEG_INFINITY } else { 0.0 }).collect();
        scores = scores.broadcast_add(&Tensor::from_vec(hidden, (tokens, tokens), scores.device())?)?;
    }
    let shifted = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?.detach())?.exp()?;
    let weights = shifted.broadcast_div(&shifted.sum_keepdim(D::Minus1)?)?;
    weights.matmul(&v)?.transpose(1, 2)?.contiguous()?.reshape((batch, tokens, width))
}

/// x * sigmoid(x).
pub fn silu(x: &Tensor) -> Result<Tensor> {
    x.broadcast_div(&(x.neg()?.exp()? + 1.0)?)
}

/// GELU with erf, as diffusers' and transformers' "gelu".
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    x.gelu_erf()
}

/// x * sigmoid(1.702 x), CLIP's "quick_gelu".
pub fn quick_gelu(x: &Tensor) -> Result<Tensor> {
    x.broadcast_div(&((x * -1.702)?.exp()? + 1.0)?)
}

/// GEGLU with erf: the first half of the last dimension times GELU of the second. `x` [..., 2 d] -> [..., d].
pub fn geglu(x: &Tensor) -> Result<Tensor> {
    let d = x.dim(D::Minus1)? / 2;
    x.narrow(D::Minus1, 0, d)? * gelu(&x.narrow(D::Minus1, d, d)?.contiguous()?)?
}

/// Each pixel twice in both directions. `x` [B, C, H, W] -> [B, C, 2 H, 2 W].
pub fn upsample_nearest2x(x: &Tensor) -> Result<Tensor> {
    let (b, c, h, w) = x.dims4()?;
    x.reshape((b, c, h, 1, w, 1))?.broadcast_as((b, c, h, 2, w, 2))?.contiguous()?.reshape((b, c, 2 * h, 2 * w))
}
