//! Convolution as a matrix product over unfolded images, and its input's gradient.

use candle_core::{CpuStorage, CustomOp1, Device, Layout, Result, Shape, Tensor, bail};

use super::cpu::{
    Matrix, MatrixMut, Shared, Threads, Values, Weight, applies, filled, matmul, parallel, scratch, small_weight,
    values,
};
use super::frozen::Frozen;
use super::reference;
use super::unfold::{Geometry, fold, unfold};
use super::winograd::{self, Winograd};

/// Convolution with zero padding. `x` [B, C, H, W], `weight` [O, C, k, k], `bias` `[O]` -> [B, O, H', W'].
pub fn conv2d(
    x: &Tensor,
    weight: impl Into<Frozen>,
    bias: Option<&Tensor>,
    stride: usize,
    padding: usize,
) -> Result<Tensor> {
    let weight = weight.into();
    if !applies(x) {
        return reference::conv2d(x, &weight.tensor(x.device())?, bias, stride, padding);
    }
    let (batch, channels, height, width) = x.dims4()?;
    let &[outputs, weight_channels, kernel, kernel_width] = weight.dims() else {
        bail!("conv2d: the weight {:?} has not four dimensions", weight.dims());
    };
    if weight_channels != channels || kernel != kernel_width || kernel == 0 {
        bail!("conv2d: the weight {:?} does not fit the input {:?}", weight.dims(), x.dims());
    }
    if stride == 0 || height + 2 * padding < kernel || width + 2 * padding < kernel {
        bail!("conv2d: kernel {kernel}, stride {stride} and padding {padding} do not fit the input {:?}", x.dims());
    }
    let bias = match bias {
        Some(bias) if bias.dims() != [outputs] => {
            bail!("conv2d: the bias {:?} does not fit the weight {:?}", bias.dims(), weight.dims())
        }
        Some(bias) => small_weight(&bias.contiguous()?)?,
        None => vec![0.0; outputs],
    };
    let geometry = Geometry::new(height, width, kernel, stride, padding);
    let op = Conv2d { weight: weight.contiguous()?, bias, batch, channels, outputs, geometry };
    x.contiguous()?.apply_op1(op)
}

struct Conv2d {
    weight: Frozen,
    bias: Vec<f32>,
    batch: usize,
    channels: usize,
    outputs: usize,
    geometry: Geometry,
}

/// Elements of an unfolded tile: what the second-level cache holds.
const TILE: usize = 1 << 18;
/// Images of at most so many positions are put side by side,
const SMALL: usize = 128;
/// until there are so many.
const GROUP: usize = 128;
/// Tasks of a convolution of large work on few positions, which is then shared out by outputs, too.
const TASKS: usize = 8;
/// What counts as large, in multiplications.
const LARGE: usize = 1 << 26;
/// Outputs that such a task has at least.
const OUTPUTS: usize = 128;

impl Conv2d {
    /// Whether an image is its own unfolding.
    fn is_pointwise(&self) -> bool {
        self.geometry.kernel == 1 && self.geometry.stride == 1 && self.geometry.padding == 0
    }

