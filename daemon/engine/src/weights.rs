//! Mapped model files. The mapping is the pristine copy of every weight; nothing else keeps one.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

struct Entry {
    dtype: DType,
    shape: Vec<usize>,
    bytes: Range<usize>,
}

/// A memory-mapped `.safetensors` file whose header has been checked against its length.
pub struct WeightFile {
    path: PathBuf,
    map: Mmap,
    entries: BTreeMap<String, Entry>,
}

impl WeightFile {
    /// Maps `path` and checks its header. Errors name the file and what is wrong in it.
    pub fn open(path: impl Into<PathBuf>) -> Result<Arc<Self>> {
        let path = path.into();
        let file = File::open(&path).map_err(|e| Error::io(&path, e))?;
        // SAFETY: mapping is unsound if the file shrinks while mapped; model files are opened read-only and replaced
        // by rename, never rewritten in place.
        #[allow(unsafe_code)]
        let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::io(&path, e))?;
        let invalid = |reason: String| Error::invalid_file(&path, reason);
        let (header_len, metadata) =
            SafeTensors::read_metadata(&map).map_err(|e| invalid(format!("not a valid safetensors file: {e}")))?;
        let data = 8 + header_len;
        let mut entries = BTreeMap::new();
        for (name, info) in metadata.tensors() {
            let dtype = match info.dtype {
                Dtype::F32 => DType::F32,
                Dtype::F16 => DType::F16,
                Dtype::BF16 => DType::BF16,
                Dtype::I64 => DType::I64,
                other => return Err(invalid(format!("tensor {name:?} has the unsupported type {other:?}"))),
            };
            let (start, end) = info.data_offsets;
            let bytes = data + start..data + end;
            if map.get(bytes.clone()).is_none() {
                return Err(invalid(format!("tensor {name:?} ends beyond the file's end")));
            }
            entries.insert(name, Entry { dtype, shape: info.shape.clone(), bytes });
        }
        Ok(Arc::new(Self { path, map, entries }))
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All of its bytes, header included, whatever has taken its place in the folder meanwhile.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// The names of its tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// The tensor `name`; an error naming file and tensor if there is none.
    pub fn view(self: &Arc<Self>, name: &str) -> Result<WeightView> {
        let entry = self.entries.get(name).ok_or_else(|| Error::InvalidTensor {
            path: self.path.clone(),
            tensor: name.to_owned(),
            reason: "missing".into(),
        })?;
        Ok(WeightView {
            name: name.to_owned(),
            dtype: entry.dtype,
            shape: entry.shape.clone(),
            bytes: entry.bytes.clone(),
            file: self.clone(),
        })
    }

    /// SHA-256 of the whole file, in hex.
    pub fn digest(&self) -> String {
        hex(&Sha256::digest(&self.map))
    }
}

impl std::fmt::Debug for WeightFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "WeightFile({}, {} tensors)", self.path.display(), self.entries.len())
    }
}

/// Values in a mapping.
#[derive(Clone, Copy, Debug)]
pub enum Floats<'a> {
    /// 32 bits.
    F32(&'a [f32]),
    /// IEEE 754 half precision.
    F16(&'a [half::f16]),
    /// The upper half of 32 bits.
    Bf16(&'a [half::bf16]),
}

/// One tensor of a [`WeightFile`]: its pristine value.
#[derive(Clone, Debug)]
pub struct WeightView {
    file: Arc<WeightFile>,
    name: String,
    dtype: DType,
    shape: Vec<usize>,
    bytes: Range<usize>,
}

impl WeightView {
    /// Its name in the file.
    pub fn name(&self) -> &str {
        &self.name
    }
    /// The type it is stored in.
    pub fn dtype(&self) -> DType {
        self.dtype
    }
    /// Its shape.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }
    /// Its bytes, little endian, row-major, in the mapping. Not necessarily aligned.
    pub fn bytes(&self) -> &[u8] {
        &self.file.map[self.bytes.clone()]
    }
    /// Where its bytes begin in the file.
    pub fn offset(&self) -> u64 {
        self.bytes.start as u64
    }
    /// An error about this tensor.
    pub fn error(&self, reason: impl Into<String>) -> Error {
        Error::InvalidTensor { path: self.file.path.clone(), tensor: self.name.clone(), reason: reason.into() }
    }
    /// Fails unless the shape is `expected`.
    pub fn expect_shape(&self, expected: &[usize]) -> Result<()> {
        if self.shape == expected {
            Ok(())
        } else {
            Err(self.error(format!("shape {:?}, but the config asks for {expected:?}", self.shape)))
        }
    }
    /// Its values where they lie in the mapping; none where they are not aligned, not floats or of the other
    /// endianness.
    pub fn floats(&self) -> Option<Floats<'_>> {
        fn cast<T>(bytes: &[u8]) -> Option<&[T]> {
            // SAFETY: only called for f32, f16 and bf16, for which every bit pattern is a value.
            #[allow(unsafe_code)]
            let (before, values, after) = unsafe { bytes.align_to::<T>() };
            (before.is_empty() && after.is_empty() && cfg!(target_endian = "little")).then_some(values)
        }
        match self.dtype {
            DType::F32 => cast(self.bytes()).map(Floats::F32),
            DType::F16 => cast(self.bytes()).map(Floats::F16),
            DType::BF16 => cast(self.bytes()).map(Floats::Bf16),
            _ => None,
        }
    }
    /// Loads it as a tensor of `dtype` on `device`.
    pub fn load(&self, dtype: DType, device: &Device) -> Result<Tensor> {
        let tensor = Tensor::from_raw_buffer(self.bytes(), self.dtype, &self.shape, device)?.to_dtype(dtype)?;
        self.release();
        Ok(tensor)
    }

    /// Tells the system that the pages of a large tensor are not needed for now: what has been copied need not count
    /// as this process's memory twice. Reading them again maps them again.
    fn release(&self) {
        /// Below this it is not worth a call.
        const LARGE: usize = 1 << 20;
        #[cfg(unix)]
        if self.bytes.len() >= LARGE {
            const PAGE: usize = 4096;
            let start = self.bytes.start.next_multiple_of(PAGE);
            let len = (self.bytes.end / PAGE * PAGE).saturating_sub(start);
            // SAFETY: the mapping is shared, read-only and backed by the file, so that a dropped page is read from
            // there again with the same content. A refusal changes nothing.
            #[allow(unsafe_code)]
            let _ = unsafe { self.file.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, len) };
        }
    }
}

pub use blocklora_spec::hex;
