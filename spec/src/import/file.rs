//! Another tool's safetensors file, read without trusting it. Other tools need not pad headers, and have more types and
//! dimensions than adapters; what is taken out is checked when it is.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::{Origin, fail};
use crate::adapter::hex;
use crate::dtype::Storage;
use crate::error::{Error, Result, excerpt, shortened};
use crate::header::{self, Parts, RawEntry};
use crate::limits;
use crate::map::Content;

/// One tensor's place.
pub(super) struct Tensor {
    pub(super) dtype: String,
    pub(super) shape: Vec<usize>,
    bytes: Range<usize>,
}

/// A file whose header has been read and whose tensors lie inside it.
pub(super) struct File {
    pub(super) path: PathBuf,
    pub(super) metadata: BTreeMap<String, String>,
    pub(super) tensors: BTreeMap<String, Tensor>,
    content: Content,
}

impl File {
    /// Maps `path`. A pickle is refused: reading one may run what is in it.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let io = |e| Error::io(path, e);
        let meta = std::fs::metadata(path).map_err(io)?;
        if !meta.is_file() {
            return Err(Error::NotAFile { path: path.into() });
        }
        let file = std::fs::File::open(path).map_err(io)?;
        let bytes = file.metadata().map_err(io)?.len();
        if bytes > limits::FILE_BYTES_MAX {
            return Err(Error::FileTooLarge { path: path.into(), bytes, limit: limits::FILE_BYTES_MAX });
        }
        let content = if bytes == 0 { Content::Bytes(Vec::new()) } else { Content::map(&file).map_err(io)? };
        if is_pickle(path, &content) {
            return fail(path, PICKLE);
        }
        Self::read(path, content)
    }

    /// Whether two of its tensors have one type, one shape and the same bytes.
    pub(super) fn is_same(&self, one: &str, other: &str) -> bool {
        let what = |key: &str| {
            let Tensor { dtype, shape, .. } = self.tensors.get(key)?;
            Some((dtype, shape, self.bytes(key).ok()?))
        };
        what(one).is_some_and(|one| Some(one) == what(other))
    }

    fn read(path: &Path, content: Content) -> Result<Self> {
        let Parts { metadata, entries, base } = header::parts(path, &content, false)?;
        let data = content.len() - base;
        let (mut tensors, mut taken) = (BTreeMap::new(), 0u64);
        for (name, entry) in entries {
            let reason = |reason: String| Error::TensorEntry { path: path.into(), tensor: shortened(&name), reason };
            let raw: RawEntry = serde_json::from_value(entry).map_err(|e| reason(excerpt(&e.to_string())))?;
            let [begin, end] = raw.data_offsets;
            if begin > end {
                return Err(reason(format!("its offsets {begin} and {end} end before they begin")));
            }
            if end > data as u64 {
                let (needed, actual) = (end.saturating_add(base as u64), content.len() as u64);
                let what = format!("tensor {:?}", shortened(&name));
                return Err(Error::Truncated { path: path.into(), what, needed, actual });
            }
            // Tensors that share bytes would cost more than the file's size.
            taken += end - begin;
            if taken > data as u64 {
                return Err(reason("overlaps others".into()));
            }
            let shape = raw.shape.iter().map(|&d| usize::try_from(d)).collect::<Result<Vec<_>, _>>();
            let shape = shape.map_err(|_| reason("a dimension overflows".into()))?;
            let bytes = base + begin as usize..base + end as usize;
            tensors.insert(name, Tensor { dtype: raw.dtype, shape, bytes });
        }
        Ok(Self { path: path.into(), metadata, tensors, content })
    }

    /// The type of the tensor `key` if it is one that adapters have.
    pub(super) fn storage(&self, key: &str) -> Option<Storage> {
        self.tensors.get(key).and_then(|tensor| Storage::from_name(&tensor.dtype))
    }

    /// The numbers of the tensor `key`, of exactly `count`, all finite.
    pub(super) fn numbers(&self, key: &str, count: usize) -> Result<Vec<f32>> {
        let bytes = self.bytes(key)?;
        let Some(storage) = self.storage(key) else {
            let dtype = self.tensors.get(key).map_or("", |tensor| &tensor.dtype);
            let eight = if dtype.starts_with("F8") { ", which has too few bits to be read as trained" } else { "" };
            let (key, dtype) = (shortened(key), shortened(dtype));
            let reason = format!("tensor {key:?} has the type {dtype:?}{eight}: save it as F16, BF16 or F32");
            return fail(&self.path, reason);
        };
        if count.checked_mul(storage.size()) != Some(bytes.len()) {
            let reason = format!("{count} numbers of {} in {} bytes", storage.name(), bytes.len());
            return Err(Error::TensorEntry { path: self.path.clone(), tensor: shortened(key), reason });
        }
        let values: Vec<f32> = storage.decode(bytes).collect();
        match values.iter().enumerate().find(|(_, x)| !x.is_finite()) {
            None => Ok(values),
            Some((index, value)) => {
                let reason = format!("tensor {:?}: element {index} is {value}: the file is damaged", shortened(key));
                fail(&self.path, reason)
            }
        }
    }

    /// The one number of the tensor `key`. Whole and double numbers are what some tools store an alpha as.
    pub(super) fn scalar(&self, key: &str) -> Result<f64> {
        let bytes = self.bytes(key)?;
        let dtype = self.tensors.get(key).map_or("", |tensor| &tensor.dtype);
        let value = match (dtype, <[u8; 8]>::try_from(bytes)) {
            ("F64", Ok(bytes)) => f64::from_le_bytes(bytes),
            ("I64", Ok(bytes)) => i64::from_le_bytes(bytes) as f64,
            _ => self.numbers(key, 1)?.first().copied().map_or(f64::NAN, f64::from),
        };
        // Some tools read 0 as "as large as the rank", others as nothing.
        if value.is_finite() && value != 0.0 {
            return Ok(value);
        }
        fail(&self.path, format!("tensor {:?}: an alpha of {value} has no clear meaning", shortened(key)))
    }

    fn bytes(&self, key: &str) -> Result<&[u8]> {
        let range = self.tensors.get(key).map(|tensor| tensor.bytes.clone());
        match range.and_then(|range| self.content.get(range)) {
            Some(bytes) => Ok(bytes),
            None => fail(&self.path, format!("tensor {:?} is missing", shortened(key))),
        }
    }

    /// Its name and digest.
    pub(super) fn origin(&self) -> Origin {
        let file = self.path.file_name().map(|name| shortened(&name.to_string_lossy())).unwrap_or_default();
        Origin { file, sha256: hex(&Sha256::digest(&*self.content)) }
    }
}

const PICKLE: &str = "it is a pickle, which may run any program when it is read: make a safetensors file of it in an \
                      environment that you trust, in Python with \
                      safetensors.torch.save_file(torch.load(FILE, weights_only=True), \"NEW.safetensors\")";

fn is_pickle(path: &Path, content: &[u8]) -> bool {
    // A safetensors header, whatever the file is called.
    if content.get(8) == Some(&b'{') {
        return false;
    }
    let named = path.extension().is_some_and(|e| ["pt", "pth", "ckpt", "bin", "pkl"].iter().any(|p| e == *p));
    // A zip, as torch.save writes since 2020, or pickle's own protocols 2 to 5.
    named || content.starts_with(b"PK\x03\x04") || matches!(content, [0x80, 2..=5, ..])
}
