//! Products with a frozen matrix: x W^T and x W for many tokens. Rows of x are read value by value where they lie, W is
//! laid out by panels of [`PAD`] columns that stay in the first-level cache, some of it at a time.

use std::ops::Range;

use super::cpu::{Shared, Weight, parallel, scratch};
use super::simd::dispatch;
use super::tile::{Left, Output, PAD, Right, product};
use super::transpose::transpose;

/// W as the columns of the result see it.
#[derive(Clone, Copy)]
pub(super) struct Dense<'a> {
    pub weight: Weight<'a>,
    /// Rows and columns of W.
    pub rows: usize,
    pub columns: usize,
    /// x W^T, else x W.
    pub transposed: bool,
}

/// Tokens of a task: a multiple of the rows that the kernels keep in registers. Laying out W costs a few hundredths of
/// a product with so many.
const TOKENS: usize = 192;
/// Columns of a task.
const COLUMNS: usize = 5 * PAD;
/// Terms summed at a time: a panel then fills most of a first-level cache.
const DEPTH: usize = 384;
/// From so many tokens on, panels pay.
const TOKENS_MIN: usize = 12;

impl Dense<'_> {
    /// Columns of the result, and terms of each sum.
    fn size(&self) -> (usize, usize) {
        if self.transposed { (self.rows, self.columns) } else { (self.columns, self.rows) }
    }

    /// Whether [`Self::multiply`] does such a product, and well.
    pub(super) fn pays(&self, tokens: usize) -> bool {
        let (columns, depth) = self.size();
        tokens >= TOKENS_MIN && depth > 0 && columns > 0 && columns.is_multiple_of(PAD)
    }

    /// Writes `y` [tokens, columns] for `x` [tokens, depth], plus `bias` [columns]. [`Self::pays`] must hold.
    pub(super) fn multiply(&self, x: &[f32], bias: Option<&[f32]>, y: &mut [f32]) {
        let (columns, depth) = self.size();
        let tokens = x.len() / depth;
        let block = tokens.div_ceil(tokens.div_ceil(TOKENS)).next_multiple_of(6);
        let (blocks, strips) = (tokens.div_ceil(block), columns.div_ceil(COLUMNS));
        let y = Shared::new(y);
        parallel(blocks * strips, tokens * columns * depth, |task| {
            let (first, column) = (task / strips * block, task % strips * COLUMNS);
            let (count, width) = (block.min(tokens - first), COLUMNS.min(columns - column));
            scratch(width * (DEPTH.min(depth) + count), |buffer| {
                let (sums, panels) = buffer.split_at_mut(count * width);
                for start in (0..depth).step_by(DEPTH) {
                    let len = DEPTH.min(depth - start);
                    let panels = &mut panels[..width * len];
                    self.lay_out(start..start + len, column, panels);
                    for (panel, to) in panels.chunks_exact(PAD * len).zip((0..width).step_by(PAD)) {
                        product(
                            Output { data: &mut sums[to..], row: width },
                            start > 0,
                            Left { data: &x[first * depth + start..], row: depth, step: 1 },
                            Right { data: panel, step: PAD },
                            (count, PAD, len),
                        );
                    }
                }
                for (token, sums) in (first..).zip(sums.chunks_exact(width)) {
                    let at = token * columns + column;
                    // SAFETY: each task has its own columns of its own tokens.
                    #[allow(unsafe_code)]
                    let y = unsafe { y.slice(at..at + width) };
                    match bias {
                        Some(bias) => add(sums, &bias[column..column + width], y),
                        None => y.copy_from_slice(sums),
                    }
                }
            });
        });
    }

    /// Some terms of some columns of the result, from `column` on, as panels: [columns / PAD, terms, PAD].
    fn lay_out(&self, terms: Range<usize>, column: usize, panels: &mut [f32]) {
        let (row, len) = (self.columns, terms.len());
        if !self.transposed {
            let width = panels.len() / len;
            for (to, term) in terms.enumerate() {
                self.weight.with(term * row + column..term * row + column + width, |from| {
                    for (panel, from) in from.as_chunks::<PAD>().0.iter().enumerate() {
                        panels[(panel * len + to) * PAD..][..PAD].copy_from_slice(from);
                    }
                });
            }
            return;
        }
        for (panel, column) in panels.chunks_exact_mut(PAD * len).zip((column..).step_by(PAD)) {
            if let Weight::F32(weight) = self.weight {
                transpose(&weight[column * row + terms.start..], row, len, panel);
                continue;
            }
            scratch(PAD * len, |rows| {
                for (to, column) in rows.chunks_exact_mut(len).zip(column..) {
                    let at = column * row;
                    self.weight.with(at + terms.start..at + terms.end, |from| to.copy_from_slice(from));
                }
                transpose(rows, len, len, panel);
            });
        }
    }
}

dispatch!(fn add(a: &[f32], b: &[f32], to: &mut [f32]) = add_body);

#[inline(always)]
fn add_body<const FMA: bool>(a: &[f32], b: &[f32], to: &mut [f32]) {
    for (to, (a, b)) in to.iter_mut().zip(a.iter().zip(b)) {
        *to = a + b;
    }
}
