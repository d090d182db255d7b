//! The kernel that writes rows: `W[p] = round(f32(W0[p]) + sum_k w_kp A_k)`, one pass, several rows at a time.
//!
//! W0 is read from the file's mapping and W written past the caches; where the live row is known to have the file's bits
//! it is changed in place, which asks for less of the memory and nothing of the disk.
//!
//! Every element is one chain of fused multiply-adds in the order of k, whatever the instruction set and the tile, so
//! that all of them give the same bits.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType, InplaceOp1, Layout};
use half::{bf16, f16};
use rayon::prelude::*;

use super::adapter::AdapterLayer;
use super::composition::{RowTerm, RowTerms};
use super::element::Element;
#[cfg(target_arch = "x86_64")]
use super::kernel_x86::{self, Lanes};

/// The instruction sets that the kernel is written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// Plain Rust.
    Portable,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// AVX-512 F, BW and VL.
    Avx512,
}

impl Isa {
    /// The best one of this machine.
    pub fn detect() -> Self {
        *Self::available().last().unwrap_or(&Self::Portable)
    }

    /// All that this machine has, the best one last.
    pub fn available() -> &'static [Self] {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c") {
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl");
            return if avx512 { &[Self::Portable, Self::Avx2, Self::Avx512] } else { &[Self::Portable, Self::Avx2] };
        }
        &[Self::Portable]
    }
}

/// R rows that take the same adapters.
pub(super) struct Tile<'a, T, const R: usize> {
    /// The pristine rows, as stored; none where the live rows have their bits and are changed in place.
    pub pristine: Option<[&'a [u8]; R]>,
    /// The live rows.
    pub live: [&'a mut [T]; R],
    /// Where the rows that will be read next lie, to be fetched ahead.
    pub next: [*const u8; R],
    /// The rows of all terms' A, in canonical order.
    pub a: &'a [&'a [f32]],
    /// c_ip * scale_i * B_i[p, k], [a.len(), R].
    pub w: &'a [f32],
}

/// Rewrites some rows of one layer in place.
pub(super) struct Rewrite<'a> {
    pub isa: Isa,
    /// The stored type of the pristine weight.
    pub stored: DType,
    /// The pristine weight [m, n], in the mapping.
    pub pristine: &'a [u8],
    /// n.
    pub columns: usize,
    /// The rows to rewrite, each at most once, with their terms.
    pub terms: &'a RowTerms,
    /// The rows of which the live weight may have other bits than the pristine one, which is of the same type; none
    /// where any row may.
    pub merged: Option<Vec<Range<u32>>>,
    /// Each adapter's factors and scale on this layer, by its index in the terms.
    pub factors: Vec<Option<(&'a AdapterLayer, f32)>>,
    /// One of the rows that did not stay finite; `u32::MAX` for none.
    pub not_finite: AtomicU32,
}

