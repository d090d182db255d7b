//! The merge kernel in AVX2 and AVX-512. Both compute what `kernel::merge_columns` says, to the bit.

#![allow(unsafe_code)]
// Rows and vectors index several arrays at once.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;

use candle_core::DType;
use half::{bf16, f16};

use super::element::Element;
use super::kernel::{Tile, merge_columns, merge_tile_portable};

/// Loads and stores of one weight type, widened to and rounded from f32.
///
/// # Safety
/// The addresses must be valid for as many elements as the vectors (or the mask) have, the processor must have their
/// instruction set, and streaming stores need an address aligned to what they write and [`finish_streaming`] in the
/// end. What AVX2 stores as bf16 is wrong for NaN and must be stored again.
pub(super) trait Lanes: Element {
    unsafe fn load8(from: *const u8) -> __m256;
    unsafe fn store8(to: *mut Self, value: __m256);
    unsafe fn stream8x2(to: *mut Self, values: [__m256; 2]);
    unsafe fn load16(from: *const u8, mask: __mmask16) -> __m512;
    unsafe fn store16(to: *mut Self, mask: __mmask16, value: __m512);
    unsafe fn stream16(to: *mut Self, value: __m512);
}

// SAFETY of all three: the caller keeps what `Lanes` asks for; nothing here needs more.
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
    unsafe fn stream8x2(to: *mut Self, [low, high]: [__m256; 2]) {
        unsafe {
            _mm256_stream_ps(to, low);
            _mm256_stream_ps(to.add(8), high);
        }
    }
    // SAFETY: the caller keeps what `Lanes` asks for.
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
    // SAFETY: the caller keeps what `Lanes` asks for.
    #[inline(always)]
    unsafe fn load8(from: *const u8) -> __m256 {
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
    }
    #[inline(always)]
    unsafe fn store8(to: *mut Self, value: __m256) {
        unsafe { _mm_storeu_si128(to.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(value)) }
    }
    #[inline(always)]
    unsafe fn stream8x2(to: *mut Self, values: [__m256; 2]) {
        unsafe {
            let [low, high] = values.map(|value| _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(value));
            _mm256_stream_si256(to.cast(), _mm256_set_m128i(high, low));
        }
    }
    // SAFETY: the caller keeps what `Lanes` asks for.
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
// SAFETY: the caller keeps what `Lanes` asks for.
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

/// The bf16 bits of 8 values, each in the low half of its lane, rounded to nearest even; NaN comes out wrong.
// SAFETY: the caller keeps what `Lanes` asks for.
#[inline(always)]
unsafe fn bf16_bits_of_8(value: __m256) -> __m256i {
    unsafe {
        let bits = _mm256_castps_si256(value);
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        let rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
        _mm256_srli_epi32::<16>(rounded)
    }
}

impl Lanes for bf16 {
    // SAFETY: the caller keeps what `Lanes` asks for.
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
            let bits = bf16_bits_of_8(value);
            let packed = _mm256_permute4x64_epi64::<0b1000>(_mm256_packus_epi32(bits, bits));
            _mm_storeu_si128(to.cast(), _mm256_castsi256_si128(packed));
        }
    }
    // SAFETY: the caller keeps what `Lanes` asks for.
    #[inline(always)]
    unsafe fn stream8x2(to: *mut Self, [low, high]: [__m256; 2]) {
        unsafe {
            let packed = _mm256_packus_epi32(bf16_bits_of_8(low), bf16_bits_of_8(high));
            _mm256_stream_si256(to.cast(), _mm256_permute4x64_epi64::<0b11_01_10_00>(packed));
        }
    }
    #[inline(always)]
    unsafe fn load16(from: *const u8, mask: __mmask16) -> __m512 {
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }
    // SAFETY: the caller keeps what `Lanes` asks for.
    #[inline(always)]
    unsafe fn store16(to: *mut Self, mask: __mmask16, value: __m512) {
        unsafe { _mm256_mask_storeu_epi16(to.cast(), mask, bf16_of_16(value)) }
    }
    #[inline(always)]
    unsafe fn stream16(to: *mut Self, value: __m512) {
        unsafe { _mm256_stream_si256(to.cast(), bf16_of_16(value)) }
    }
}

/// A tile's rows by their addresses: from and to may be the same.
struct Rows<'a, T, const R: usize> {
    from: [*const u8; R],
    to: [*mut T; R],
    next: [*const u8; R],
    a: &'a [&'a [f32]],
    w: &'a [f32],
}

impl<'a, T, const R: usize> Rows<'a, T, R> {
    fn of(tile: &mut Tile<'a, T, R>) -> Self {
        let to = tile.live.each_mut().map(|row| row.as_mut_ptr());
        let from = match &tile.pristine {
            Some(pristine) => pristine.map(<[u8]>::as_ptr),
            None => to.map(|row| row.cast_const().cast()),
        };
        Self { from, to, next: tile.next, a: tile.a, w: tile.w }
    }
}

