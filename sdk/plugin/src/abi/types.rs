//! The data that crosses the boundary. Everything borrowed lives as long as the call that it was given to; everything
//! owned carries the allocator that made it.
//!
//! These types never change within a major version: they are passed by value and in slices. What is added goes into new
//! types, reached by new functions at the end of a table.

use abi_stable::StableAbi;
use abi_stable::std_types::{ROption, RSlice, RSliceMut, RStr, RString, RVec};

use crate::error::{Code, Error};

/// An error: [`Code`] as a number, and one line for people.
#[repr(C)]
#[derive(StableAbi)]
pub struct RawError {
    pub code: u32,
    pub message: RString,
}

impl From<Error> for RawError {
    fn from(error: Error) -> Self {
        Self { code: error.code as u32, message: error.message.into() }
    }
}

impl From<RawError> for Error {
    fn from(raw: RawError) -> Self {
        const CODES: [Code; 9] = [
            Code::Failed,
            Code::Cancelled,
            Code::InvalidConfig,
            Code::Incompatible,
            Code::NotSupported,
            Code::NotFinite,
            Code::Panicked,
            Code::Contract,
            Code::Host,
        ];
        let code = CODES.into_iter().find(|code| *code as u32 == raw.code).unwrap_or(Code::Failed);
        // One line, whatever the other side wrote.
        let message = raw.message.lines().collect::<Vec<_>>().join(" ");
        Self { code, message }
    }
}

/// A layer: its name, outputs m and inputs n.
#[repr(C)]
#[derive(StableAbi, Clone, Copy)]
pub struct RawLayer<'a> {
    pub name: RStr<'a>,
    pub rows: usize,
    pub columns: usize,
}

/// Factors: A [rank, n], B [rows.len(), rank], the owned rows (ascending, below m), the scale of the delta.
#[repr(C)]
#[derive(StableAbi, Clone, Copy)]
pub struct RawFactors<'a> {
    pub a: RSlice<'a, f32>,
    pub b: RSlice<'a, f32>,
    pub rows: RSlice<'a, u32>,
    pub rank: usize,
    pub scale: f32,
}

/// An adapter; `factors` by layer.
#[repr(C)]
#[derive(StableAbi, Clone, Copy)]
pub struct RawAdapter<'a> {
    pub name: RStr<'a>,
    pub digest: RStr<'a>,
    pub weight: f32,
    pub factors: RSlice<'a, ROption<RawFactors<'a>>>,
}

/// A term; `per_row` is empty where `coefficient` holds for all rows.
#[repr(C)]
#[derive(StableAbi)]
pub struct RawTerm {
    pub adapter: usize,
    pub is_per_row: bool,
    pub coefficient: f32,
    pub per_row: RVec<f32>,
}

/// What happens to a layer: `terms`, or a dense fill with `numbers`.
#[repr(C)]
#[derive(StableAbi)]
pub struct RawLayerPlan {
    pub is_dense: bool,
    pub terms: RVec<RawTerm>,
    pub numbers: RVec<f32>,
}

/// The training noise schedule; `spacing`: 0 leading, 1 linspace, 2 trailing.
#[repr(C)]
#[derive(StableAbi, Clone, Copy)]
pub struct RawSchedule<'a> {
    pub alphas_cumprod: RSlice<'a, f32>,
    pub steps_offset: usize,
    pub set_alpha_to_one: bool,
    pub spacing: u32,
}

/// A concept; `kind`: 0 subject, 1 person, 2 scene, 3 style.
#[repr(C)]
#[derive(StableAbi, Clone, Copy)]
pub struct RawConcept<'a> {
    pub name: RStr<'a>,
    pub class_word: RStr<'a>,
    pub kind: u32,
}

/// A partition; `scheme`: 0 contiguous, 1 strided, 2 permuted.
#[repr(C)]
#[derive(StableAbi, Clone, Copy)]
pub struct RawPartition {
    pub scheme: u32,
    pub capacity: u32,
    pub seed: u64,
    pub slot: u32,
}

