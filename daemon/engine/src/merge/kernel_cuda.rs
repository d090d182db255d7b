//! Rows on a card: `kernels/merge.cu` writes those of all layers in one launch, from pristine weights and factors that
//! stay there, with the bits that [`kernel`](super::kernel) gives.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DevicePtr, DeviceRepr, PushKernelArg};
use candle_core::{CudaDevice, CudaStorage, DType, Device, Storage, Tensor, bail};
use half::{bf16, f16};
use rayon::prelude::*;

use super::adapter::AdapterFactors;
use super::composition::{Composition, RowTerms};
use super::merger::{Target, not_finite};
use crate::cuda::{Module, blocks};
use crate::error::Result;

/// The most rows of a tile, and the threads of its block.
const ROWS: usize = 8;
const THREADS: u32 = 128;

/// Rows of one matrix that take the same adapters; `kernels/merge.cu` has the same structure.
#[repr(C)]
#[derive(Clone, Copy)]
struct Tile {
    pristine: u64,
    live: u64,
    columns: u32,
    rows: u32,
    first_row: u32,
    first_a: u32,
    terms: u32,
    first_w: u32,
}

// SAFETY: plain numbers in the layout of the kernel's structure.
#[allow(unsafe_code)]
unsafe impl DeviceRepr for Tile {}

/// What one launch gets.
#[derive(Default)]
struct Launch {
    tiles: Vec<Tile>,
    /// Row numbers, and of which layer each is.
    rows: Vec<u32>,
    layers: Vec<u32>,
    /// Where rows of A begin on the card.
    a: Vec<u64>,
    /// [`ROWS`] weights for each of `a`.
    w: Vec<f32>,
}

impl Launch {
    /// Takes in what `other` has.
    fn append(&mut self, mut other: Self) {
        let [rows, a, w] = [self.rows.len(), self.a.len(), self.w.len()].map(|len| len as u32);
        self.tiles.extend(other.tiles.iter().map(|tile| Tile {
            first_row: tile.first_row + rows,
            first_a: tile.first_a + a,
            first_w: tile.first_w + w,
            ..*tile
        }));
        self.rows.append(&mut other.rows);
        self.layers.append(&mut other.layers);
        self.a.append(&mut other.a);
        self.w.append(&mut other.w);
    }
}

/// All A of an adapter on the card.
struct Uploaded {
    adapter: Weak<AdapterFactors>,
    /// Where each of its layers' A begins, and behind the last one.
    starts: Arc<[u64]>,
    /// What keeps them there.
    _a: CudaSlice<f32>,
}

/// The card that holds a merger's live weights.
pub(super) struct Card {
    device: CudaDevice,
    /// By target its weight as in the file.
    pristine: Vec<Tensor>,
    /// The factors of adapters that are still in memory.
    uploaded: Mutex<Vec<Uploaded>>,
}

impl std::fmt::Debug for Card {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Card({:?}, {} layers)", self.device, self.pristine.len())
    }
}

impl Card {
    /// None unless all live weights are on one card. Takes the memory of their pristine copy there.
    pub fn new(targets: &[Target]) -> Result<Option<Self>> {
        let Some(Device::Cuda(device)) = targets.first().map(|target| target.live.device()) else { return Ok(None) };
        let here = |target: &Target| matches!(target.live.device(), Device::Cuda(other) if other.id() == device.id());
        if !targets.iter().all(here) {
            return Ok(None);
        }
        let copy = |target: &Target| target.pristine.load(target.pristine.dtype(), target.live.device());
        let pristine = targets.iter().map(copy).collect::<Result<Vec<_>>>()?;
        Ok(Some(Self { device: device.clone(), pristine, uploaded: Mutex::default() }))
    }

    /// Writes `rows`, by layer, as `composition` has them.
    pub fn rewrite(&self, targets: &[Target], composition: &Composition, rows: &[(usize, RowTerms)]) -> Result<()> {
        let starts = self.upload(composition)?;
        let mut by_types: BTreeMap<(&str, &str), Vec<&(usize, RowTerms)>> = BTreeMap::new();
        for layer in rows {
            let target = &targets[layer.0];
            let types = (target.pristine.dtype().as_str(), target.live.dtype().as_str());
            by_types.entry(types).or_default().push(layer);
        }
        for ((stored, live), layers) in by_types {
            let plan = |(index, terms): &&(usize, RowTerms)| self.plan(targets, composition, &starts, *index, terms);
            let planned = layers.par_iter().map(plan).collect::<candle_core::Result<Vec<_>>>()?;
            let mut launch = Launch::default();
            planned.into_iter().for_each(|layer| launch.append(layer));
            if let Some(bad) = self.run(&format!("merge_{stored}_{live}"), &launch)? {
                let (layer, row) = (launch.layers[bad] as usize, launch.rows[bad]);
                return Err(not_finite(&targets[layer], layer, composition, row));
            }
        }
        Ok(())
    }

