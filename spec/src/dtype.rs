//! The number types that factors are stored in.

use half::{bf16, f16};

/// How numbers are stored. Reading always gives f32, which holds all three exactly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Storage {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// bfloat16.
    BF16,
}

impl Storage {
    /// Its name in a safetensors header.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
        }
    }

    pub(crate) fn from_name(name: &str) -> Option<Self> {
        [Self::F32, Self::F16, Self::BF16].into_iter().find(|s| s.name() == name)
    }

    /// Bytes of one number.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }

    /// The numbers in `bytes` (little endian, any alignment).
    pub(crate) fn decode(self, bytes: &[u8]) -> impl Iterator<Item = f32> + '_ {
        bytes.chunks_exact(self.size()).map(move |c| match (self, c) {
            (Self::F32, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]),
            (Self::F16, &[a, b]) => f16::from_le_bytes([a, b]).to_f32(),
            (Self::BF16, &[a, b]) => bf16::from_le_bytes([a, b]).to_f32(),
            _ => unreachable!("chunks have the size of the type"),
        })
    }

    /// Appends `values`, rounded to nearest even.
    pub(crate) fn encode(self, values: &[f32], out: &mut Vec<u8>) {
        for &x in values {
            match self {
                Self::F32 => out.extend(x.to_le_bytes()),
                Self::F16 => out.extend(f16::from_f32(x).to_le_bytes()),
                Self::BF16 => out.extend(bf16::from_f32(x).to_le_bytes()),
            }
        }
    }
}
