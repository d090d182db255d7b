//! The merge kernel in AVX2 and AVX-512. Both compute what `kernel::merge_columns` says, to the bit.

#![allow(unsafe_code)]

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::kernel::{Element, Tile, merge_columns};

/// Loads and stores of one weight type, widened to and rounded from f32.
///
/// # Safety
/// The addresses must be valid for as many elements as the vector (or the mask) has, the processor must have the
/// instruction set in the function's name, and streaming stores need an address aligned to the vector that they write.
pub(super) trait Lanes: Element {
    unsafe fn load8(from: *const u8) -> __m256;
    unsafe fn store8(to: *mut Self, value: __m256);
    unsafe fn load16(from: *const u8, mask: __mmask16) -> __m512;
    unsafe fn store16(to: *mut Self, mask: __mmask16, value: __m512);
    unsafe fn stream16(to: *mut Self, value: __m512);
}

// SAFETY of all three: the caller's promise above; nothing here needs more.
impl Lanes for f32 {
    #[inline(always)]
    unsafe fn load8(from: *const u8) -> __m256 {
        unsafe { _mm256_loadu_ps(from.cast()) }
    }
    #[inline(always)]
    unsafe fn store8(to: *mut Self, value: __m256) {
        unsafe { _mm256_storeu_ps(to, value) }
    }
    #[inline(always)]
    unsafe fn load16(from: *const u8, mask: __mmask16) -> __m512 {
        unsafe { _mm512_maskz_loadu_ps(mask, from.cast()) }
    }
    #[inline(always)]
    unsafe fn store16(to: *mut Self, mask: __mmask16, value: __m512) {
        unsafe { _mm512_mask_storeu_ps(to, mask, value) }
    }
    #[inline(always)]
    unsafe fn stream16(to: *mut Self, value: __m512) {
        unsafe { _mm512_stream_ps(to, value) }
    }
}

impl Lanes for f16 {
    #[inline(always)]
    unsafe fn load8(from: *const u8) -> __m256 {
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
    }
    #[inline(always)]
    unsafe fn store8(to: *mut Self, value: __m256) {
        unsafe { _mm_storeu_si128(to.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(value)) }
    }
    #[inline(always)]
    unsafe fn load16(from: *const u8, mask: __mmask16) -> __m512 {
        unsafe { _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, from.cast())) }
    }
    #[inline(always)]
    unsafe fn store16(to: *mut Self, mask: __mmask16, value: __m512) {
        unsafe { _mm256_mask_storeu_epi16(to.cast(), mask, _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(value)) }
    }
    #[inline(always)]
    unsafe fn stream16(to: *mut Self, value: __m512) {
        unsafe { _mm256_stream_si256(to.cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(value)) }
    }
}

/// The bf16 bits of 16 values, rounded to nearest even; a NaN stays one. AVX512_BF16's own conversion takes
/// denormals for zero, so it cannot be used.
#[inline(always)]
unsafe fn bf16_of_16(value: __m512) -> __m256i {
    unsafe {
        let bits = _mm512_castps_si512(value);
        let high = _mm512_srli_epi32::<16>(bits);
        let odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
        let rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
        let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(value, value);
        let rounded = _mm512_srli_epi32::<16>(rounded);
        let result = _mm512_mask_or_epi32(rounded, nan, high, _mm512_set1_epi32(0x40));
        _mm512_cvtepi32_epi16(result)
    }
}

impl Lanes for bf16 {
    #[inline(always)]
    unsafe fn load8(from: *const u8) -> __m256 {
        unsafe {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
        }
    }
    #[inline(always)]
    unsafe fn store8(to: *mut Self, value: __m256) {
        unsafe {
            let bits = _mm256_castps_si256(value);
            let high = _mm256_srli_epi32::<16>(bits);
            let odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
            let rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
            let quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
            let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(value, value));
            let result = _mm256_blendv_epi8(_mm256_srli_epi32::<16>(rounded), quiet, nan);
            let packed = _mm256_permute4x64_epi64::<0b1000>(_mm256_packus_epi32(result, result));
            _mm_storeu_si128(to.cast(), _mm256_castsi256_si128(packed));
        }
    }
    #[inline(always)]
    unsafe fn load16(from: *const u8, mask: __mmask16) -> __m512 {
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }
    #[inline(always)]
    unsafe fn store16(to: *mut Self, mask: __mmask16, value: __m512) {
        unsafe { _mm256_mask_storeu_epi16(to.cast(), mask, bf16_of_16(value)) }
    }
    #[inline(always)]
    unsafe fn stream16(to: *mut Self, value: __m512) {
        unsafe { _mm256_stream_si256(to.cast(), bf16_of_16(value)) }
    }
}

