//! 3x3 convolution of stride 1 by Winograd's minimal filtering F(4x4, 3x3) (Lavin and Gray, 2015): 36 products for 16
//! outputs of a channel instead of 144.
//!
//! With the points 0, +-1/sqrt 2, +-sqrt 2 and infinity the transforms are well scaled: the error stays near that of a
//! plain sum. Weights are transformed piece by piece whenever they are used, in the second-level cache: that costs a
//! few hundredths of the products, where keeping them would cost four times the weights' memory.

// Lanes of several arrays at once.
#![allow(clippy::needless_range_loop)]

use std::ops::Range;

use super::cpu::{Shared, Weight, parallel, scratch};
use super::simd::{dispatch, fma};
use super::tile::{Left, Output, PAD, Right, product};

/// Outputs of a tile in each direction.
const OUT: usize = 4;
/// Inputs of a tile in each direction.
const IN: usize = 6;
/// Products of a tile.
const POINTS: usize = IN * IN;

/// P = 1/sqrt 2 and Q = sqrt 2, so that P Q = 1.
const P: f32 = std::f32::consts::FRAC_1_SQRT_2;
const Q: f32 = std::f32::consts::SQRT_2;

/// Tiles whose products are summed together.
const GROUP_PANELS: usize = 8;
/// Output channels of a task: with [`GROUP_PANELS`] the sums fill half of a second-level cache.
const OUTPUTS: usize = 24;
/// Input channels summed at a time.
const CHANNELS: usize = 64;
/// Transformed inputs kept at a time, in elements.
const STRIP: usize = 4 << 20;

/// A convolution with a 3x3 kernel and stride 1.
#[derive(Clone, Copy)]
pub(super) struct Winograd<'a> {
    /// [O, C, 3, 3] or, if `transposed`, [C, O, 3, 3] with the kernel turned by half a turn: the adjoint.
    pub weight: Weight<'a>,
    pub transposed: bool,
    pub batch: usize,
    /// C and O of this convolution.
    pub channels: usize,
    pub outputs: usize,
    /// Of the input image.
    pub height: usize,
    pub width: usize,
    /// Zeros on all four sides, at most 2.
    pub padding: usize,
}

/// Whether the tiles of such a convolution are worth it.
pub(super) fn pays(channels: usize, outputs: usize, batch: usize, out_height: usize, out_width: usize) -> bool {
    let tiles = batch * out_height.div_ceil(OUT) * out_width.div_ceil(OUT);
    let full = (batch * out_height * out_width) as f64 / (tiles.next_multiple_of(PAD) * OUT * OUT) as f64;
    channels >= 32 && outputs >= 16 && full > 0.45
}

/// Rows of tiles whose inputs are transformed together.
struct Strip {
    /// Tile rows, counted through all images.
    rows: Range<usize>,
    panels: usize,
}

