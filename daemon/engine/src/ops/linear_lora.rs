//! A frozen Linear with an adapter under training on some of its output rows, and the gradients of its input and of
//! the adapter's factors.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp3, DType, Device, Layout, Result, Shape, Tensor, bail};

use super::cpu::{Matrix, MatrixMut, Shared, Threads, Values, applies, filled, matmul, scratch, values};
use super::frozen::Frozen;
use super::linear::FrozenLinear;
use super::reference::{self, LoraBranch};

/// [`linear`](super::linear()) plus a training adapter: `a` [r, n], `b` [rows, r]. `x` is [batch, tokens, n].
pub fn linear_lora(
    x: &Tensor,
    weight: impl Into<Frozen>,
    bias: Option<&Tensor>,
    a: &Tensor,
    b: &Tensor,
    branch: &LoraBranch,
) -> Result<Tensor> {
    let weight = weight.into();
    if !applies(x) {
        return reference::linear_lora(x, &weight.tensor(x.device())?, bias, a, b, branch);
    }
    let frozen = FrozenLinear::new(x, weight, bias)?;
    let (batch, tokens, _) = x.dims3()?;
    let (rank, owned) = (a.dim(0)?, branch.rows.len());
    if a.dims() != [rank, frozen.inputs] || b.dims() != [owned, rank] {
        bail!(
            "linear with LoRA: a {:?} and b {:?} do not fit the weight [{}, {}] and {owned} owned rows",
            a.dims(),
            b.dims(),
            frozen.outputs,
            frozen.inputs
        );
    }
    if let Some(row) = branch.rows.iter().find(|&&row| row as usize >= frozen.outputs) {
        bail!("linear with LoRA: owned row {row} of a weight with {} rows", frozen.outputs);
    }
    let mask = match &branch.mask {
        None => None,
        Some(mask) => {
            let fits = mask.dims() == [owned] || mask.dims() == [1, owned] || mask.dims() == [batch, owned];
            if !fits {
                bail!("linear with LoRA: the mask {:?} fits neither [{owned}] nor [{batch}, {owned}]", mask.dims());
            }
            Some(mask.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
        }
    };
    let first = branch.rows.first().copied().unwrap_or(0);
    let consecutive = branch.rows.iter().zip(first..).all(|(&row, expected)| row == expected);
    let op = LinearLora {
        frozen,
        rows: branch.rows.clone(),
        first: consecutive.then_some(first as usize),
        mask,
        scale: branch.scale as f32,
        tokens,
        rank,
    };
    x.contiguous()?.apply_op3(&a.to_dtype(DType::F32)?.contiguous()?, &b.to_dtype(DType::F32)?.contiguous()?, op)
}

struct LinearLora {
    frozen: FrozenLinear,
    rows: Arc<[u32]>,
    /// The first owned row, if they follow each other.
    first: Option<usize>,
    /// [b] or [batch, b].
    mask: Option<Vec<f32>>,
    scale: f32,
    /// Tokens of one sample.
    tokens: usize,
    rank: usize,
}

impl LinearLora {
    /// The mask's row for token `i` of all samples.
    fn mask_row(&self, i: usize) -> Option<&[f32]> {
        let (mask, owned) = (self.mask.as_ref()?, self.rows.len());
        let sample = if mask.len() == owned { 0 } else { i / self.tokens };
        Some(&mask[sample * owned..(sample + 1) * owned])
    }

    /// Adds scale * mask * z, [tokens, b], to the owned columns of `y`.
    fn scatter(&self, z: &[f32], y: &mut [f32]) {
        let (owned, m) = (self.rows.len(), self.frozen.outputs);
        for (i, (z, y)) in z.chunks_exact(owned).zip(y.chunks_exact_mut(m)).enumerate() {
            match self.mask_row(i) {
                Some(mask) => {
                    for ((&row, &z), &mask) in self.rows.iter().zip(z).zip(mask) {
                        y[row as usize] += z * mask * self.scale;
                    }
                }
                None => self.rows.iter().zip(z).for_each(|(&row, &z)| y[row as usize] += z * self.scale),
            }
        }
    }

    /// scale * mask * the owned columns of `grad`, [tokens, b].
    fn gather(&self, grad: &[f32], dz: &mut [f32]) {
        let (owned, m) = (self.rows.len(), self.frozen.outputs);
        for (i, (dz, grad)) in dz.chunks_exact_mut(owned).zip(grad.chunks_exact(m)).enumerate() {
            match self.mask_row(i) {
                Some(mask) => {
                    for ((&row, dz), &mask) in self.rows.iter().zip(dz).zip(mask) {
                        *dz = grad[row as usize] * mask * self.scale;
                    }
                }
                None => self.rows.iter().zip(dz).for_each(|(&row, dz)| *dz = grad[row as usize] * self.scale),
            }
        }
    }
}

impl CustomOp3 for LinearLora {
    fn name(&self) -> &'static str {
        "linear-lora"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        a: &CpuStorage,
        a_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let x = values(x, x_layout, self.name())?;
        let (a, b) = (values(a, a_layout, self.name())?, values(b, b_layout, self.name())?);
        let (m, n, r, owned) = (self.frozen.outputs, self.frozen.inputs, self.rank, self.rows.len());
        let mut y = self.frozen.forward(x)?;
        let tokens = x.len().checked_div(n).unwrap_or(0);
        if owned > 0 && r > 0 {
            scratch(tokens * r, |h| {
                let (x, a) = (Matrix::new(x, tokens, n), Matrix::new(a, r, n));
                matmul(MatrixMut::new(h, tokens, r), false, x, a.t(), 1.0, Threads::All);
                let (h, b) = (Matrix::new(h, tokens, r), Matrix::new(b, owned, r));
                match (self.first, &self.mask) {
                    (Some(first), None) => {
                        let y = Shared::new(&mut y);
                        // SAFETY: nothing else uses y meanwhile.
                        #[allow(unsafe_code)]
                        let y = unsafe { y.matrix(first, tokens, owned, m) };
                        matmul(y, true, h, b.t(), self.scale, Threads::All);
                    }
                    _ => scratch(tokens * owned, |z| {
                        matmul(MatrixMut::new(z, tokens, owned), false, h, b.t(), 1.0, Threads::All);
                        self.scatter(z, &mut y);
                    }),
                }
            });
        }
        let mut dims = x_layout.dims().to_vec();
        if let Some(last) = dims.last_mut() {
            *last = m;
        }
        Ok((CpuStorage::F32(y), dims.into()))
    }

    /// With z = h B^T, h = x A^T and dz = scale mask dy[rows]: dB = dz^T h, dh = dz B, dA = dh^T x and
    /// dx = dy W + dh A. h is computed again rather than kept.
    fn bwd(
        &self,
        x_tensor: &Tensor,
        a_tensor: &Tensor,
        b_tensor: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let grad = Values::of(&grad)?;
        let (x, a, b) = (Values::of(x_tensor)?, Values::of(a_tensor)?, Values::of(b_tensor)?);
        let (n, r, owned) = (self.frozen.inputs, self.rank, self.rows.len());
        let tokens = x.len().checked_div(n).unwrap_or(0);
        let mut dx = if x_tensor.track_op() { Some(self.frozen.backward(&grad)?) } else { None };
        let (mut da, mut db) = (None, None);
        let (x, a, b) = (Matrix::new(&x, tokens, n), Matrix::new(&a, r, n), Matrix::new(&b, owned, r));
        scratch(tokens * owned, |dz| {
            self.gather_if_any(&grad, dz);
            let dz = Matrix::new(dz, tokens, owned);
            scratch(tokens * r, |dh| {
                matmul(MatrixMut::new(dh, tokens, r), false, dz, b, 1.0, Threads::All);
                let dh = Matrix::new(dh, tokens, r);
                if let Some(dx) = &mut dx {
                    matmul(MatrixMut::new(dx, tokens, n), true, dh, a, 1.0, Threads::All);
                }
                if a_tensor.track_op() {
                    da = Some(filled(r * n, |da| {
                        matmul(MatrixMut::new(da, r, n), false, dh.t(), x, 1.0, Threads::All);
                    }));
                }
            });
            if b_tensor.track_op() {
                scratch(tokens * r, |h| {
                    matmul(MatrixMut::new(h, tokens, r), false, x, a.t(), 1.0, Threads::All);
                    let h = Matrix::new(h, tokens, r);
                    db = Some(filled(owned * r, |db| {
                        matmul(MatrixMut::new(db, owned, r), false, dz.t(), h, 1.0, Threads::All);
                    }));
                });
            }
        });
        let tensor = |data: Option<Vec<f32>>, like: &Tensor| {
            data.map(|data| Tensor::from_vec(data, like.shape(), &Device::Cpu)).transpose()
        };
        Ok((tensor(dx, x_tensor)?, tensor(da, a_tensor)?, tensor(db, b_tensor)?))
    }
}

impl LinearLora {
    fn gather_if_any(&self, grad: &[f32], dz: &mut [f32]) {
        if !dz.is_empty() {
            self.gather(grad, dz);
        }
    }
}
