//! im2col and its adjoint for one channel of one image.

use std::ops::Range;

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

/// The adjoint over all positions: `image` = for each pixel the sum of the taps that read it, in a fixed order.
pub(super) fn fold(g: &Geometry, rows: &[f32], image: &mut [f32]) {
    image.fill(0.0);
    for tap_y in 0..g.kernel {
        for tap_x in 0..g.kernel {
            let inside_x = g.inside(tap_x, g.width, g.out_width);
            if inside_x.is_empty() {
                continue;
            }
            let row = &rows[(tap_y * g.kernel + tap_x) * g.positions()..][..g.positions()];
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
