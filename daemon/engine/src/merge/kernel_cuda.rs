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
use super::tiles::{Matrices, Tile, Tiles};
use crate::cuda::{Module, blocks};
use crate::error::Result;

/// Of a tile's block.
const THREADS: u32 = 128;

// SAFETY: plain numbers in the layout of the kernel's structure.
#[allow(unsafe_code)]
unsafe impl DeviceRepr for Tile {}

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
    /// What the last launch got: the memory is used again.
    tiles: Mutex<Tiles>,
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
        Ok(Some(Self { device: device.clone(), pristine, uploaded: Mutex::default(), tiles: Mutex::default() }))
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
            let of_layer = |&&(index, ref terms): &&(usize, RowTerms)| -> candle_core::Result<Tiles> {
                let target = &targets[index];
                let (pristine, live) = (self.address(&self.pristine[index])?, self.address(&target.live)?);
                let matrices = Matrices { pristine, live, columns: target.info.columns };
                Ok(Tiles::of_layer(composition, index, terms, matrices, &starts))
            };
            let mut tiles = self.tiles.lock().unwrap_or_else(PoisonError::into_inner);
            tiles.clear();
            for layer in layers.par_iter().map(of_layer).collect::<candle_core::Result<Vec<_>>>()? {
                tiles.append(&layer);
            }
            if let Some(bad) = self.run(&format!("merge_{stored}_{live}"), &tiles)? {
                let (layer, row) = (tiles.layer_of(bad), tiles.rows[bad]);
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

    /// Has the kernel `name` write all tiles; the index among their rows of one that does not stay finite.
    fn run(&self, name: &str, given: &Tiles) -> candle_core::Result<Option<usize>> {
        let device = &self.device;
        let (tiles, rows) = (device.clone_htod(&given.tiles)?, device.clone_htod(&given.rows)?);
        // Where no tile has terms, these two are not read, but must be something.
        let a = if given.a.is_empty() { device.alloc_zeros(1)? } else { device.clone_htod(&given.a)? };
        let w = if given.w.is_empty() { device.alloc_zeros(1)? } else { device.clone_htod(&given.w)? };
        let mut not_finite = device.clone_htod(&[u32::MAX])?;
        let kernel = Module::Merge.kernel(device, name)?;
        let stream = device.cuda_stream();
        let mut arguments = stream.launch_builder(&kernel);
        arguments.arg(&tiles).arg(&rows).arg(&a).arg(&w).arg(&mut not_finite);
        // SAFETY: every address is that of a whole matrix that lives in `self` or the targets, or of factors that
        // `uploaded` keeps while their adapter is in memory, as the composition's are; rows lie inside their matrix, as
        // the composition checked; and all work on the card is on one stream.
        #[allow(unsafe_code)]
        unsafe { arguments.launch(blocks(given.tiles.len(), THREADS)?) }.w()?;
        match device.clone_dtoh(&not_finite)?.first() {
            None | Some(&u32::MAX) => Ok(None),
            Some(&row) => Ok(Some(row as usize)),
        }
    }
}
