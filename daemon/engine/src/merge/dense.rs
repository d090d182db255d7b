//! Layers whose change a strategy computes itself: `W = round(f32(W0) + delta)`, tile by tile.

use std::sync::Mutex;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Tensor};
use half::{bf16, f16};
use rayon::prelude::*;

use super::composition::Composition;
use super::element::Element;
use super::merger::{Target, not_finite};
use crate::error::{Error, Result};

/// About how many bytes of a tile's f32 change lie in memory at once, for each thread.
const TILE_BYTES: usize = 1 << 20;

/// Writes layer `index` as `composition` has it, all rows; returns how many.
///
/// With `staged` it is computed in main memory and copied from there.
pub(super) fn rewrite_dense(target: &Target, index: usize, composition: &Composition, staged: bool) -> Result<usize> {
    let rewrite = DenseRewrite { target, index, composition, failure: Mutex::new(None) };
    let written = match staged {
        true => {
            let stage = Tensor::zeros(target.live.shape(), target.live.dtype(), &Device::Cpu)?;
            stage
                .inplace_op1(&rewrite)
                .and_then(|()| target.live.slice_set(&stage.to_device(target.live.device())?, 0, 0))
        }
        false => target.live.inplace_op1(&rewrite),
    };
    if let Some(error) = rewrite.failure.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner()) {
        return Err(error);
    }
    written?;
    Ok(target.info.rows)
}

struct DenseRewrite<'a> {
    target: &'a Target,
    index: usize,
    composition: &'a Composition,
    /// The error of a tile: candle's own cannot carry it.
    failure: Mutex<Option<Error>>,
}

impl InplaceOp1 for DenseRewrite<'_> {
    fn name(&self) -> &'static str {
        "merge-dense"
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

impl DenseRewrite<'_> {
    fn run<T: Element>(&self, live: &mut [T]) -> candle_core::Result<()> {
        match self.target.pristine.dtype() {
            DType::F32 => self.run_from::<f32, T>(live),
            DType::F16 => self.run_from::<f16, T>(live),
            DType::BF16 => self.run_from::<bf16, T>(live),
            other => candle_core::bail!("merge reads f32, f16 and bf16 weights, not {other:?}"),
        }
    }

    fn run_from<S: Element, T: Element>(&self, live: &mut [T]) -> candle_core::Result<()> {
        let columns = self.target.info.columns;
        let tile_rows = (TILE_BYTES / (4 * columns)).max(1);
        let tiles = live.par_chunks_mut(tile_rows * columns).enumerate();
        let done = tiles.try_for_each(|(tile, live)| self.write_tile::<S, T>(tile * tile_rows, live));
        if let Err(error) = done {
            *self.failure.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(error);
        }
        Ok(())
    }

    fn write_tile<S: Element, T: Element>(&self, first_row: usize, live: &mut [T]) -> Result<()> {
        let columns = self.target.info.columns;
        let mut delta = vec![0.0; live.len()];
        self.composition.fill(self.index, &self.target.info, first_row, &mut delta)?;
        let pristine = &self.target.pristine.bytes()[first_row * columns * S::BYTES..][..live.len() * S::BYTES];
        for (at, ((live, delta), bytes)) in live.iter_mut().zip(&delta).zip(pristine.chunks_exact(S::BYTES)).enumerate()
        {
            *live = T::round(S::read(bytes) + delta);
            if !live.is_finite() {
                let row = (first_row + at / columns) as u32;
                if !delta.is_finite() {
                    let reason =
                        format!("the change that it writes for row {row} of {} is {delta}", self.target.info.name);
                    return Err(Error::faulty_method(self.composition.strategy_id(), reason));
                }
                return Err(not_finite(self.target, self.index, self.composition, row));
            }
        }
        Ok(())
    }
}