/// The bytes of a cache line.
const LINE: usize = 64;

/// Whether rows of `tile` are written past the caches, and the columns before the first whole line if so. Streaming
/// saves reading what is overwritten anyway; rows must be whole lines, so that all are aligned alike.
fn streams<T: Element, const R: usize>(tile: &Tile<'_, T, R>) -> Option<usize> {
    let row_bytes = size_of_val(tile.live[0]);
    (tile.pristine.is_some() && row_bytes.is_multiple_of(LINE) && row_bytes >= 4 * LINE)
        .then(|| tile.live[0].as_ptr().align_offset(LINE))
}

/// Asks for `values` to be brought near.
pub(super) fn prefetch<T>(values: &[T]) {
    for at in (0..size_of_val(values)).step_by(LINE) {
        // SAFETY: every x86-64 processor has it, and it reads nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(values.as_ptr().cast::<i8>().wrapping_add(at)) };
    }
}

/// Makes what was streamed visible to other threads, before they are told of it.
pub(super) fn finish_streaming() {
    // SAFETY: every x86-64 processor has it.
    unsafe { _mm_sfence() };
}

/// A tile in AVX2.
///
/// # Safety
/// The processor must have AVX2, FMA and F16C, and all rows of the tile and of A the same number of columns.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn merge_tile_avx2<S: Lanes, T: Lanes, const R: usize>(mut tile: Tile<'_, T, R>) -> u32 {
    const WIDTH: usize = 16;
    let n = tile.live[0].len();
    if n < WIDTH {
        return merge_columns::<S, T, R>(&mut tile, 0..n);
    }
    let mut magnitude = _mm256_setzero_si256();
    let streamed_from = streams(&tile);
    let rows = Rows::of(&mut tile);
    let mut j = 0;
    // SAFETY of the four calls: 16 columns from where they start lie inside the rows; streamed ones start on a line.
    let head = streamed_from.unwrap_or(0);
    while j < head {
        let end = head.min(j + WIDTH);
        unsafe { part16::<S, T, R>(&rows, j, 0..end - j, &mut magnitude) };
        j = end;
    }
    if streamed_from.is_some() {
        while j + WIDTH <= n {
            unsafe { columns8x2::<S, T, R, true>(&rows, j, &mut magnitude) };
            j += WIDTH;
        }
    } else {
        while j + WIDTH <= n {
            // SAFETY: the caller keeps what this function asks for.
            unsafe { columns8x2::<S, T, R, false>(&rows, j, &mut magnitude) };
            j += WIDTH;
        }
    }
    // In place, what vectors have written must not be read again.
    let rest = if tile.pristine.is_some() { 0 } else { n - j };
    if j < n - rest {
        unsafe { part16::<S, T, R>(&rows, n - WIDTH, WIDTH - (n - j)..WIDTH, &mut magnitude) };
    }
    let mut lanes = [0u32; 8];
    // SAFETY: eight lanes.
    unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast(), magnitude) };
    let magnitude = lanes.into_iter().fold(merge_columns::<S, T, R>(&mut tile, n - rest..n), u32::max);
    if T::DTYPE == DType::BF16 && magnitude > f32::INFINITY.to_bits() {
        // There is a NaN among the sums.
        finish_streaming();
        merge_tile_portable::<S, T, R>(tile);
    }
    magnitude
}

/// The sums of 16 columns from column `j` on.
#[inline(always)]
unsafe fn sums16<S: Lanes, T: Lanes, const R: usize>(
    rows: &Rows<'_, T, R>,
    j: usize,
    magnitude: &mut __m256i,
) -> [[__m256; 2]; R] {
    unsafe {
        let mut sums = [[_mm256_setzero_ps(); 2]; R];
        for r in 0..R {
            _mm_prefetch::<_MM_HINT_T1>(rows.next[r].wrapping_add(j * S::BYTES).cast());
            for u in 0..2 {
                sums[r][u] = S::load8(rows.from[r].add((j + 8 * u) * S::BYTES));
            }
        }
        for (a, w) in rows.a.iter().zip(rows.w.chunks_exact(R)) {
            for u in 0..2 {
                let a = _mm256_loadu_ps(a.as_ptr().add(j + 8 * u));
                for r in 0..R {
                    sums[r][u] = _mm256_fmadd_ps(_mm256_set1_ps(w[r]), a, sums[r][u]);
                }
            }
        }
        let sign_off = _mm256_set1_epi32(0x7fff_ffff);
        for sum in sums.as_flattened() {
            let bits = _mm256_and_si256(_mm256_castps_si256(*sum), sign_off);
            *magnitude = _mm256_max_epu32(*magnitude, bits);
        }
        sums
    }
}