/// A tile in AVX2.
///
/// # Safety
/// The processor must have AVX2, FMA and F16C, and all rows of the tile and of A the same number of columns.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn merge_tile_avx2<S: Lanes, T: Lanes, const R: usize>(mut tile: Tile<'_, T, R>) -> u32 {
    const WIDTH: usize = 16;
    let n = tile.live[0].len();
    let mut magnitude = _mm256_setzero_si256();
    let sign_off = _mm256_set1_epi32(0x7fff_ffff);
    let mut j = 0;
    while j + WIDTH <= n {
        let mut sums = [[_mm256_setzero_ps(); 2]; R];
        for r in 0..R {
            for u in 0..2 {
                // SAFETY: j + 16 <= n.
                sums[r][u] = unsafe { S::load8(tile.pristine[r].as_ptr().add((j + 8 * u) * S::BYTES)) };
            }
        }
        for (a, w) in tile.a.iter().zip(tile.w.chunks_exact(R)) {
            for u in 0..2 {
                // SAFETY: A has n columns as well.
                let a = unsafe { _mm256_loadu_ps(a.as_ptr().add(j + 8 * u)) };
                for r in 0..R {
                    sums[r][u] = _mm256_fmadd_ps(_mm256_set1_ps(w[r]), a, sums[r][u]);
                }
            }
        }
        for r in 0..R {
            for u in 0..2 {
                let bits = _mm256_castps_si256(sums[r][u]);
                magnitude = _mm256_max_epu32(magnitude, _mm256_and_si256(bits, sign_off));
                // SAFETY: j + 16 <= n.
                unsafe { T::store8(tile.live[r].as_mut_ptr().add(j + 8 * u), sums[r][u]) };
            }
        }
        j += WIDTH;
    }
    let mut lanes = [0u32; 8];
    // SAFETY: eight lanes.
    unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast(), magnitude) };
    let rest = if j < n { merge_columns::<S, T, R>(&mut tile, j..n) } else { 0 };
    lanes.into_iter().fold(rest, u32::max)
}

/// A tile in AVX-512. Where rows are whole cache lines, they are written past the caches.
///
/// # Safety
/// The processor must have AVX-512 F, BW and VL, and all rows of the tile and of A the same number of columns.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c,fma")]
pub(super) unsafe fn merge_tile_avx512<S: Lanes, T: Lanes, const R: usize>(mut tile: Tile<'_, T, R>) -> u32 {
    const LINE: usize = 64;
    let n = tile.live[0].len();
    let mut magnitude = _mm512_setzero_si512();
    let part = |len: usize| (0xffff_u32 >> (16 - len.min(16))) as u16;
    // All rows are aligned alike only if their length is a multiple of the line's.
    let streams = (n * T::BYTES).is_multiple_of(LINE) && n * T::BYTES >= 4 * LINE;
    let head = if streams { tile.live[0].as_ptr().align_offset(LINE) } else { 0 };
    let mut j = 0;
    // SAFETY of the four calls: the columns end at `head` or at n; streamed ones start after `head`, on a whole line.
    while j < head {
        unsafe { columns16::<S, T, R, 1, false>(&mut tile, j, part(head - j), &mut magnitude) };
        j = head.min(j + 16);
    }
    if streams {
        while j + 32 <= n {
            unsafe { columns16::<S, T, R, 2, true>(&mut tile, j, 0xffff, &mut magnitude) };
            j += 32;
        }
        _mm_sfence();
    } else {
        while j + 32 <= n {
            unsafe { columns16::<S, T, R, 2, false>(&mut tile, j, 0xffff, &mut magnitude) };
            j += 32;
        }
    }
    while j < n {
        unsafe { columns16::<S, T, R, 1, false>(&mut tile, j, part(n - j), &mut magnitude) };
        j = n.min(j + 16);
    }
    _mm512_reduce_max_epu32(magnitude)
}

/// U vectors of 16 columns from column `j` on, under `mask`.
#[inline(always)]
unsafe fn columns16<S: Lanes, T: Lanes, const R: usize, const U: usize, const STREAM: bool>(
    tile: &mut Tile<'_, T, R>,
    j: usize,
    mask: __mmask16,
    magnitude: &mut __m512i,
) {
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); U]; R];
        for r in 0..R {
            for u in 0..U {
                sums[r][u] = S::load16(tile.pristine[r].as_ptr().add((j + 16 * u) * S::BYTES), mask);
            }
        }
        for (a, w) in tile.a.iter().zip(tile.w.chunks_exact(R)) {
            for u in 0..U {
                let a = _mm512_maskz_loadu_ps(mask, a.as_ptr().add(j + 16 * u));
                for r in 0..R {
                    sums[r][u] = _mm512_fmadd_ps(_mm512_set1_ps(w[r]), a, sums[r][u]);
                }
            }
        }
        let sign_off = _mm512_set1_epi32(0x7fff_ffff);
        for r in 0..R {
            for u in 0..U {
                let bits = _mm512_and_si512(_mm512_castps_si512(sums[r][u]), sign_off);
                *magnitude = _mm512_max_epu32(*magnitude, bits);
                let to = tile.live[r].as_mut_ptr().add(j + 16 * u);
                if STREAM {
                    T::stream16(to, sums[r][u]);
                } else {
                    T::store16(to, mask, sums[r][u]);
                }
            }
        }
    }
}
