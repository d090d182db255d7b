//! Turning rows into columns, for panels of [`PAD`] columns.

use super::tile::PAD;

/// Writes the `len` first columns of [`PAD`] rows, which begin `row` apart in `from`, as the rows of `to` [len, PAD].
pub(super) fn transpose(from: &[f32], row: usize, len: usize, to: &mut [f32]) {
    assert!(len <= row && (PAD - 1) * row + len <= from.len() && len * PAD <= to.len());
    let mut done = 0;
    #[cfg(target_arch = "x86_64")]
    if !matches!(super::simd::level(), super::simd::Level::Baseline) {
        done = len / x86::SIDE * x86::SIDE;
        // SAFETY: the assertion bounds every address, and this CPU has AVX2.
        #[allow(unsafe_code)]
        unsafe {
            x86::transpose(from.as_ptr(), row, done, to.as_mut_ptr());
        }
    }
    for (column, to) in to.as_chunks_mut::<PAD>().0.iter_mut().enumerate().take(len).skip(done) {
        to.iter_mut().zip(from[column..].iter().step_by(row)).for_each(|(to, from)| *to = *from);
    }
}

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod x86 {
    use std::arch::x86_64::*;

    use super::PAD;

    /// Rows and columns of a square in registers.
    pub(super) const SIDE: usize = 8;

    /// As [`super::transpose`], for a multiple of [`SIDE`] columns.
    ///
    /// # Safety
    /// The processor must have AVX2, and all addresses must be valid.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn transpose(from: *const f32, row: usize, len: usize, to: *mut f32) {
        for column in (0..len).step_by(SIDE) {
            for first in (0..PAD).step_by(SIDE) {
                // SAFETY: as the caller says.
                unsafe { square(from.add(first * row + column), row, to.add(column * PAD + first)) };
            }
        }
    }

    /// Eight rows of eight values, `row` apart, to eight rows [`PAD`] apart.
    // SAFETY: as `transpose` says.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn square(from: *const f32, row: usize, to: *mut f32) {
        unsafe {
            let a: [__m256; SIDE] = std::array::from_fn(|i| _mm256_loadu_ps(from.add(i * row)));
            // Pairs of rows, then fours, then halves.
            let pairs: [__m256; SIDE] = std::array::from_fn(|i| {
                let (one, other) = (a[i / 4 * 4 + i % 4 / 2 * 2], a[i / 4 * 4 + i % 4 / 2 * 2 + 1]);
                if i % 2 == 0 { _mm256_unpacklo_ps(one, other) } else { _mm256_unpackhi_ps(one, other) }
            });
            let fours: [__m256; SIDE] = std::array::from_fn(|i| {
                let (one, other) = (pairs[i / 4 * 4 + i % 4 / 2], pairs[i / 4 * 4 + i % 4 / 2 + 2]);
                if i % 2 == 0 {
                    _mm256_shuffle_ps::<0b01_00_01_00>(one, other)
                } else {
                    _mm256_shuffle_ps::<0b11_10_11_10>(one, other)
                }
            });
            for i in 0..SIDE / 2 {
                let (one, other) = (fours[i], fours[i + 4]);
                _mm256_storeu_ps(to.add(i * PAD), _mm256_permute2f128_ps::<0x20>(one, other));
                _mm256_storeu_ps(to.add((i + 4) * PAD), _mm256_permute2f128_ps::<0x31>(one, other));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_become_rows() {
        for (row, len) in [(1, 1), (8, 8), (23, 23), (40, 37), (9, 0)] {
            let from: Vec<f32> = (0..PAD * row).map(|i| i as f32).collect();
            let mut to = vec![-1.0; (len + 1) * PAD];
            transpose(&from, row, len, &mut to);
            for (i, &value) in to.iter().enumerate() {
                let (column, r) = (i / PAD, i % PAD);
                let want = if column < len { from[r * row + column] } else { -1.0 };
                assert_eq!(value, want, "row {row}, {len} columns, at {column}, {r}");
            }
        }
    }
}
