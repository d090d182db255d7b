//! x W^T + bias, and its input's gradient.

use candle_core::{CpuStorage, CustomOp1, D, Device, Layout, Result, Shape, Tensor, bail};

use super::cpu::{
    Matrix, MatrixMut, Shared, Threads, Values, Weight, applies, filled, matmul, parallel, small_weight, values,
};
use super::dense::Dense;
use super::frozen::Frozen;
use super::reference;

/// x W^T + bias. `x` [..., n], `weight` [m, n], `bias` `[m]` -> [..., m].
pub fn linear(x: &Tensor, weight: impl Into<Frozen>, bias: Option<&Tensor>) -> Result<Tensor> {
    let weight = weight.into();
    if !applies(x) {
        return reference::linear(x, &weight.tensor(x.device())?, bias);
    }
    x.contiguous()?.apply_op1(Linear(FrozenLinear::new(x, weight, bias)?))
}

/// The frozen part of a Linear, checked against its input.
pub(super) struct FrozenLinear {
    weight: Frozen,
    bias: Option<Vec<f32>>,
    /// Rows and columns of the weight.
    pub(super) outputs: usize,
    pub(super) inputs: usize,
}

/// Elements of a half-precision weight that are converted at a time.
const TILE: usize = 1 << 16;

impl FrozenLinear {
    pub(super) fn new(x: &Tensor, weight: Frozen, bias: Option<&Tensor>) -> Result<Self> {
        let &[outputs, inputs] = weight.dims() else { bail!("linear: the weight {:?} is no matrix", weight.dims()) };
        if x.dim(D::Minus1)? != inputs {
            bail!("linear: the weight {:?} does not fit the input {:?}", weight.dims(), x.dims());
        }
        let bias = match bias {
            Some(bias) if bias.dims() != [outputs] => {
                bail!("linear: the bias {:?} does not fit the weight {:?}", bias.dims(), weight.dims())
            }
            Some(bias) => Some(small_weight(&bias.contiguous()?)?),
            None => None,
        };
        Ok(Self { weight: weight.contiguous()?, bias, outputs, inputs })
    }

    /// Rows of a tile.
    fn tile_rows(&self) -> usize {
        (TILE / self.inputs.max(1)).clamp(16, 512)
    }

    /// x W^T + bias for `x` [tokens, n].
    pub(super) fn forward(&self, x: &[f32]) -> Result<Vec<f32>> {
        let (m, n) = (self.outputs, self.inputs);
        let tokens = x.len().checked_div(n).unwrap_or(0);
        self.weight.with(|weight| {
            let dense = Dense { weight, rows: m, columns: n, transposed: true };
            Ok(filled(tokens * m, |y| {
                if dense.pays(tokens) {
                    return dense.multiply(x, self.bias.as_deref(), y);
                }
                let x = Matrix::new(x, tokens, n);
                if let Some(bias) = &self.bias {
                    y.chunks_exact_mut(m.max(1)).for_each(|row| row.copy_from_slice(bias));
                }
                let keep = self.bias.is_some();
                if let Weight::F32(weight) = weight {
                    return matmul(
                        MatrixMut::new(y, tokens, m),
                        keep,
                        x,
                        Matrix::new(weight, m, n).t(),
                        1.0,
                        Threads::All,
                    );
                }
                let (rows, y) = (self.tile_rows(), Shared::new(y));
                parallel(m.div_ceil(rows), tokens * m * n, |tile| {
                    let (start, end) = (tile * rows, m.min((tile + 1) * rows));
                    // SAFETY: each task has its own columns of y.
                    #[allow(unsafe_code)]
                    let y = unsafe { y.matrix(start, tokens, end - start, m) };
                    weight.with(start * n..end * n, |weight| {
                        matmul(y, keep, x, Matrix::new(weight, end - start, n).t(), 1.0, Threads::One);
                    });
                });
            }))
        })
    }

    /// The input's gradient grad W for `grad` [tokens, m].
    pub(super) fn backward(&self, grad: &[f32]) -> Result<Vec<f32>> {
        let (m, n) = (self.outputs, self.inputs);
        let tokens = grad.len().checked_div(m).unwrap_or(0);
        self.weight.with(|weight| {
            let dense = Dense { weight, rows: m, columns: n, transposed: false };
            Ok(filled(tokens * n, |dx| {
                if dense.pays(tokens) {
                    return dense.multiply(grad, None, dx);
                }
                if let Weight::F32(weight) = weight {
                    let (grad, weight) = (Matrix::new(grad, tokens, m), Matrix::new(weight, m, n));
                    return matmul(MatrixMut::new(dx, tokens, n), false, grad, weight, 1.0, Threads::All);
                }
                let rows = 8 * self.tile_rows();
                for start in (0..m).step_by(rows) {
                    let len = rows.min(m - start);
                    weight.with(start * n..(start + len) * n, |weight| {
                        let grad = Matrix::strided(&grad[start..], tokens, len, m);
                        let dx = MatrixMut::new(dx, tokens, n);
                        matmul(dx, start > 0, grad, Matrix::new(weight, len, n), 1.0, Threads::All);
                    });
                }
            }))
        })
    }
}

struct Linear(FrozenLinear);

impl CustomOp1 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let y = self.0.forward(values(storage, layout, self.name())?)?;
        let mut dims = layout.dims().to_vec();
        if let Some(last) = dims.last_mut() {
            *last = self.0.outputs;
        }
        Ok((CpuStorage::F32(y), dims.into()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        let dx = self.0.backward(&Values::of(&grad)?)?;
        Tensor::from_vec(dx, x.shape(), &Device::Cpu).map(Some)
    }
}