impl InplaceOp1 for Rewrite<'_> {
    fn name(&self) -> &'static str {
        "merge"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let Some((start, end)) = layout.contiguous_offsets() else {
            candle_core::bail!("merge needs a contiguous weight")
        };
        match storage {
            CpuStorage::F32(live) => self.run(&mut live[start..end]),
            CpuStorage::F16(live) => self.run(&mut live[start..end]),
            CpuStorage::BF16(live) => self.run(&mut live[start..end]),
            other => candle_core::bail!("merge writes f32, f16 and bf16 weights, not {:?}", other.dtype()),
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
pub(super) trait Lanes: Element {}
#[cfg(not(target_arch = "x86_64"))]
impl<T: Element> Lanes for T {}

/// About how many bytes of live rows one task writes.
const TASK_BYTES: usize = 128 << 10;
/// The most rows that share each load of A: as many as keep their sums in registers.
const TILE_ROWS: usize = 8;

/// How far [`prefetch`] goes.
const AHEAD_BYTES: usize = 16 << 10;

/// The live matrix, which tasks write disjoint rows of.
struct LiveRows<T>(*mut T);
#[allow(unsafe_code)]
// SAFETY: `Rewrite` gives each row to one task only.
unsafe impl<T: Send> Sync for LiveRows<T> {}

impl Rewrite<'_> {
    fn run<T: Lanes>(&self, live: &mut [T]) -> candle_core::Result<()> {
        match self.stored {
            DType::F32 => self.run_from::<f32, T>(live),
            DType::F16 => self.run_from::<f16, T>(live),
            DType::BF16 => self.run_from::<bf16, T>(live),
            other => candle_core::bail!("merge reads f32, f16 and bf16 weights, not {other:?}"),
        }
    }

    fn run_from<S: Lanes, T: Lanes>(&self, live: &mut [T]) -> candle_core::Result<()> {
        let n = self.columns;
        let m = live.len().checked_div(n).unwrap_or(0);
        if self.pristine.len() != live.len() * S::BYTES || self.terms.rows.iter().any(|&row| row as usize >= m) {
            candle_core::bail!("merge: {} pristine bytes for {} values", self.pristine.len(), live.len());
        }
        let rows = self.terms.rows.len();
        let rows_per_task = (TASK_BYTES / (n * T::BYTES)).next_multiple_of(TILE_ROWS).max(TILE_ROWS);
        let live = LiveRows(live.as_mut_ptr());
        let run = |task| {
            let (start, end) = (task * rows_per_task, rows.min((task + 1) * rows_per_task));
            self.run_task::<S, T>(&live, start..end)
        };
        match rows.div_ceil(rows_per_task) {
            1 => run(0),
            tasks => (0..tasks).into_par_iter().for_each(run),
        }
        Ok(())
    }

    /// Rewrites the `task`-th of the rows, run by run of rows that take the same adapters.
    fn run_task<S: Lanes, T: Lanes>(&self, live: &LiveRows<T>, task: Range<usize>) {
        let (mut a, mut w) = (Vec::new(), Vec::new());
        for term in task.clone().flat_map(|index| self.terms.of(index)) {
            if let Some((factors, _)) = self.factors[term.adapter as usize] {
                prefetch(&factors.b[term.local as usize * factors.rank..][..factors.rank]);
            }
        }
        let mut start = task.start;
        while start < task.end {
            let same = (start + 1..task.end).take_while(|&index| self.terms.alike(start, index)).count();
            let run = start..start + 1 + same;
            start = run.end;
            a.clear();
            for term in self.terms.of(run.start) {
                if let Some((factors, _)) = self.factors[term.adapter as usize] {
                    a.extend(factors.a.chunks_exact(self.columns));
                }
            }
            if a.is_empty() && S::DTYPE == T::DTYPE && cfg!(target_endian = "little") {
                self.restore(live, run);
            } else {
                let in_place = self.has_file_bits::<T>(&self.terms.rows[run.clone()]);
                self.merge_run::<S, T>(live, run, in_place, &a, &mut w);
            }
        }
        #[cfg(target_arch = "x86_64")]
        kernel_x86::finish_streaming();
    }

    /// Whether the live weight is known to have the file's bits in all of `rows`, which ascend, and may be read instead.
    fn has_file_bits<T: Element>(&self, rows: &[u32]) -> bool {
        let (Some(merged), Some(&first), Some(&last)) = (&self.merged, rows.first(), rows.last()) else { return false };
        // What AVX2 makes of a NaN in bf16 is computed a second time.
        let once = self.isa != Isa::Avx2 || T::DTYPE != DType::BF16;
        once && merged.iter().all(|span| span.end <= first || last < span.start)
    }

    /// Gives the `run`-th of the rows the file's bits; S and T are one type.
    fn restore<T: Lanes>(&self, live: &LiveRows<T>, run: Range<usize>) {
        let row_bytes = self.columns * T::BYTES;
        let mut start = run.start;
        while start < run.end {
            // Neighbouring rows in one piece.
            let first = self.terms.rows[start] as usize;
            let follows = |&index: &usize| self.terms.rows[index] as usize == first + index - start;
            let count = 1 + (start + 1..run.end).take_while(follows).count();
            let pristine = &self.pristine[first * row_bytes..(first + count) * row_bytes];
            // SAFETY: rows lie inside the matrix (checked in `run_from`), no other task has any of them, and every
            // bit pattern is a value.
            #[allow(unsafe_code)]
            unsafe {
                let to = live.0.add(first * self.columns).cast::<u8>();
                std::ptr::copy_nonoverlapping(pristine.as_ptr(), to, pristine.len());
            }
            start += count;
        }
    }

    fn merge_run<S: Lanes, T: Lanes>(
        &self,
        live: &LiveRows<T>,
        run: Range<usize>,
        in_place: bool,
        a: &[&[f32]],
        w: &mut Vec<f32>,
    ) {
        let mut index = run.start;
        while index < run.end {
            // AVX2 has half the registers.
            match run.end - index {
                8.. if self.isa == Isa::Avx512 => {
                    self.merge_rows::<S, T, 8>(live, index, in_place, a, w);
                    index += 8;
                }
                4.. => {
                    self.merge_rows::<S, T, 4>(live, index, in_place, a, w);
                    index += 4;
                }
                _ => {
                    self.merge_rows::<S, T, 1>(live, index, in_place, a, w);
                    index += 1;
                }
            }
        }
    }

    /// Merges the R rows from the `first`-th on, which all take the adapters whose A are the rows `a`.
    fn merge_rows<S: Lanes, T: Lanes, const R: usize>(
        &self,
        live: &LiveRows<T>,
        first: usize,
        in_place: bool,
        a: &[&[f32]],
        w: &mut Vec<f32>,
    ) {
        let n = self.columns;
        let row_at = |index: usize| self.terms.rows[index.min(self.terms.rows.len() - 1)] as usize;
        let pristine = |index| &self.pristine[row_at(index) * n * S::BYTES..][..n * S::BYTES];
        let rows: [usize; R] = std::array::from_fn(|r| row_at(first + r));
        w.resize(a.len() * R, 0.0);
        let terms: [&[RowTerm]; R] = std::array::from_fn(|r| self.terms.of(first + r));
        let mut left = &mut w[..a.len() * R];
        for (index, term) in terms[0].iter().enumerate() {
            let Some((factors, scale)) = self.factors[term.adapter as usize] else { continue };
            let (these, rest) = left.split_at_mut(factors.rank * R);
            left = rest;
            for (r, terms) in terms.iter().enumerate() {
                let term = &terms[index];
                let scaled = term.coefficient * scale;
                let b = &factors.b[term.local as usize * factors.rank..][..factors.rank];
                these.chunks_exact_mut(R).zip(b).for_each(|(w, &b)| w[r] = scaled * b);
            }
        }
        let tile = Tile {
            pristine: (!in_place).then(|| std::array::from_fn(|r| pristine(first + r))),
            // SAFETY: rows lie inside the matrix (checked in `run_from`), and no other tile has any of these rows.
            #[allow(unsafe_code)]
            live: rows.map(|row| unsafe { std::slice::from_raw_parts_mut(live.0.add(row * n), n) }),
            next: std::array::from_fn(|r| match in_place {
                true => live.0.wrapping_add(row_at(first + R + r) * n).cast_const().cast(),
                false => pristine(first + R + r).as_ptr(),
            }),
            a,
            w: &w[..a.len() * R],
        };
        let magnitude = merge_tile::<S, T, R>(self.isa, tile);
        if magnitude >= T::OVERFLOW && !a.is_empty() {
            // SAFETY: as above; the tile is gone.
            #[allow(unsafe_code)]
            let is_bad = |row: &&usize| {
                let row = unsafe { std::slice::from_raw_parts(live.0.add(**row * n), n) };
                row.iter().any(|x| !x.is_finite())
            };
            let bad = rows.iter().find(is_bad).unwrap_or(&rows[0]);
            self.not_finite.fetch_min(*bad as u32, Ordering::Relaxed);
        }
    }
}

