//! What every CPU kernel needs: views of tensors as f32 slices, scratch memory, matrix products and a split of work
//! over the threads of the current rayon pool.
//!
//! Invariant: no result depends on the number of threads. A task computes whole output elements, each summed in an
//! order that the shapes alone decide.

use std::cell::{Cell, RefCell};
use std::marker::PhantomData;
use std::ops::{Deref, Range};

use candle_core::{CpuStorage, DType, Device, Layout, Result, Storage, StorageRef, Tensor, bail};
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

/// Work below this many elementary steps, about a tenth of a millisecond, is not worth waking a second thread.
pub(crate) const PARALLEL_FROM: usize = 1 << 22;

/// Whether the kernels apply: f32 on the CPU.
pub(super) fn applies(x: &Tensor) -> bool {
    x.dtype() == DType::F32 && matches!(x.device(), Device::Cpu)
}

/// The values of a contiguous f32 tensor's storage; `op` names the caller in the error.
pub(super) fn values<'a>(storage: &'a CpuStorage, layout: &Layout, op: &str) -> Result<&'a [f32]> {
    let CpuStorage::F32(data) = storage else { bail!("{op}: expected f32, got {:?}", dtype_of(storage)) };
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&data[start..end]),
        None => bail!("{op}: the input is not contiguous"),
    }
}

fn dtype_of(storage: &CpuStorage) -> DType {
    use candle_core::backend::BackendStorage;
    storage.dtype()
}

/// A read lock on a contiguous f32 CPU tensor, seen as its values.
pub(super) struct Values<'a> {
    storage: StorageRef<'a>,
    range: Range<usize>,
}

impl<'a> Values<'a> {
    pub(super) fn of(tensor: &'a Tensor) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        let Some((start, end)) = layout.contiguous_offsets() else { bail!("a kernel got a strided tensor") };
        match &*storage {
            Storage::Cpu(CpuStorage::F32(_)) => Ok(Self { storage, range: start..end }),
            _ => bail!("a kernel got a {:?} tensor on {:?}, not f32 on the CPU", tensor.dtype(), tensor.device()),
        }
    }
}

impl Deref for Values<'_> {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        match &*self.storage {
            Storage::Cpu(CpuStorage::F32(data)) => &data[self.range.clone()],
            // `of` accepts nothing else.
            _ => &[],
        }
    }
}

/// A frozen weight, read in place or converted to f32 piece by piece.
#[derive(Clone, Copy)]
pub(super) enum Weight<'a> {
    F32(&'a [f32]),
    F16(&'a [half::f16]),
    Bf16(&'a [half::bf16]),
}

impl Weight<'_> {
    /// Calls `f` with the elements in `range` as f32.
    pub(super) fn with<R>(&self, range: Range<usize>, f: impl FnOnce(&[f32]) -> R) -> R {
        match self {
            Self::F32(data) => f(&data[range]),
            Self::F16(data) => scratch(range.len(), |buffer| {
                data[range].convert_to_f32_slice(buffer);
                f(buffer)
            }),
            Self::Bf16(data) => scratch(range.len(), |buffer| {
                for (to, from) in buffer.iter_mut().zip(&data[range]) {
                    *to = f32::from_bits(u32::from(from.to_bits()) << 16);
                }
                f(buffer)
            }),
        }
    }

    /// All of it as f32.
    pub(super) fn with_all<R>(&self, f: impl FnOnce(&[f32]) -> R) -> R {
        let len = match self {
            Self::F32(data) => data.len(),
            Self::F16(data) => data.len(),
            Self::Bf16(data) => data.len(),
        };
        self.with(0..len, f)
    }
}

/// Calls `f` with the weight's values. The tensor must be contiguous and on the CPU.
pub(super) fn with_weight<R>(weight: &Tensor, f: impl FnOnce(Weight) -> Result<R>) -> Result<R> {
    let (storage, layout) = weight.storage_and_layout();
    let Some((start, end)) = layout.contiguous_offsets() else { bail!("a weight must be contiguous") };
    match &*storage {
        Storage::Cpu(CpuStorage::F32(data)) => f(Weight::F32(&data[start..end])),
        Storage::Cpu(CpuStorage::F16(data)) => f(Weight::F16(&data[start..end])),
        Storage::Cpu(CpuStorage::BF16(data)) => f(Weight::Bf16(&data[start..end])),
        _ => bail!("a weight is {:?} on {:?}: expected f32, f16 or bf16 on the CPU", weight.dtype(), weight.device()),
    }
}

/// A short vector of weights (a bias, a norm's scale) as f32.
pub(super) fn small_weight(weight: &Tensor) -> Result<Vec<f32>> {
    with_weight(weight, |w| Ok(w.with_all(<[f32]>::to_vec)))
}

thread_local! {
    static SCRATCH: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// Buffers that a thread keeps for reuse.
const KEPT_BUFFERS: usize = 6;
/// The largest buffer kept, in elements.
const KEPT_LEN: usize = 1 << 23;

/// Calls `f` with `len` floats of unspecified content, reused from call to call. May be nested.
pub(super) fn scratch<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    // Taken out while in use: a thread that waits for another may run a second task in between.
    let mut buffer = SCRATCH.with_borrow_mut(Vec::pop).unwrap_or_default();
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    let result = f(&mut buffer[..len]);
    if buffer.len() <= KEPT_LEN {
        SCRATCH.with_borrow_mut(|buffers| {
            if buffers.len() < KEPT_BUFFERS {
                buffers.push(buffer);
            }
        });
    }
    result
}

thread_local! {
    /// Whether this thread computes a sample of its own.
    static ALONE: Cell<bool> = const { Cell::new(false) };
}

/// Whether a kernel may use other threads.
fn may_share() -> bool {
    !ALONE.get() && rayon::current_num_threads() > 1
}

/// The results of `f` for each of `count` samples, each on a thread alone: where the layers of a network are too small to
/// be shared out, its samples are.
pub(crate) fn side_by_side<T: Send, E: Send>(
    count: usize,
    f: impl Fn(usize) -> std::result::Result<T, E> + Sync + Send,
) -> std::result::Result<Vec<T>, E> {
    let sample = |i| {
        let before = ALONE.replace(true);
        let result = f(i);
        ALONE.set(before);
        result
    };
    (0..count).into_par_iter().with_max_len(1).map(sample).collect()
}

/// Runs `task(0..tasks)`, on all threads if `work` elementary steps in all are worth it.
pub(super) fn parallel(tasks: usize, work: usize, task: impl Fn(usize) + Sync + Send) {
    if tasks > 1 && work >= PARALLEL_FROM && may_share() {
        (0..tasks).into_par_iter().for_each(task);
    } else {
        (0..tasks).for_each(task);
    }
}

/// A new buffer of `len` floats that `fill` writes completely.
pub(super) fn filled(len: usize, fill: impl FnOnce(&mut [f32])) -> Vec<f32> {
    let mut data = vec![0.0; len];
    fill(&mut data);
    data
}

/// An output that several tasks write, each to its own elements.
#[derive(Clone, Copy)]
pub(super) struct Shared<'a> {
    pointer: *mut f32,
    len: usize,
    life: PhantomData<&'a mut [f32]>,
}

