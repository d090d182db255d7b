//! Plain copies between the mapping and the live weights: what a merge is measured against, and how it is checked.

#![allow(unsafe_code)]

use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, Device, InplaceOp1, Layout, Tensor};
use rayon::prelude::*;

use super::merger::Target;
use crate::error::Result;

/// Copies the first `rows` rows of the file into the live weight, which must be of the stored type: the memory speed
/// that a merge of those rows can hope for.
pub(crate) fn copy_rows(target: &Target, rows: usize) -> Result<()> {
    let bytes = rows * target.info.columns * target.pristine.dtype().size_in_bytes();
    if !target.live.device().is_cpu() {
        let (shape, pristine) = ((rows, target.info.columns), &target.pristine);
        let rows = Tensor::from_raw_buffer(
            &pristine.bytes()[..bytes],
            pristine.dtype(),
            &[shape.0, shape.1],
            target.live.device(),
        )?;
        return Ok(target.live.slice_set(&rows, 0, 0)?);
    }
    Ok(target.live.inplace_op1(&OnBytes {
        pristine: &target.pristine.bytes()[..bytes],
        copies: true,
        same: AtomicBool::new(true),
    })?)
}

/// Whether the live weight, which must be of the stored type, has the file's bits.
pub(crate) fn is_pristine(target: &Target) -> Result<bool> {
    let compare = OnBytes { pristine: target.pristine.bytes(), copies: false, same: AtomicBool::new(true) };
    target.live.to_device(&Device::Cpu)?.inplace_op1(&compare)?;
    Ok(compare.same.into_inner())
}

const CHUNK: usize = 256 << 10;

/// Copies to or compares with the first bytes of a live weight.
struct OnBytes<'a> {
    pristine: &'a [u8],
    copies: bool,
    same: AtomicBool,
}

impl InplaceOp1 for OnBytes<'_> {
    fn name(&self) -> &'static str {
        "copy"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let Some((start, end)) = layout.contiguous_offsets() else {
            candle_core::bail!("copy needs a contiguous weight")
        };
        let live = match storage {
            CpuStorage::F32(live) => bytes_of(&mut live[start..end]),
            CpuStorage::F16(live) => bytes_of(&mut live[start..end]),
            CpuStorage::BF16(live) => bytes_of(&mut live[start..end]),
            other => candle_core::bail!("copy takes f32, f16 and bf16 weights, not {:?}", other.dtype()),
        };
        let Some(live) = live.get_mut(..self.pristine.len()) else {
            candle_core::bail!("copy: {} bytes do not fit", self.pristine.len())
        };
        live.par_chunks_mut(CHUNK).zip(self.pristine.par_chunks(CHUNK)).for_each(|(live, pristine)| {
            if self.copies {
                live.copy_from_slice(pristine);
            } else if live != pristine {
                self.same.store(false, Ordering::Relaxed);
            }
        });
        Ok(())
    }
}

fn bytes_of<T>(values: &mut [T]) -> &mut [u8] {
    // SAFETY: only called for f32, f16 and bf16, which have no padding and take every bit pattern.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(values)) }
}