/// 16 columns from column `j` on.
// SAFETY: the caller keeps what `Lanes` asks for.
#[inline(always)]
unsafe fn columns8x2<S: Lanes, T: Lanes, const R: usize, const STREAM: bool>(
    rows: &Rows<'_, T, R>,
    j: usize,
    magnitude: &mut __m256i,
) {
    unsafe {
        let sums = sums16::<S, T, R>(rows, j, magnitude);
        for r in 0..R {
            let to = rows.to[r].add(j);
            if STREAM {
                T::stream8x2(to, sums[r]);
            } else {
                T::store8(to, sums[r][0]);
                T::store8(to.add(8), sums[r][1]);
            }
        }
    }
}

/// Those of the 16 columns from column `j` on that are in `part`.
// SAFETY: the caller keeps what `Lanes` asks for.
#[inline(always)]
unsafe fn part16<S: Lanes, T: Lanes, const R: usize>(
    rows: &Rows<'_, T, R>,
    j: usize,
    part: std::ops::Range<usize>,
    magnitude: &mut __m256i,
) {
    let start = part.start;
    unsafe {
        let sums = sums16::<S, T, R>(rows, j, magnitude);
        for r in 0..R {
            let mut row = [T::round(0.0); 16];
            T::store8(row.as_mut_ptr(), sums[r][0]);
            T::store8(row.as_mut_ptr().add(8), sums[r][1]);
            let part = &row[part.clone()];
            rows.to[r].add(j + start).copy_from_nonoverlapping(part.as_ptr(), part.len());
        }
    }
}

/// A tile in AVX-512.
///
/// # Safety
/// The processor must have AVX-512 F, BW and VL, and all rows of the tile and of A the same number of columns.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c,fma")]
pub(super) unsafe fn merge_tile_avx512<S: Lanes, T: Lanes, const R: usize>(mut tile: Tile<'_, T, R>) -> u32 {
    let n = tile.live[0].len();
    let mut magnitude = _mm512_setzero_si512();
    let part = |len: usize| (0xffff_u32 >> (16 - len.min(16))) as u16;
    let streamed_from = streams(&tile);
    let rows = Rows::of(&mut tile);
    let head = streamed_from.unwrap_or(0);
    let mut j = 0;
    // SAFETY of the four calls: the columns end at `head` or at n; streamed ones start after `head`, on a whole line.
    while j < head {
        unsafe { columns16::<S, T, R, 1, false>(&rows, j, part(head - j), &mut magnitude) };
        j = head.min(j + 16);
    }
    if streamed_from.is_some() {
        while j + 32 <= n {
            unsafe { columns16::<S, T, R, 2, true>(&rows, j, 0xffff, &mut magnitude) };
            j += 32;
        }
    } else {
        while j + 32 <= n {
            // SAFETY: the caller keeps what this function asks for.
            unsafe { columns16::<S, T, R, 2, false>(&rows, j, 0xffff, &mut magnitude) };
            j += 32;
        }
    }
    while j < n {
        unsafe { columns16::<S, T, R, 1, false>(&rows, j, part(n - j), &mut magnitude) };
        j = n.min(j + 16);
    }
    _mm512_reduce_max_epu32(magnitude)
}

/// U vectors of 16 columns from column `j` on, under `mask`.
// SAFETY: the caller keeps what `Lanes` asks for.
#[inline(always)]
unsafe fn columns16<S: Lanes, T: Lanes, const R: usize, const U: usize, const STREAM: bool>(
    rows: &Rows<'_, T, R>,
    j: usize,
    mask: __mmask16,
    magnitude: &mut __m512i,
) {
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); U]; R];
        for r in 0..R {
            for u in 0..U {
                if S::BYTES == 4 || u % 2 == 0 {
                    // One per line; the next rows are too short for the processor to see them coming.
                    let next = rows.next[r].wrapping_add((j + 16 * u) * S::BYTES).cast();
                    _mm_prefetch::<_MM_HINT_T1>(next)
                }
                sums[r][u] = S::load16(rows.from[r].add((j + 16 * u) * S::BYTES), mask);
            }
        }
        for (a, w) in rows.a.iter().zip(rows.w.chunks_exact(R)) {
            for u in 0..U {
                let a = _mm512_maskz_loadu_ps(mask, a.as_ptr().add(j + 16 * u));
                for r in 0..R {
                    sums[r][u] = _mm512_fmadd_ps(_mm512_set1_ps(w[r]), a, sums[r][u]);
                }
            }
        }
        // Two short loops, which the compiler unrolls; one long one would keep the sums in memory.
        let sign_off = _mm512_set1_epi32(0x7fff_ffff);
        for sum in sums.as_flattened() {
            let bits = _mm512_and_si512(_mm512_castps_si512(*sum), sign_off);
            *magnitude = _mm512_max_epu32(*magnitude, bits);
        }
        for r in 0..R {
            for u in 0..U {
                let to = rows.to[r].add(j + 16 * u);
                if STREAM {
                    T::stream16(to, sums[r][u]);
                } else {
                    T::store16(to, mask, sums[r][u]);
                }
            }
        }
    }
}