impl Winograd<'_> {
    pub(super) fn out_height(&self) -> usize {
        self.height + 2 * self.padding - 2
    }

    pub(super) fn out_width(&self) -> usize {
        self.width + 2 * self.padding - 2
    }

    /// Tiles in a row and rows of tiles in an image.
    fn tiles(&self) -> (usize, usize) {
        (self.out_width().div_ceil(OUT), self.out_height().div_ceil(OUT))
    }

    /// Writes `y` [B, O, H', W'] for `x` [B, C, H, W].
    pub(super) fn run(&self, x: &[f32], bias: &[f32], y: &mut [f32]) {
        let (across, down) = self.tiles();
        let rows = self.batch * down;
        // As many rows at a time as fit, evenly, and at least a panel.
        let fitting = (STRIP / (POINTS * self.channels * across)).max(PAD.div_ceil(across));
        let strip_rows = rows.div_ceil(rows.div_ceil(fitting));
        let y = Shared::new(y);
        for start in (0..rows).step_by(strip_rows) {
            let rows = start..rows.min(start + strip_rows);
            let strip = Strip { panels: (rows.len() * across).div_ceil(PAD), rows };
            scratch(POINTS * strip.panels * self.channels * PAD, |inputs| {
                self.transform_inputs(x, &strip, inputs);
                self.multiply(&strip, inputs, bias, y);
            });
        }
    }

    /// Where the inputs of a group of panels begin, for a run of channels of `len` of them from `channel` on: they lie
    /// as [group, run, 36, panel, channel, 16], in the order in which [`Self::multiply`] reads them.
    fn place(&self, strip: &Strip, group: usize, channel: usize) -> (usize, usize, usize) {
        let (panels, start) = (GROUP_PANELS.min(strip.panels - group * GROUP_PANELS), channel / CHANNELS * CHANNELS);
        let at = POINTS * PAD * (self.channels * group * GROUP_PANELS + panels * start);
        (at, panels, CHANNELS.min(self.channels - start))
    }

    /// V = B^T d B of every tile, as [`Self::place`] says.
    fn transform_inputs(&self, x: &[f32], strip: &Strip, inputs: &mut [f32]) {
        let inputs = Shared::new(inputs);
        let ((across, down), panels) = (self.tiles(), strip.panels);
        let (plane, padded) = (self.height * self.width, OUT * across + 2);
        // Each tile row's six input rows, with their zeros.
        let row_len = IN * padded;
        parallel(self.channels, self.channels * panels * POINTS * PAD * 4, |channel| {
            scratch(strip.rows.len() * row_len + PAD, |image| {
                for (row, to) in strip.rows.clone().zip(image.chunks_exact_mut(row_len)) {
                    let (sample, first) = (row / down, row % down * OUT);
                    let x = &x[(sample * self.channels + channel) * plane..][..plane];
                    for (i, to) in to.chunks_exact_mut(padded).enumerate() {
                        let from = (first + i).checked_sub(self.padding).filter(|&y| y < self.height);
                        let Some(from) = from.map(|y| &x[y * self.width..][..self.width]) else {
                            to.fill(0.0);
                            continue;
                        };
                        let (left, to) = to.split_at_mut(self.padding);
                        left.fill(0.0);
                        let len = from.len().min(to.len());
                        to[..len].copy_from_slice(&from[..len]);
                        to[len..].fill(0.0);
                    }
                }
                let tiles = strip.rows.len() * across;
                for panel in 0..panels {
                    let offsets: [usize; PAD] = std::array::from_fn(|lane| {
                        let tile = (panel * PAD + lane).min(tiles - 1);
                        tile / across * row_len + tile % across * OUT
                    });
                    let mut values = [[0.0; PAD]; POINTS];
                    transform_input(image, padded, &offsets, &mut values);
                    let (group, member) = (panel / GROUP_PANELS, panel % GROUP_PANELS);
                    let (at, panels, run) = self.place(strip, group, channel);
                    for (point, values) in values.iter().enumerate() {
                        let at = at + ((point * panels + member) * run + channel % CHANNELS) * PAD;
                        // SAFETY: each task has its own channel.
                        #[allow(unsafe_code)]
                        unsafe { inputs.slice(at..at + PAD) }.copy_from_slice(values);
                    }
                }
            });
        });
    }

    /// Y = A^T (sum over the channels of U V) A for some tiles and some output channels at a time.
    fn multiply(&self, strip: &Strip, inputs: &[f32], bias: &[f32], y: Shared) {
        let (groups, blocks) = (strip.panels.div_ceil(GROUP_PANELS), self.outputs.div_ceil(OUTPUTS));
        let work = POINTS * strip.panels * PAD * self.channels * self.outputs;
        parallel(groups * blocks, work, |task| {
            let (group, block) = (task % groups, task / groups);
            let panels = group * GROUP_PANELS..strip.panels.min((group + 1) * GROUP_PANELS);
            let outputs = block * OUTPUTS..self.outputs.min((block + 1) * OUTPUTS);
            let (rows, count) = (outputs.len(), panels.len());
            scratch(POINTS * count * rows * PAD, |sums| {
                for start in (0..self.channels).step_by(CHANNELS) {
                    let channels = start..self.channels.min(start + CHANNELS);
                    self.with_weights(outputs.clone(), channels.clone(), |weights| {
                        let mut inputs = inputs[self.place(strip, group, start).0..].chunks_exact(channels.len() * PAD);
                        let weights = weights.chunks_exact(channels.len() * OUTPUTS);
                        for (weights, sums) in weights.zip(sums.chunks_exact_mut(count * rows * PAD)) {
                            for (sums, inputs) in sums.chunks_exact_mut(rows * PAD).zip(&mut inputs) {
                                product(
                                    Output { data: sums, row: PAD },
                                    start > 0,
                                    Left { data: weights, row: 1, step: OUTPUTS },
                                    Right { data: inputs, step: PAD },
                                    (rows, PAD, channels.len()),
                                );
                            }
                        }
                    });
                }
                let sums = sums.as_chunks::<PAD>().0;
                for (i, panel) in panels.enumerate() {
                    for (row, output) in outputs.clone().enumerate() {
                        let sums: [&[f32; PAD]; POINTS] =
                            std::array::from_fn(|point| &sums[(point * count + i) * rows + row]);
                        self.write_tiles(strip, panel, output, &sums, bias[output], y);
                    }
                }
            });
        });
    }

    /// Calls `f` with U = G g G^T of some kernels, [36, channels, [`OUTPUTS`]].
    fn with_weights(&self, outputs: Range<usize>, channels: Range<usize>, f: impl FnOnce(&[f32])) {
        let (rows, count) = (outputs.len(), channels.len());
        scratch(POINTS * count * OUTPUTS, |transformed| {
            scratch(9 * count * OUTPUTS, |kernels| {
                // [channels, 9, OUTPUTS]; columns beyond the last output stay whatever they are.
                if self.transposed {
                    for (channel, to) in channels.clone().zip(kernels.chunks_exact_mut(9 * OUTPUTS)) {
                        let first = channel * self.outputs + outputs.start;
                        self.weight.with(9 * first..9 * (first + rows), |kernels| {
                            for (column, kernel) in kernels.as_chunks::<9>().0.iter().enumerate() {
                                for (tap, &value) in kernel.iter().rev().enumerate() {
                                    to[tap * OUTPUTS + column] = value;
                                }
                            }
                        });
                    }
                } else {
                    for (column, output) in outputs.clone().enumerate() {
                        let first = output * self.channels + channels.start;
                        self.weight.with(9 * first..9 * (first + count), |from| {
                            let kernels = kernels.chunks_exact_mut(9 * OUTPUTS);
                            for (kernel, to) in from.as_chunks::<9>().0.iter().zip(kernels) {
                                for (tap, &value) in kernel.iter().enumerate() {
                                    to[tap * OUTPUTS + column] = value;
                                }
                            }
                        });
                    }
                }
                transform_kernels(kernels, rows, transformed);
            });
            f(transformed);
        });
    }

    /// Transforms one panel's sums back and writes the pixels of one output channel.
    fn write_tiles(
        &self,
        strip: &Strip,
        panel: usize,
        output: usize,
        sums: &[&[f32; PAD]; POINTS],
        bias: f32,
        y: Shared,
    ) {
        let ((across, down), (height, width)) = (self.tiles(), (self.out_height(), self.out_width()));
        // [4, tile, 4]: the tiles of a row lie side by side.
        let mut pixels = [0.0; OUT * OUT * PAD];
        transform_output(sums, bias, &mut pixels);
        let tiles = strip.rows.len() * across;
        let mut lane = 0;
        while lane < PAD && panel * PAD + lane < tiles {
            let tile = panel * PAD + lane;
            let (row, column) = (strip.rows.start + tile / across, tile % across);
            let run = (across - column).min(PAD - lane);
            let (sample, first) = (row / down, row % down * OUT);
            for i in 0..OUT.min(height - first) {
                let from = &pixels[(i * PAD + lane) * OUT..][..run * OUT];
                let len = from.len().min(width - column * OUT);
                let at = ((sample * self.outputs + output) * height + first + i) * width + column * OUT;
                // SAFETY: each task has its own tiles of its own output channels.
                #[allow(unsafe_code)]
                unsafe { y.slice(at..at + len) }.copy_from_slice(&from[..len]);
            }
            lane += run;
        }
    }
}