    /// The same operation by Winograd's tiles, where they pay; of its adjoint if `transposed`.
    fn winograd<'a>(&self, weight: Weight<'a>, transposed: bool) -> Option<Winograd<'a>> {
        let g = &self.geometry;
        if g.kernel != 3 || g.stride != 1 || g.padding > 2 {
            return None;
        }
        let (height, width, padding) =
            if transposed { (g.out_height, g.out_width, 2 - g.padding) } else { (g.height, g.width, g.padding) };
        let (channels, outputs) =
            if transposed { (self.outputs, self.channels) } else { (self.channels, self.outputs) };
        let op = Winograd { weight, transposed, batch: self.batch, channels, outputs, height, width, padding };
        winograd::pays(channels, outputs, self.batch, op.out_height(), op.out_width()).then_some(op)
    }

    /// Multiplications of the whole operation.
    fn work(&self) -> usize {
        self.batch * self.outputs * self.channels * self.geometry.taps() * self.geometry.positions()
    }

    /// How many outputs a task computes if there are `tiles` of positions.
    fn outputs_of_task(&self, tiles: usize) -> usize {
        let parts = if self.work() < LARGE { 1 } else { (TASKS / tiles).clamp(1, self.outputs.div_ceil(OUTPUTS)) };
        self.outputs.div_ceil(parts)
    }

    /// y = W unfold(x) + bias for a tile of one image's positions at a time.
    fn by_positions(&self, x: &[f32], weight: &[f32], y: &mut [f32]) {
        let (g, outputs) = (&self.geometry, self.outputs);
        let (depth, positions, pixels) = (self.channels * g.taps(), g.positions(), g.height * g.width);
        let columns = (TILE / depth.max(1)).clamp(64, 256);
        let tiles = positions.div_ceil(columns);
        let (count, y) = (self.outputs_of_task(self.batch * tiles), Shared::new(y));
        let parts = outputs.div_ceil(count);
        parallel(self.batch * tiles * parts, self.work(), |task| {
            let (tile, first) = (task / parts, task % parts * count);
            let (image, tile, count) = (tile / tiles, tile % tiles, count.min(outputs - first));
            let weight = Matrix::new(&weight[first * depth..], count, depth);
            let (start, end) = (tile * columns, positions.min((tile + 1) * columns));
            let x = &x[image * self.channels * pixels..(image + 1) * self.channels * pixels];
            let at = (image * outputs + first) * positions + start;
            for (output, &bias) in self.bias[first..first + count].iter().enumerate() {
                let row = at + output * positions;
                // SAFETY: each task has its own positions of its own outputs.
                #[allow(unsafe_code)]
                unsafe { y.slice(row..row + end - start) }.fill(bias);
            }
            // SAFETY: each task has its own positions of its own outputs.
            #[allow(unsafe_code)]
            let y = unsafe { y.matrix(at, count, end - start, positions) };
            if self.is_pointwise() {
                let x = Matrix::strided(&x[start..], depth, end - start, positions);
                return matmul(y, true, weight, x, 1.0, Threads::One);
            }
            scratch(depth * (end - start), |unfolded| {
                for (x, rows) in x.chunks_exact(pixels).zip(unfolded.chunks_exact_mut(g.taps() * (end - start))) {
                    unfold(g, x, start..end, rows, end - start);
                }
                matmul(y, true, weight, Matrix::new(unfolded, depth, end - start), 1.0, Threads::One);
            });
        });
    }

    /// The same for small images, several in a tile.
    fn by_images(&self, x: &[f32], weight: &[f32], y: &mut [f32]) {
        let (g, outputs) = (&self.geometry, self.outputs);
        let (depth, positions, pixels) = (self.channels * g.taps(), g.positions(), g.height * g.width);
        let images = (GROUP / positions).clamp(1, self.batch);
        let tiles = self.batch.div_ceil(images);
        let (count, y) = (self.outputs_of_task(tiles), Shared::new(y));
        let parts = outputs.div_ceil(count);
        parallel(tiles * parts, self.work(), |task| {
            let (tile, first) = (task / parts, task % parts * count);
            let (start, end) = (tile * images, self.batch.min((tile + 1) * images));
            let (columns, count) = ((end - start) * positions, count.min(outputs - first));
            let weight = Matrix::new(&weight[first * depth..], count, depth);
            scratch(depth * columns, |unfolded| {
                for image in start..end {
                    for channel in 0..self.channels {
                        let x = &x[(image * self.channels + channel) * pixels..][..pixels];
                        let rows = &mut unfolded[channel * g.taps() * columns + (image - start) * positions..];
                        unfold(g, x, 0..positions, rows, columns);
                    }
                }
                scratch(count * columns, |product| {
                    let unfolded = Matrix::new(unfolded, depth, columns);
                    matmul(MatrixMut::new(product, count, columns), false, weight, unfolded, 1.0, Threads::One);
                    for (output, product) in product.chunks_exact(columns).enumerate() {
                        for (image, product) in (start..end).zip(product.chunks_exact(positions)) {
                            let at = (image * outputs + first + output) * positions;
                            // SAFETY: each task has its own outputs of its own images.
                            #[allow(unsafe_code)]
                            let y = unsafe { y.slice(at..at + positions) };
                            y.iter_mut().zip(product).for_each(|(y, sum)| *y = sum + self.bias[first + output]);
                        }
                    }
                });
            });
        });
    }

    /// dx = fold(W^T grad), for some channels of one image, or of several small ones, at a time.
    fn backward(&self, grad: &[f32], weight: &[f32], dx: &mut [f32]) {
        let (g, outputs) = (&self.geometry, self.outputs);
        let (taps, positions, pixels) = (g.taps(), g.positions(), g.height * g.width);
        let depth = self.channels * taps;
        let images = if positions <= SMALL { (GROUP / positions).clamp(1, self.batch) } else { 1 };
        let columns = images * positions;
        let block = (TILE / (taps * columns)).clamp(4, 64).min(self.channels);
        let blocks = self.channels.div_ceil(block);
        let dx = Shared::new(dx);
        parallel(self.batch.div_ceil(images) * blocks, self.work(), |task| {
            let (first, start) = (task / blocks * images, task % blocks * block);
            let (images, channels) = (images.min(self.batch - first), block.min(self.channels - start));
            let columns = images * positions;
            let weight = Matrix::strided(&weight[start * taps..], outputs, channels * taps, depth).t();
            let dx = |image: usize| {
                let first = ((first + image) * self.channels + start) * pixels;
                // SAFETY: each task has its own channels of its own images.
                #[allow(unsafe_code)]
                unsafe {
                    dx.slice(first..first + channels * pixels)
                }
            };
            let grad = &grad[first * outputs * positions..(first + images) * outputs * positions];
            let product = |grad: &[f32]| {
                let grad = Matrix::new(grad, outputs, columns);
                if self.is_pointwise() && images == 1 {
                    return matmul(MatrixMut::new(dx(0), channels, pixels), false, weight, grad, 1.0, Threads::One);
                }
                scratch(channels * taps * columns, |unfolded| {
                    let to = MatrixMut::new(unfolded, channels * taps, columns);
                    matmul(to, false, weight, grad, 1.0, Threads::One);
                    for image in 0..images {
                        for (channel, dx) in dx(image).chunks_exact_mut(pixels).enumerate() {
                            fold(g, &mut unfolded[channel * taps * columns + image * positions..], columns, dx);
                        }
                    }
                });
            };
            if images == 1 {
                return product(grad);
            }
            scratch(outputs * columns, |gathered| {
                for (i, grad) in grad.chunks_exact(positions).enumerate() {
                    let (image, output) = (i / outputs, i % outputs);
                    gathered[output * columns + image * positions..][..positions].copy_from_slice(grad);
                }
                product(gathered);
            });
        });
    }
}