/// Asks for the first tile's worth of `values` to be brought near, while there is other work to do.
pub(super) fn prefetch<T>(values: &[T]) {
    #[cfg(target_arch = "x86_64")]
    kernel_x86::prefetch(&values[..values.len().min(AHEAD_BYTES / size_of::<T>())]);
    #[cfg(not(target_arch = "x86_64"))]
    let _ = values;
}

/// Writes a tile; returns the largest magnitude in it before rounding, as bits.
fn merge_tile<S: Lanes, T: Lanes, const R: usize>(isa: Isa, tile: Tile<'_, T, R>) -> u32 {
    match isa {
        // SAFETY: an `Isa` beyond the portable one is only ever taken from `Isa::available`, which found its features;
        // all rows of a tile have n columns.
        #[cfg(target_arch = "x86_64")]
        #[allow(unsafe_code)]
        Isa::Avx2 => unsafe { kernel_x86::merge_tile_avx2::<S, T, R>(tile) },
        #[cfg(target_arch = "x86_64")]
        #[allow(unsafe_code)]
        // SAFETY: as above.
        Isa::Avx512 => unsafe { kernel_x86::merge_tile_avx512::<S, T, R>(tile) },
        _ => merge_tile_portable::<S, T, R>(tile),
    }
}

/// The kernel in plain Rust, by blocks of columns that stay in registers or the first-level cache.
pub(super) fn merge_tile_portable<S: Element, T: Element, const R: usize>(mut tile: Tile<'_, T, R>) -> u32 {
    const BLOCK: usize = 64;
    let mut magnitude = 0;
    let n = tile.live[0].len();
    for start in (0..n).step_by(BLOCK) {
        let end = n.min(start + BLOCK);
        magnitude = magnitude.max(merge_columns::<S, T, R>(&mut tile, start..end));
    }
    magnitude
}