dispatch!(fn transform_input(image: &[f32], padded: usize, offsets: &[usize; PAD], values: &mut [[f32; PAD]; POINTS])
    = transform_input_body);
dispatch!(fn transform_kernels(kernels: &[f32], rows: usize, transformed: &mut [f32]) = transform_kernels_body);
dispatch!(fn transform_output(sums: &[&[f32; PAD]; POINTS], bias: f32, pixels: &mut [f32; OUT * OUT * PAD])
    = transform_output_body);

/// One value of each of several tiles or kernels.
type Lanes<const N: usize> = [f32; N];

/// f(x[lane]) of each lane. Loops, here and below: what closures of the standard library call is not always compiled
/// for the instruction set around it.
#[inline(always)]
fn map1<const N: usize>(x: &Lanes<N>, f: impl Fn(f32) -> f32) -> Lanes<N> {
    let mut y = [0.0; N];
    for lane in 0..N {
        y[lane] = f(x[lane]);
    }
    y
}

/// f(a[lane], b[lane]) of each lane.
#[inline(always)]
fn map2<const N: usize>(a: &Lanes<N>, b: &Lanes<N>, f: impl Fn(f32, f32) -> f32) -> Lanes<N> {
    let mut y = [0.0; N];
    for lane in 0..N {
        y[lane] = f(a[lane], b[lane]);
    }
    y
}

