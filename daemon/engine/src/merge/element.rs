//! The types that weights are stored in.

use candle_core::DType;
use half::{bf16, f16};

/// A type that weights are stored in.
pub(super) trait Element: Copy + Send + Sync {
    /// Its size in bytes.
    const BYTES: usize;
    const DTYPE: DType;
    /// The bits of the smallest f32 magnitude that is no finite number after rounding to this type.
    const OVERFLOW: u32;
    /// Reads a little-endian value from the first bytes of `bytes`.
    fn read(bytes: &[u8]) -> f32;
    /// The same number.
    fn widen(self) -> f32;
    /// Rounds to nearest even.
    fn round(value: f32) -> Self;
    fn is_finite(self) -> bool;
}

impl Element for f32 {
    const BYTES: usize = 4;
    const DTYPE: DType = DType::F32;
    const OVERFLOW: u32 = 0x7f80_0000;
    #[inline(always)]
    fn read(bytes: &[u8]) -> f32 {
        f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
    #[inline(always)]
    fn round(value: f32) -> Self {
        value
    }
    fn is_finite(self) -> bool {
        self.is_finite()
    }
}

impl Element for f16 {
    const BYTES: usize = 2;
    const DTYPE: DType = DType::F16;
    const OVERFLOW: u32 = 0x477f_f000; // 65520, half way between the largest f16 and 2^16
    #[inline(always)]
    fn read(bytes: &[u8]) -> f32 {
        f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }
    #[inline(always)]
    fn round(value: f32) -> Self {
        f16::from_f32(value)
    }
    fn is_finite(self) -> bool {
        self.is_finite()
    }
}

impl Element for bf16 {
    const BYTES: usize = 2;
    const DTYPE: DType = DType::BF16;
    const OVERFLOW: u32 = 0x7f7f_8000;
    #[inline(always)]
    fn read(bytes: &[u8]) -> f32 {
        bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }
    #[inline(always)]
    fn round(value: f32) -> Self {
        bf16::from_f32(value)
    }
    fn is_finite(self) -> bool {
        self.is_finite()
    }
}