    /// Brings those factors to the card that are not there yet; by adapter where each of its layers' A begins.
    fn upload(&self, composition: &Composition) -> candle_core::Result<Vec<Arc<[u64]>>> {
        let mut uploaded = self.uploaded.lock().unwrap_or_else(PoisonError::into_inner);
        uploaded.retain(|known| known.adapter.strong_count() > 0);
        let stream = self.device.cuda_stream();
        let mut starts = Vec::new();
        for placed in composition.adapters() {
            let is_this = |known: &&Uploaded| std::ptr::eq(known.adapter.as_ptr(), Arc::as_ptr(&placed.factors));
            if let Some(known) = uploaded.iter().find(is_this) {
                starts.push(known.starts.clone());
                continue;
            }
            let values: Vec<f32> = placed.factors.layers().flat_map(|layer| layer.a.iter().copied()).collect();
            let a = if values.is_empty() { self.device.alloc_zeros(1)? } else { self.device.clone_htod(&values)? };
            let mut ends = vec![a.device_ptr(&stream).0];
            for layer in placed.factors.layers() {
                ends.push(ends[ends.len() - 1] + size_of_val(&layer.a[..]) as u64);
            }
            let known = Uploaded { adapter: Arc::downgrade(&placed.factors), starts: ends.into(), _a: a };
            starts.push(known.starts.clone());
            uploaded.push(known);
        }
        Ok(starts)
    }

    /// The tiles of one layer.
    fn plan(
        &self,
        targets: &[Target],
        composition: &Composition,
        starts: &[Arc<[u64]>],
        index: usize,
        terms: &RowTerms,
    ) -> candle_core::Result<Launch> {
        let (target, mut launch) = (&targets[index], Launch::default());
        let columns = target.info.columns;
        let tile = Tile {
            pristine: self.address(&self.pristine[index])?,
            live: self.address(&target.live)?,
            columns: columns as u32,
            rows: 0,
            first_row: 0,
            first_a: 0,
            terms: 0,
            first_w: 0,
        };
        let count = terms.rows.len();
        let mut first = 0;
        while first < count {
            let same = (first + 1..count.min(first + ROWS)).take_while(|&row| terms.alike(first, row)).count();
            let rows = first..first + 1 + same;
            let (first_a, first_w) = (launch.a.len(), launch.w.len());
            for (at, term) in terms.of(first).iter().enumerate() {
                let placed = &composition.adapters()[term.adapter as usize];
                let (Some(own), Some(layer)) = (placed.own_index(index), placed.layer(index)) else { continue };
                let a = starts[term.adapter as usize][own];
                for k in 0..layer.rank {
                    launch.a.push(a + (k * columns * size_of::<f32>()) as u64);
                    let mut w = [0.0; ROWS];
                    for (w, row) in w.iter_mut().zip(rows.clone()) {
                        let term = &terms.of(row)[at];
                        *w = term.coefficient * placed.factors.scale() * layer.b[term.local as usize * layer.rank + k];
                    }
                    launch.w.extend(w);
                }
            }
            launch.tiles.push(Tile {
                rows: rows.len() as u32,
                first_row: launch.rows.len() as u32,
                first_a: first_a as u32,
                terms: (launch.a.len() - first_a) as u32,
                first_w: first_w as u32,
                ..tile
            });
            launch.rows.extend(&terms.rows[rows.clone()]);
            launch.layers.extend(rows.clone().map(|_| index as u32));
            first = rows.end;
        }
        Ok(launch)
    }

    /// Where a contiguous tensor lies on the card.
    fn address(&self, tensor: &Tensor) -> candle_core::Result<u64> {
        let (storage, layout) = tensor.storage_and_layout();
        let (Storage::Cuda(storage), Some((start, _))) = (&*storage, layout.contiguous_offsets()) else {
            bail!("merge: a weight is not contiguous on the card")
        };
        fn begin<T: candle_core::cuda_backend::CudaDType>(
            storage: &CudaStorage,
            device: &CudaDevice,
        ) -> candle_core::Result<u64>
        where
            CudaSlice<T>: DevicePtr<T>,
        {
            Ok(storage.as_cuda_slice::<T>()?.device_ptr(&device.cuda_stream()).0)
        }
        let begin = match tensor.dtype() {
            DType::F32 => begin::<f32>(storage, &self.device)?,
            DType::F16 => begin::<f16>(storage, &self.device)?,
            DType::BF16 => begin::<bf16>(storage, &self.device)?,
            other => bail!("merge takes f32, f16 and bf16 weights, not {other:?}"),
        };
        Ok(begin + (start * tensor.dtype().size_in_bytes()) as u64)
    }

    /// Has the kernel `name` write all tiles; the index among the launch's rows of one that does not stay finite.
    fn run(&self, name: &str, launch: &Launch) -> candle_core::Result<Option<usize>> {
        let device = &self.device;
        let (tiles, rows) = (device.clone_htod(&launch.tiles)?, device.clone_htod(&launch.rows)?);
        // Where no tile has terms, these two are not read, but must be something.
        let a = if launch.a.is_empty() { device.alloc_zeros(1)? } else { device.clone_htod(&launch.a)? };
        let w = if launch.w.is_empty() { device.alloc_zeros(1)? } else { device.clone_htod(&launch.w)? };
        let mut not_finite = device.clone_htod(&[u32::MAX])?;
        let kernel = Module::Merge.kernel(device, name)?;
        let stream = device.cuda_stream();
        let mut arguments = stream.launch_builder(&kernel);
        arguments.arg(&tiles).arg(&rows).arg(&a).arg(&w).arg(&mut not_finite);
        // SAFETY: every address is that of a whole matrix that lives in `self` or the targets, or of factors that
        // `uploaded` keeps while their adapter is in memory, as the composition's are; rows lie inside their matrix, as
        // the composition checked; and all work on the card is on one stream.
        #[allow(unsafe_code)]
        unsafe { arguments.launch(blocks(launch.tiles.len(), THREADS)?) }.w()?;
        match device.clone_dtoh(&not_finite)?.first() {
            None | Some(&u32::MAX) => Ok(None),
            Some(&row) => Ok(Some(row as usize)),
        }
    }
}
