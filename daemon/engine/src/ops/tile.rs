//! The product that everything heavy is made of: C = A B, or C += A B, where A is read value by value and B and C by
//! vectors, so that A may have any strides and B and C need padded columns only.

#![allow(unsafe_code)]

use super::simd::{Level, level};
use super::vector::{Portable, Vector};

/// Columns of B and C come in multiples of this many values, whatever the instruction set.
pub(super) const PAD: usize = 16;

/// `columns` rounded up to a multiple of [`PAD`].
pub(super) fn padded(columns: usize) -> usize {
    columns.next_multiple_of(PAD)
}

/// A: the value (r, k) at r * row + k * step.
#[derive(Clone, Copy)]
pub(super) struct Left<'a> {
    pub data: &'a [f32],
    pub row: usize,
    pub step: usize,
}

/// B: the value (k, j) at k * step + j.
#[derive(Clone, Copy)]
pub(super) struct Right<'a> {
    pub data: &'a [f32],
    pub step: usize,
}

/// C: the value (r, j) at r * row + j.
pub(super) struct Output<'a> {
    pub data: &'a mut [f32],
    pub row: usize,
}

/// C [rows, columns] = A [rows, depth] B [depth, columns], added to what is there if `keep`. `columns` must be a
/// multiple of [`PAD`]. Each element is one chain of multiply-adds in the order of k.
pub(super) fn product(to: Output, keep: bool, a: Left, b: Right, (rows, columns, depth): (usize, usize, usize)) {
    if rows == 0 || columns == 0 {
        return;
    }
    assert!(columns.is_multiple_of(PAD));
    assert!((rows - 1) * to.row + columns <= to.data.len());
    if depth > 0 {
        assert!((rows - 1) * a.row + (depth - 1) * a.step < a.data.len());
        assert!((depth - 1) * b.step + columns <= b.data.len());
    }
    let size = Size { rows, columns, depth, a_row: a.row, a_step: a.step, b_step: b.step, c_row: to.row };
    let (a, b, c) = (a.data.as_ptr(), b.data.as_ptr(), to.data.as_mut_ptr());
    // SAFETY: the assertions bound every address that the kernel reads or writes, and `level` has said that this CPU
    // has the instruction set.
    unsafe {
        match level() {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => avx512(size, keep, a, b, c),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => avx2(size, keep, a, b, c),
            Level::Baseline => portable(size, keep, a, b, c),
        }
    }
}

#[derive(Clone, Copy)]
struct Size {
    rows: usize,
    columns: usize,
    depth: usize,
    a_row: usize,
    a_step: usize,
    b_step: usize,
    c_row: usize,
}