/// f(a[lane], b[lane], c[lane]) of each lane.
#[inline(always)]
fn map3<const N: usize>(a: &Lanes<N>, b: &Lanes<N>, c: &Lanes<N>, f: impl Fn(f32, f32, f32) -> f32) -> Lanes<N> {
    let mut y = [0.0; N];
    for lane in 0..N {
        y[lane] = f(a[lane], b[lane], c[lane]);
    }
    y
}

/// B^T d: rows of
/// 1 0 -5/2 0 1 0 | 0 -sqrt 2 -2 sqrt 1/2 1 0 | 0 sqrt 2 -2 -sqrt 1/2 1 0 | 0 -sqrt 1/2 -1/2 sqrt 2 1 0 |
/// 0 sqrt 1/2 -1/2 -sqrt 2 1 0 | 0 1 0 -5/2 0 1.
#[inline(always)]
fn input_points<const FMA: bool>(d: [&Lanes<PAD>; IN]) -> [Lanes<PAD>; IN] {
    let [d0, d1, d2, d3, d4, d5] = d;
    let even_p = map2(d4, d2, |d4, d2| fma::<FMA>(-2.0, d2, d4));
    let odd_p = map2(d3, d1, |d3, d1| P * fma::<FMA>(-2.0, d1, d3));
    let even_q = map2(d4, d2, |d4, d2| fma::<FMA>(-0.5, d2, d4));
    let odd_q = map2(d3, d1, |d3, d1| Q * fma::<FMA>(-0.5, d1, d3));
    [
        map3(d0, d2, d4, |d0, d2, d4| fma::<FMA>(-2.5, d2, d0 + d4)),
        map2(&even_p, &odd_p, |even, odd| even + odd),
        map2(&even_p, &odd_p, |even, odd| even - odd),
        map2(&even_q, &odd_q, |even, odd| even + odd),
        map2(&even_q, &odd_q, |even, odd| even - odd),
        map3(d1, d3, d5, |d1, d3, d5| fma::<FMA>(-2.5, d3, d1 + d5)),
    ]
}

#[inline(always)]
fn transform_input_body<const FMA: bool>(
    image: &[f32],
    padded: usize,
    offsets: &[usize; PAD],
    values: &mut [[f32; PAD]; POINTS],
) {
    let mut half = [[[0.0; PAD]; IN]; IN];
    for column in 0..IN {
        let mut d = [[0.0; PAD]; IN];
        for (row, d) in d.iter_mut().enumerate() {
            let image = &image[row * padded + column..];
            for lane in 0..PAD {
                d[lane] = image[offsets[lane]];
            }
        }
        let points = input_points::<FMA>([&d[0], &d[1], &d[2], &d[3], &d[4], &d[5]]);
        for row in 0..IN {
            half[row][column] = points[row];
        }
    }
    for (half, values) in half.iter().zip(values.as_chunks_mut::<IN>().0) {
        *values = input_points::<FMA>([&half[0], &half[1], &half[2], &half[3], &half[4], &half[5]]);
    }
}

/// Kernels that are transformed side by side.
const KERNELS: usize = 8;