impl CustomOp1 for Conv2d {
    fn name(&self) -> &'static str {
        "conv2d"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = values(storage, layout, self.name())?;
        let g = &self.geometry;
        let len = self.batch * self.outputs * g.positions();
        let y = self.weight.with(|weight| {
            if let Some(winograd) = self.winograd(weight, false) {
                return Ok(filled(len, |y| winograd.run(x, &self.bias, y)));
            }
            Ok(weight.with_all(|weight| {
                filled(len, |y| {
                    if y.is_empty() {
                        return;
                    }
                    if g.positions() <= SMALL && self.batch > 1 {
                        self.by_images(x, weight, y);
                    } else {
                        self.by_positions(x, weight, y);
                    }
                })
            }))
        })?;
        Ok((CpuStorage::F32(y), (self.batch, self.outputs, g.out_height, g.out_width).into()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        let grad = Values::of(&grad)?;
        let dx = self.weight.with(|weight| {
            if let Some(winograd) = self.winograd(weight, true) {
                return Ok(filled(x.elem_count(), |dx| winograd.run(&grad, &vec![0.0; self.channels], dx)));
            }
            Ok(weight.with_all(|weight| {
                filled(x.elem_count(), |dx| {
                    if !dx.is_empty() && !grad.is_empty() {
                        self.backward(&grad, weight, dx);
                    }
                })
            }))
        })?;
        Tensor::from_vec(dx, x.shape(), &Device::Cpu).map(Some)
    }
}