/// Columns `columns` (at most 64) of a tile; the definition of what every other kernel computes.
#[inline(always)]
pub(super) fn merge_columns<S: Element, T: Element, const R: usize>(
    tile: &mut Tile<'_, T, R>,
    columns: Range<usize>,
) -> u32 {
    let (start, len) = (columns.start, columns.len());
    let mut magnitude = 0;
    for r in 0..R {
        let mut sums = [0.0f32; 64];
        let live = &mut tile.live[r][start..start + len];
        match &tile.pristine {
            Some(pristine) => {
                let pristine = pristine[r][start * S::BYTES..][..len * S::BYTES].chunks_exact(S::BYTES);
                sums.iter_mut().zip(pristine).for_each(|(sum, bytes)| *sum = S::read(bytes));
            }
            None => sums.iter_mut().zip(&*live).for_each(|(sum, live)| *sum = live.widen()),
        }
        for (k, a) in tile.a.iter().enumerate() {
            let w = tile.w[k * R + r];
            for (sum, &a) in sums.iter_mut().zip(&a[start..start + len]) {
                *sum = w.mul_add(a, *sum);
            }
        }
        for (live, &sum) in live.iter_mut().zip(&sums) {
            magnitude = magnitude.max(sum.to_bits() & 0x7fff_ffff);
            *live = T::round(sum);
        }
    }
    magnitude
}

#[cfg(test)]
mod tests {
    use super::*;