/// What an adapter file says about itself; `is_alpha_over_rank` tells the two delta formulas apart.
#[repr(C)]
#[derive(StableAbi)]
pub struct RawTrainPlan {
    pub steps: usize,
    pub checkpoint_every: usize,
    pub rank: usize,
    pub alpha: f32,
    pub is_alpha_over_rank: bool,
    pub partition: ROption<RawPartition>,
    pub erasure_lambda: f32,
    pub tokens: RVec<RString>,
}

/// Trainable factors of a layer, lent.
#[repr(C)]
#[derive(StableAbi, Clone, Copy)]
pub struct RawLayerFactors<'a> {
    pub layer: usize,
    pub rows: RSlice<'a, u32>,
    pub rank: usize,
    pub scale: f32,
    pub a: RSlice<'a, f32>,
    pub b: RSlice<'a, f32>,
    pub a_is_frozen: bool,
}

/// A token's vectors, lent.
#[repr(C)]
#[derive(StableAbi, Clone, Copy)]
pub struct RawToken<'a> {
    pub name: RStr<'a>,
    pub layers: usize,
    pub values: RSlice<'a, f32>,
}

/// Parameters, lent.
#[repr(C)]
#[derive(StableAbi, Clone, Copy)]
pub struct RawParameters<'a> {
    pub factors: RSlice<'a, RawLayerFactors<'a>>,
    pub tokens: RSlice<'a, RawToken<'a>>,
}

/// Trainable factors of a layer, given away.
#[repr(C)]
#[derive(StableAbi)]
pub struct OwnedLayerFactors {
    pub layer: usize,
    pub rows: RVec<u32>,
    pub rank: usize,
    pub scale: f32,
    pub a: RVec<f32>,
    pub b: RVec<f32>,
    pub a_is_frozen: bool,
}

/// A token's vectors, given away.
#[repr(C)]
#[derive(StableAbi)]
pub struct OwnedToken {
    pub name: RString,
    pub layers: usize,
    pub values: RVec<f32>,
}

/// Parameters, given away.
#[repr(C)]
#[derive(StableAbi)]
pub struct OwnedParameters {
    pub factors: RVec<OwnedLayerFactors>,
    pub tokens: RVec<OwnedToken>,
}

/// A training state, lent.
#[repr(C)]
#[derive(StableAbi, Clone, Copy)]
pub struct RawState<'a> {
    pub step: usize,
    pub parameters: RawParameters<'a>,
    pub optimiser: RSlice<'a, RSlice<'a, f32>>,
}

/// A training state, given away.
#[repr(C)]
#[derive(StableAbi)]
pub struct OwnedState {
    pub step: usize,
    pub parameters: OwnedParameters,
    pub optimiser: RVec<RVec<f32>>,
}

/// A sample of a batch.
#[repr(C)]
#[derive(StableAbi, Clone, Copy)]
pub struct RawSample<'a> {
    pub picture: usize,
    pub placement_scale: f32,
    pub placement_x: f32,
    pub placement_y: f32,
    pub flip: bool,
    pub prompt: RStr<'a>,
    pub timestep: usize,
    pub noise: RSlice<'a, f32>,
    pub posterior: RSlice<'a, f32>,
    pub weight: f32,
}

/// One training step: parameters, masks by position in the factors (none erase nothing), batch; gradients are written
/// into the tensors of `gradients`, in the order A, B of each layer, then each token.
#[repr(C)]
#[derive(StableAbi)]
pub struct RawStep<'a> {
    pub parameters: RawParameters<'a>,
    pub masks: RSlice<'a, RSlice<'a, f32>>,
    pub batch: RSlice<'a, RawSample<'a>>,
    pub gradients: RSliceMut<'a, RSliceMut<'a, f32>>,
}

/// Pictures to draw.
#[repr(C)]
#[derive(StableAbi, Clone, Copy)]
pub struct RawPictureRequest<'a> {
    pub prompt: RStr<'a>,
    pub count: usize,
    pub steps: usize,
    pub guidance_scale: f32,
}
