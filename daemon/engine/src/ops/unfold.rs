//! im2col and its adjoint for one channel of one image.

use std::ops::Range;

use super::simd::dispatch;

/// Sizes of a convolution.
pub(super) struct Geometry {
    pub(super) height: usize,
    pub(super) width: usize,
    pub(super) kernel: usize,
    pub(super) stride: usize,
    pub(super) padding: usize,
    pub(super) out_height: usize,
    pub(super) out_width: usize,
}

impl Geometry {
    /// The padded image must be at least as large as the kernel.
    pub(super) fn new(height: usize, width: usize, kernel: usize, stride: usize, padding: usize) -> Self {
        let out = |size: usize| (size + 2 * padding - kernel) / stride + 1;
        Self { height, width, kernel, stride, padding, out_height: out(height), out_width: out(width) }
    }

    /// Output pixels.
    pub(super) fn positions(&self) -> usize {
        self.out_height * self.out_width
    }

    /// Kernel elements of one channel.
    pub(super) fn taps(&self) -> usize {
        self.kernel * self.kernel
    }

    /// Whether a tap is the image shifted by a constant, as positions and pixels are laid out alike.
    fn keeps_size(&self) -> bool {
        self.stride == 1 && self.out_width == self.width && self.out_height == self.height
    }

    /// For [`keeps_size`](Self::keeps_size): what a tap adds to a position, and the positions for which that lies in
    /// the image's memory. Those at the left or right edge may still belong to another row: see [`edge`](Self::edge).
    fn shift(&self, tap: (usize, usize)) -> (isize, Range<usize>) {
        let padding = self.padding as isize;
        let offset = (tap.0 as isize - padding) * self.width as isize + tap.1 as isize - padding;
        let pixels = self.height * self.width;
        let start = offset.min(0).unsigned_abs().min(pixels);
        (offset, start..pixels.saturating_sub(offset.max(0).unsigned_abs()).max(start))
    }

    /// The columns where tap `tap_x` leaves the row, of each row.
    fn edge(&self, tap_x: usize) -> Range<usize> {
        let inside = self.inside(tap_x, self.width, self.out_width);
        if inside.start > 0 { 0..inside.start } else { inside.end..self.width }
    }

    /// The output coordinates whose tap `tap` falls inside an image of `size`, of `out` coordinates.
    fn inside(&self, tap: usize, size: usize, out: usize) -> Range<usize> {
        let start = self.padding.saturating_sub(tap).div_ceil(self.stride);
        let end = (size + self.padding).saturating_sub(tap).div_ceil(self.stride).min(out);
        start.min(end)..end
    }
}

/// Writes tap t of the output positions `positions` to rows[t * row_stride..], zeros where the tap is outside.
pub(super) fn unfold(g: &Geometry, image: &[f32], positions: Range<usize>, rows: &mut [f32], row_stride: usize) {
    for tap_y in 0..g.kernel {
        let inside_y = g.inside(tap_y, g.height, g.out_height);
        for tap_x in 0..g.kernel {
            let inside_x = g.inside(tap_x, g.width, g.out_width);
            let row = &mut rows[(tap_y * g.kernel + tap_x) * row_stride..][..positions.len()];
            if g.keeps_size() {
                unfold_shifted(g, image, positions.clone(), (tap_y, tap_x), row);
                continue;
            }
            let mut position = positions.start;
            while position < positions.end {
                let (y, x) = (position / g.out_width, position % g.out_width);
                let len = (g.out_width - x).min(positions.end - position);
                let to = &mut row[position - positions.start..][..len];
                position += len;
                let (start, end) = (inside_x.start.clamp(x, x + len), inside_x.end.clamp(x, x + len));
                if !inside_y.contains(&y) || start >= end {
                    to.fill(0.0);
                    continue;
                }
                to[..start - x].fill(0.0);
                to[end - x..].fill(0.0);
                let to = &mut to[start - x..end - x];
                let from =
                    &image[(y * g.stride + tap_y - g.padding) * g.width + start * g.stride + tap_x - g.padding..];
                if g.stride == 1 {
                    to.copy_from_slice(&from[..end - start]);
                } else {
                    to.iter_mut().zip(from.iter().step_by(g.stride)).for_each(|(to, &from)| *to = from);
                }
            }
        }
    }
}

/// One tap of [`unfold`] where it is a shift of the image.
fn unfold_shifted(g: &Geometry, image: &[f32], positions: Range<usize>, tap: (usize, usize), row: &mut [f32]) {
    let (offset, inside) = g.shift(tap);
    let start = inside.start.clamp(positions.start, positions.end);
    let end = inside.end.clamp(start, positions.end);
    row[..start - positions.start].fill(0.0);
    row[end - positions.start..].fill(0.0);
    if start < end {
        let from = &image[start.saturating_add_signed(offset)..];
        row[start - positions.start..end - positions.start].copy_from_slice(&from[..end - start]);
    }
    let edge = g.edge(tap.1);
    if edge.is_empty() {
        return;
    }
    for y in positions.start / g.width..positions.end.div_ceil(g.width) {
        for position in y * g.width + edge.start..y * g.width + edge.end {
            if positions.contains(&position) {
                row[position - positions.start] = 0.0;
            }
        }
    }
}

/// One tap of [`fold`] where it is a shift of the image; zeroes what does not count in `row`.
fn fold_shifted(g: &Geometry, row: &mut [f32], tap: (usize, usize), image: &mut [f32]) {
    let edge = g.edge(tap.1);
    if !edge.is_empty() {
        row.chunks_exact_mut(g.width).for_each(|row| row[edge.clone()].fill(0.0));
    }
    let (offset, inside) = g.shift(tap);
    if !inside.is_empty() {
        let to = &mut image[inside.start.saturating_add_signed(offset)..];
        add(&row[inside], to);
    }
}

dispatch!(fn add(from: &[f32], to: &mut [f32]) = add_body);

#[inline(always)]
fn add_body<const FMA: bool>(from: &[f32], to: &mut [f32]) {
    to.iter_mut().zip(from).for_each(|(to, &from)| *to += from);
}

/// The adjoint over all positions: tap t lies in rows[t * row_stride..], which may be overwritten; `image` = for each pixel the sum of the taps that read it, in a fixed order.
pub(super) fn fold(g: &Geometry, rows: &mut [f32], row_stride: usize, image: &mut [f32]) {
    image.fill(0.0);
    for tap_y in 0..g.kernel {
        for tap_x in 0..g.kernel {
            let inside_x = g.inside(tap_x, g.width, g.out_width);
            if inside_x.is_empty() {
                continue;
            }
            let row = &mut rows[(tap_y * g.kernel + tap_x) * row_stride..][..g.positions()];
            if g.keeps_size() {
                fold_shifted(g, row, (tap_y, tap_x), image);
                continue;
            }
            for y in g.inside(tap_y, g.height, g.out_height) {
                let from = &row[y * g.out_width..][inside_x.clone()];
                let first =
                    (y * g.stride + tap_y - g.padding) * g.width + inside_x.start * g.stride + tap_x - g.padding;
                let to = &mut image[first..];
                if g.stride == 1 {
                    to.iter_mut().zip(from).for_each(|(to, &from)| *to += from);
                } else {
                    to.iter_mut().step_by(g.stride).zip(from).for_each(|(to, &from)| *to += from);
                }
            }
        }
    }
}