    /// R rows merged from the f32 values `pristine`, or in place from what `live` has.
    fn merged<T: Lanes, const R: usize>(isa: Isa, pristine: Option<&[u8]>, a: &[f32], w: f32, live: &mut [T]) -> u32 {
        let mut rows = live.chunks_exact_mut(a.len());
        let live = std::array::from_fn(|_| rows.next().unwrap_or_default());
        let next = [a.as_ptr().cast(); R];
        match pristine {
            Some(bytes) => {
                let tile = Tile { pristine: Some([bytes; R]), live, next, a: &[a], w: &[w; R] };
                merge_tile::<f32, T, R>(isa, tile)
            }
            None => merge_tile::<T, T, R>(isa, Tile { pristine: None, live, next, a: &[a], w: &[w; R] }),
        }
    }

    /// Values at every edge of rounding, NaN and infinity among them.
    #[test]
    fn every_kernel_rounds_alike() {
        let edges = [
            0x7fff_ffff,
            0xffff_ffff,
            0x7f80_0001,
            0x7f80_0000,
            0xff80_0000,
            0x7f7f_ffff,
            0x7f7f_8000,
            0x7f7f_7fff,
            0x0000_0001,
            0x8000_0000,
            0x0000_8000,
            0x3f80_8000,
            0x3f81_8000,
            0x3f80_8001,
            0x477f_f000,
            0x477f_efff,
        ];
        let values = |count: usize, edges: &[u32]| -> Vec<f32> {
            let others = (1..=count as u32).map(|i| 0x3f00_0000 + i * 0x9_3ab1);
            edges.iter().copied().chain(others).take(count).map(f32::from_bits).collect()
        };
        for count in [16, 70, 128] {
            for edges in [&edges[..], &edges[5..]] {
                let values = values(count, edges);
                for w in [0.0, 0.3] {
                    for &isa in Isa::available() {
                        same(isa, &values, w, |x: f32| x.to_bits());
                        same(isa, &values, w, |x: f16| u32::from(x.to_bits()));
                        same(isa, &values, w, |x: bf16| u32::from(x.to_bits()));
                    }
                }
            }
        }
    }

    /// Merges rows from f32 bytes with the row A.
    type Run<'a, T> = &'a dyn Fn(&[u8], &[f32], &mut [T]) -> u32;

    /// What the kernel of `isa` makes of `values`, several rows at a time and in place, too, is what plain Rust makes of
    /// one row of them.
    fn same<T: Lanes>(isa: Isa, values: &[f32], w: f32, bits: fn(T) -> u32) {
        let check = |bytes: &[f32], rows: usize, run: Run<'_, T>| {
            let a: Vec<f32> = bytes.iter().map(|x| if x.is_finite() { *x } else { 1.0 }).collect();
            let bytes: Vec<u8> = bytes.iter().flat_map(|x| x.to_le_bytes()).collect();
            let mut expected = vec![T::round(0.0); a.len()];
            let magnitude = merged::<T, 1>(Isa::Portable, Some(&bytes), &a, w, &mut expected);
            let mut live = values.repeat(rows).into_iter().map(T::round).collect::<Vec<T>>();
            assert_eq!(run(&bytes, &a, &mut live), magnitude, "{isa:?} {:?}", T::DTYPE);
            for row in live.chunks_exact(a.len()) {
                assert!(row.iter().zip(&expected).all(|(&x, &y)| bits(x) == bits(y)), "{isa:?} {:?}", T::DTYPE);
            }
        };
        check(values, 1, &|bytes, a, live| merged::<T, 1>(isa, Some(bytes), a, w, live));
        check(values, 4, &|bytes, a, live| merged::<T, 4>(isa, Some(bytes), a, w, live));
        if isa != Isa::Avx2 || T::DTYPE != DType::BF16 {
            let stored: Vec<f32> = values.iter().map(|&x| T::round(x).widen()).collect();
            check(&stored, 1, &|_, a, live| merged::<T, 1>(isa, None, a, w, live));
            check(&stored, 4, &|_, a, live| merged::<T, 4>(isa, None, a, w, live));
        }
    }
}