// SAFETY: the tasks write disjoint elements, which every user of `matrix` and `slice` promises.
#[allow(unsafe_code)]
unsafe impl Send for Shared<'_> {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl Sync for Shared<'_> {}

impl<'a> Shared<'a> {
    pub(super) fn new(data: &'a mut [f32]) -> Self {
        Self { pointer: data.as_mut_ptr(), len: data.len(), life: PhantomData }
    }

    /// The elements `range`.
    ///
    /// # Safety
    /// While it is in use no other task may touch these elements.
    #[allow(unsafe_code, clippy::mut_from_ref)]
    pub(super) unsafe fn slice(&self, range: Range<usize>) -> &'a mut [f32] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: in bounds by the assertion, unaliased by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.add(range.start), range.len()) }
    }

    /// The matrix of `rows` x `columns` elements at start + i * row_stride + j.
    ///
    /// # Safety
    /// While it is in use no other task may touch its elements.
    #[allow(unsafe_code)]
    pub(super) unsafe fn matrix(&self, start: usize, rows: usize, columns: usize, row_stride: usize) -> MatrixMut<'a> {
        assert!(rows == 0 || columns == 0 || start + (rows - 1) * row_stride + columns <= self.len);
        // SAFETY: `start` is in bounds, or the matrix is empty and never dereferenced.
        MatrixMut { pointer: self.pointer.wrapping_add(start), rows, columns, row_stride, life: PhantomData }
    }
}

/// A matrix inside a slice: element (i, j) at i * row_stride + j * column_stride.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    data: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a> Matrix<'a> {
    /// Row-major, without gaps.
    pub(super) fn new(data: &'a [f32], rows: usize, columns: usize) -> Self {
        Self::strided(data, rows, columns, columns)
    }

    /// Row-major, rows `row_stride` apart.
    pub(super) fn strided(data: &'a [f32], rows: usize, columns: usize, row_stride: usize) -> Self {
        assert!(rows == 0 || columns == 0 || (rows - 1) * row_stride + columns <= data.len());
        Self { data, rows, columns, row_stride, column_stride: 1 }
    }

    /// Transposed.
    pub(super) fn t(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }
}

/// A matrix to write, row-major.
pub(super) struct MatrixMut<'a> {
    pointer: *mut f32,
    rows: usize,
    columns: usize,
    row_stride: usize,
    life: PhantomData<&'a mut [f32]>,
}

impl<'a> MatrixMut<'a> {
    /// Row-major, without gaps.
    pub(super) fn new(data: &'a mut [f32], rows: usize, columns: usize) -> Self {
        assert!(rows * columns <= data.len());
        Self { pointer: data.as_mut_ptr(), rows, columns, row_stride: columns, life: PhantomData }
    }
}

/// Whether a product may use all threads, or runs inside a task.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Threads {
    All,
    One,
}

/// `to` = keep * `to` + factor * a b; keep is 0 or 1. With 0 the old content, even NaN, has no influence.
pub(super) fn matmul(to: MatrixMut, keep: bool, a: Matrix, b: Matrix, factor: f32, threads: Threads) {
    assert!(to.rows == a.rows && to.columns == b.columns && a.columns == b.rows);
    if to.rows == 0 || to.columns == 0 {
        return;
    }
    let parallelism = match threads {
        Threads::All if may_share() && to.rows * to.columns * a.columns >= PARALLEL_FROM => gemm::Parallelism::Rayon(0),
        _ => gemm::Parallelism::None,
    };
    // SAFETY: the constructors checked that every element lies in its slice; `to` is unaliased.
    #[allow(unsafe_code)]
    unsafe {
        gemm::gemm(
            to.rows,
            to.columns,
            a.columns,
            to.pointer,
            1,
            to.row_stride as isize,
            keep,
            a.data.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            1.0,
            factor,
            false,
            false,
            false,
            parallelism,
        );
    }
}