/// G g: 1, x, x^2 for each point x over the product of its differences from the others, which is p^2 q^2 = 1 for 0,
/// 2 p^2 (p^2 - q^2) = -3/2 for +-p and 2 q^2 (q^2 - p^2) = 6 for +-q; and 0 0 1 for infinity.
#[inline(always)]
fn kernel_points<const FMA: bool>(g: [&Lanes<KERNELS>; 3]) -> [Lanes<KERNELS>; IN] {
    const NP: f32 = -2.0 / 3.0;
    const NQ: f32 = 1.0 / 6.0;
    let [g0, g1, g2] = g;
    let even_p = map2(g0, g2, |g0, g2| NP * fma::<FMA>(0.5, g2, g0));
    let even_q = map2(g0, g2, |g0, g2| NQ * fma::<FMA>(2.0, g2, g0));
    let (odd_p, odd_q) = (map1(g1, |g1| NP * P * g1), map1(g1, |g1| NQ * Q * g1));
    [
        *g0,
        map2(&even_p, &odd_p, |even, odd| even + odd),
        map2(&even_p, &odd_p, |even, odd| even - odd),
        map2(&even_q, &odd_q, |even, odd| even + odd),
        map2(&even_q, &odd_q, |even, odd| even - odd),
        *g2,
    ]
}

/// `kernels` [channels, 9, [`OUTPUTS`]], of which the first `rows` columns matter -> [36, channels, [`OUTPUTS`]].
#[inline(always)]
fn transform_kernels_body<const FMA: bool>(kernels: &[f32], rows: usize, transformed: &mut [f32]) {
    let stride = transformed.len() / POINTS;
    for (channel, kernels) in kernels.chunks_exact(9 * OUTPUTS).enumerate() {
        for first in (0..rows).step_by(KERNELS) {
            let mut g = [[0.0; KERNELS]; 9];
            for (tap, g) in g.iter_mut().enumerate() {
                g.copy_from_slice(&kernels[tap * OUTPUTS + first..][..KERNELS]);
            }
            let mut columns = [[[0.0; KERNELS]; IN]; 3];
            for (column, points) in columns.iter_mut().enumerate() {
                *points = kernel_points::<FMA>([&g[column], &g[3 + column], &g[6 + column]]);
            }
            for row in 0..IN {
                let points = kernel_points::<FMA>([&columns[0][row], &columns[1][row], &columns[2][row]]);
                for (column, values) in points.iter().enumerate() {
                    let at = (row * IN + column) * stride + channel * OUTPUTS + first;
                    transformed[at..at + KERNELS].copy_from_slice(values);
                }
            }
        }
    }
}

/// A^T m: rows of 1 1 1 1 1 0 | 0 p -p q -q 0 | 0 p^2 p^2 q^2 q^2 0 | 0 p^3 -p^3 q^3 -q^3 1.
#[inline(always)]
fn output_points<const FMA: bool>(m: [&Lanes<PAD>; IN]) -> [Lanes<PAD>; OUT] {
    let [m0, m1, m2, m3, m4, m5] = m;
    let (sum_p, difference_p) = (map2(m1, m2, |a, b| a + b), map2(m1, m2, |a, b| P * (a - b)));
    let (sum_q, difference_q) = (map2(m3, m4, |a, b| a + b), map2(m3, m4, |a, b| Q * (a - b)));
    [
        map3(m0, &sum_p, &sum_q, |m0, p, q| m0 + p + q),
        map2(&difference_p, &difference_q, |p, q| p + q),
        map2(&sum_p, &sum_q, |p, q| fma::<FMA>(0.5, p, 2.0 * q)),
        map3(&difference_p, &difference_q, m5, |p, q, m5| fma::<FMA>(0.5, p, fma::<FMA>(2.0, q, m5))),
    ]
}

#[inline(always)]
fn transform_output_body<const FMA: bool>(
    sums: &[&[f32; PAD]; POINTS],
    bias: f32,
    pixels: &mut [f32; OUT * OUT * PAD],
) {
    let mut half = [[[0.0; PAD]; IN]; OUT];
    for column in 0..IN {
        let m = |row: usize| sums[row * IN + column];
        let points = output_points::<FMA>([m(0), m(1), m(2), m(3), m(4), m(5)]);
        for row in 0..OUT {
            half[row][column] = points[row];
        }
    }
    for (half, pixels) in half.iter().zip(pixels.as_chunks_mut::<{ OUT * PAD }>().0) {
        let columns = output_points::<FMA>([&half[0], &half[1], &half[2], &half[3], &half[4], &half[5]]);
        for lane in 0..PAD {
            for column in 0..OUT {
                pixels[lane * OUT + column] = columns[column][lane] + bias;
            }
        }
    }
}