// SAFETY: of all three, that the addresses are valid for the size, and that the CPU has the instruction set.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx2,fma")]
unsafe fn avx512(size: Size, keep: bool, a: *const f32, b: *const f32, c: *mut f32) {
    unsafe { blocks::<std::arch::x86_64::__m512, 12>(size, keep, a, b, c) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2(size: Size, keep: bool, a: *const f32, b: *const f32, c: *mut f32) {
    unsafe { blocks::<std::arch::x86_64::__m256, 6>(size, keep, a, b, c) }
}

unsafe fn portable(size: Size, keep: bool, a: *const f32, b: *const f32, c: *mut f32) {
    unsafe { blocks::<Portable<8, { cfg!(target_arch = "aarch64") }>, 6>(size, keep, a, b, c) }
}

/// All tiles: two vectors of columns at a time, then R rows at a time, so that a panel of B stays in the first-level
/// cache. R rows of two vectors, two of B and one of A fill the registers: 6 with 16 of them, 12 with 32.
// SAFETY: as `product` says.
#[inline(always)]
unsafe fn blocks<V: Vector, const R: usize>(size: Size, keep: bool, a: *const f32, b: *const f32, c: *mut f32) {
    unsafe {
        let mut column = 0;
        while column + 2 * V::LEN <= size.columns {
            panel::<V, R, 2>(size, keep, a, b.add(column), c.add(column));
            column += 2 * V::LEN;
        }
        if column < size.columns {
            panel::<V, R, 1>(size, keep, a, b.add(column), c.add(column));
        }
    }
}

// SAFETY: as `product` says.
#[inline(always)]
unsafe fn panel<V: Vector, const R: usize, const W: usize>(
    size: Size,
    keep: bool,
    a: *const f32,
    b: *const f32,
    c: *mut f32,
) {
    unsafe {
        let mut row = 0;
        while row + R <= size.rows {
            let (a, c) = (a.add(row * size.a_row), c.add(row * size.c_row));
            match row {
                0 => tile::<V, R, W, true>(size, keep, a, b, c),
                _ => tile::<V, R, W, false>(size, keep, a, b, c),
            }
            row += R;
        }
        let (a, c) = (a.add(row * size.a_row), c.add(row * size.c_row));
        match size.rows - row {
            0 => {}
            1 => tile::<V, 1, W, false>(size, keep, a, b, c),
            2 => tile::<V, 2, W, false>(size, keep, a, b, c),
            3 => tile::<V, 3, W, false>(size, keep, a, b, c),
            4 => tile::<V, 4, W, false>(size, keep, a, b, c),
            5 => tile::<V, 5, W, false>(size, keep, a, b, c),
            6 => tile::<V, 6, W, false>(size, keep, a, b, c),
            rest => {
                tile::<V, 6, W, false>(size, keep, a, b, c);
                let (a, c) = (a.add(6 * size.a_row), c.add(6 * size.c_row));
                match rest - 6 {
                    1 => tile::<V, 1, W, false>(size, keep, a, b, c),
                    2 => tile::<V, 2, W, false>(size, keep, a, b, c),
                    3 => tile::<V, 3, W, false>(size, keep, a, b, c),
                    4 => tile::<V, 4, W, false>(size, keep, a, b, c),
                    _ => tile::<V, 5, W, false>(size, keep, a, b, c),
                }
            }
        }
    }
}

/// How far ahead of B the kernel asks for memory: a page.
const AHEAD: usize = 1024;

/// R rows of W vectors, summed in registers. With FETCH it asks for what follows B in memory.
// SAFETY: as `product` says.
#[inline(always)]
unsafe fn tile<V: Vector, const R: usize, const W: usize, const FETCH: bool>(
    size: Size,
    keep: bool,
    mut a: *const f32,
    mut b: *const f32,
    c: *mut f32,
) {
    unsafe {
        let mut sums = [[V::splat(0.0); W]; R];
        for _ in 0..size.depth {
            if FETCH {
                V::prefetch(b.wrapping_add(AHEAD));
            }
            let mut vectors = [V::splat(0.0); W];
            for (w, vector) in vectors.iter_mut().enumerate() {
                *vector = V::load(b.add(w * V::LEN));
            }
            for (r, sums) in sums.iter_mut().enumerate() {
                let value = V::splat(*a.add(r * size.a_row));
                for (sum, vector) in sums.iter_mut().zip(vectors) {
                    *sum = value.mul_add(vector, *sum);
                }
            }
            a = a.wrapping_add(size.a_step);
            b = b.wrapping_add(size.b_step);
        }
        for (r, sums) in sums.into_iter().enumerate() {
            for (w, sum) in sums.into_iter().enumerate() {
                let to = c.add(r * size.c_row + w * V::LEN);
                let sum = if keep { sum.add(V::load(to)) } else { sum };
                sum.store(to);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Kernel = unsafe fn(Size, bool, *const f32, *const f32, *mut f32);

    // SAFETY: as `product` says; the geometry of AVX-512 in plain Rust.
    unsafe fn wide(size: Size, keep: bool, a: *const f32, b: *const f32, c: *mut f32) {
        unsafe { blocks::<Portable<16, false>, 12>(size, keep, a, b, c) }
    }

    fn kernels() -> Vec<(&'static str, Kernel)> {
        let mut all: Vec<(&'static str, Kernel)> = vec![("portable", portable), ("wide", wide)];
        #[cfg(target_arch = "x86_64")]
        match level() {
            Level::Avx512 => all.extend([("avx2", avx2 as Kernel), ("avx512", avx512)]),
            Level::Avx2 => all.push(("avx2", avx2)),
            Level::Baseline => {}
        }
        all
    }

    #[test]
    fn every_kernel_is_a_matrix_product() {
        let value = |i: usize, seed: usize| ((i * 7919 + seed * 104_729) % 2003) as f32 / 1001.0 - 1.0;
        for rows in 1..27 {
            for columns in [16, 32, 48, 80] {
                for depth in [0, 1, 2, 37] {
                    for (a_row, a_step) in [(1, rows + 3), (depth + 2, 1)] {
                        let (b_step, c_row) = (columns + 5, columns + 1);
                        let a: Vec<f32> = (0..rows * a_row + depth * a_step).map(|i| value(i, 1)).collect();
                        let b: Vec<f32> = (0..(depth + 1) * b_step).map(|i| value(i, 2)).collect();
                        let before: Vec<f32> = (0..rows * c_row).map(|i| value(i, 3)).collect();
                        let size = Size { rows, columns, depth, a_row, a_step, b_step, c_row };
                        for keep in [false, true] {
                            for (name, kernel) in kernels() {
                                let mut c = before.clone();
                                // SAFETY: the buffers above are of this size; `kernels` lists what this CPU has.
                                unsafe { kernel(size, keep, a.as_ptr(), b.as_ptr(), c.as_mut_ptr()) };
                                for (i, (&got, &old)) in c.iter().zip(&before).enumerate() {
                                    let (r, j) = (i / c_row, i % c_row);
                                    let sum = |k| f64::from(a[r * a_row + k * a_step]) * f64::from(b[k * b_step + j]);
                                    let want = match (j < columns, keep) {
                                        (false, _) => f64::from(old),
                                        (true, false) => (0..depth).map(sum).sum(),
                                        (true, true) => f64::from(old) + (0..depth).map(sum).sum::<f64>(),
                                    };
                                    let error = (f64::from(got) - want).abs();
                                    assert!(error < 1e-5, "{name} {rows}x{columns}x{depth} at {r},{j}: {got} {want}");
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}
