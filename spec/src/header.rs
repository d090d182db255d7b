//! The safetensors container, read without trusting it: 8 bytes of length, a JSON header, and tensors that fill the
//! rest of the file without gap or overlap.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::adapter::KEY_SPEC;
use crate::dtype::Storage;
use crate::error::{Error, Result, excerpt, shortened};
use crate::import::recognise;
use crate::{json, limits};

/// One tensor's place in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) dtype: Storage,
    /// Rows and columns, both at least 1.
    pub(crate) shape: [usize; 2],
    /// Its bytes in the file.
    pub(crate) bytes: Range<usize>,
}

/// A checked header: every range lies in the file, is aligned, and has the length that shape and type ask for.
#[derive(Debug)]
pub(crate) struct Header {
    pub(crate) metadata: BTreeMap<String, String>,
    pub(crate) tensors: BTreeMap<String, Entry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RawEntry {
    pub(crate) dtype: String,
    pub(crate) shape: Vec<u64>,
    pub(crate) data_offsets: [u64; 2],
}

/// A tensor to be written: name, type, shape.
pub(crate) type Tensor<'a> = (&'a str, Storage, &'a [usize]);

/// What precedes these tensors, one after the other, in a file: the header's length and the header. The order of keys
/// does not depend on how serde_json is built. `path` names the file in errors.
pub(crate) fn write(path: &Path, metadata: &BTreeMap<&str, String>, tensors: &[Tensor<'_>]) -> Result<Vec<u8>> {
    #[derive(Serialize)]
    struct NewEntry<'a> {
        dtype: &'a str,
        shape: &'a [usize],
        data_offsets: [u64; 2],
    }
    #[derive(Serialize)]
    struct NewHeader<'a> {
        #[serde(rename = "__metadata__")]
        metadata: &'a BTreeMap<&'a str, String>,
        #[serde(flatten)]
        tensors: BTreeMap<&'a str, NewEntry<'a>>,
    }
    let mut end = 0;
    let entries = tensors.iter().map(|&(name, dtype, shape)| {
        let begin = end;
        end += shape.iter().product::<usize>() as u64 * dtype.size() as u64;
        (name, NewEntry { dtype: dtype.name(), shape, data_offsets: [begin, end] })
    });
    let header = NewHeader { metadata, tensors: entries.collect() };
    let mut text = serde_json::to_vec(&header).map_err(|e| Error::Json {
        path: path.into(),
        part: "header",
        reason: e.to_string(),
    })?;
    text.resize(text.len().next_multiple_of(8), b' ');
    Ok([&(text.len() as u64).to_le_bytes(), text.as_slice()].concat())
}

/// A header's parts, as far as all safetensors files have them.
pub(crate) struct Parts {
    pub(crate) metadata: BTreeMap<String, String>,
    pub(crate) entries: BTreeMap<String, Value>,
    /// Where the data section begins.
    pub(crate) base: usize,
}

/// Takes the header of `file`, the whole content of `path`, apart. `padded`: its length must be a multiple of 8.
pub(crate) fn parts(path: &Path, file: &[u8], padded: bool) -> Result<Parts> {
    let truncated = |what: &str, needed: u64| Error::Truncated {
        path: path.into(),
        what: what.into(),
        needed,
        actual: file.len() as u64,
    };
    let Some((&length, rest)) = file.split_first_chunk::<8>() else {
        return Err(truncated("the header's length", 8));
    };
    let length = u64::from_le_bytes(length);
    if length > limits::HEADER_BYTES_MAX {
        return Err(Error::HeaderTooLarge { path: path.into(), claimed: length, limit: limits::HEADER_BYTES_MAX });
    }
    let Some((text, _)) = rest.split_at_checked(length as usize) else {
        return Err(truncated("the header", 8 + length));
    };
    if padded && !length.is_multiple_of(8) {
        return Err(Error::HeaderMisaligned { path: path.into(), length });
    }
    let invalid = |reason: String| Error::Json { path: path.into(), part: "header", reason };
    if text.first() != Some(&b'{') {
        return Err(invalid("does not begin with '{': this is not a safetensors file".into()));
    }
    // JSON knows more white space, and a reader that looks for the last '}' must find it where all others do.
    let end = text.iter().rposition(|b| *b != b' ').unwrap_or(0);
    if matches!(text[end], b'\t' | b'\n' | b'\r') {
        return Err(invalid("is padded with something other than spaces; pad it with spaces".into()));
    }
    json::check(path, "header", text, limits::HEADER_DEPTH_MAX)?;
    let mut entries: BTreeMap<String, Value> =
        serde_json::from_slice(text).map_err(|e| invalid(excerpt(&e.to_string())))?;
    let metadata = match entries.remove("__metadata__") {
        Some(value) => serde_json::from_value(value).map_err(|e| invalid(excerpt(&format!("__metadata__: {e}"))))?,
        None => BTreeMap::<String, String>::new(),
    };
    Ok(Parts { metadata, entries, base: 8 + length as usize })
}

/// Reads and checks the header of `file`, the whole content of `path`.
pub(crate) fn read(path: &Path, file: &[u8]) -> Result<Header> {
    let Parts { metadata, entries, base } = parts(path, file, true)?;
    // Other programs' files are told from damaged ones of ours.
    if !metadata.contains_key(KEY_SPEC) {
        return Err(match recognise(entries.keys().map(String::as_str)) {
            Some(what) => Error::Foreign { path: path.into(), what },
            None => Error::MissingMetadata { path: path.into(), key: KEY_SPEC },
        });
    }
    let data_len = file.len() - base;
    let mut tensors = BTreeMap::new();
    for (name, entry) in entries {
        let entry = check_entry(path, &name, entry, base, data_len as u64)?;
        tensors.insert(name, entry);
    }
    check_cover(path, &tensors, base, data_len)?;
    Ok(Header { metadata, tensors })
}

fn check_entry(path: &Path, name: &str, raw: Value, base: usize, data_len: u64) -> Result<Entry> {
    if name.len() > limits::TENSOR_NAME_BYTES_MAX {
        let reason = format!("the name is longer than {} bytes", limits::TENSOR_NAME_BYTES_MAX);
        return Err(Error::TensorName { path: path.into(), tensor: shortened(name), reason });
    }
    let entry = |reason: String| Error::TensorEntry { path: path.into(), tensor: name.into(), reason };
    if !raw.is_object() {
        // serde would take an array of the fields' values, too.
        return Err(entry("must be an object".into()));
    }
    let raw: RawEntry = serde_json::from_value(raw).map_err(|e| entry(excerpt(&e.to_string())))?;
    let [begin, end] = raw.data_offsets;
    let offsets =
        |reason: String| Error::Offsets { path: path.into(), tensor: name.into(), offsets: [begin, end], reason };
    let shape = |reason: &str| Error::Shape {
        path: path.into(),
        tensor: name.into(),
        shape: raw.shape.iter().copied().take(8).collect(),
        reason: reason.into(),
    };
    let Some(dtype) = Storage::from_name(&raw.dtype) else {
        return Err(Error::Dtype { path: path.into(), tensor: name.into(), dtype: shortened(&raw.dtype) });
    };
    let &[rows, columns] = raw.shape.as_slice() else {
        return Err(shape("must have two dimensions"));
    };
    if rows == 0 || columns == 0 {
        return Err(shape("has no elements; leave the tensor out"));
    }
    let needed = rows.checked_mul(columns).and_then(|n| n.checked_mul(dtype.size() as u64));
    let needed = needed.ok_or_else(|| shape("its size overflows"))?;
    if begin > end {
        return Err(offsets("end before they begin".into()));
    }
    if end > data_len {
        return Err(Error::Truncated {
            path: path.into(),
            what: format!("tensor {name:?}"),
            needed: end.saturating_add(base as u64),
            actual: data_len + base as u64,
        });
    }
    if end - begin != needed {
        return Err(offsets(format!("span {} bytes, shape and type need {needed}", end - begin)));
    }
    if !begin.is_multiple_of(dtype.size() as u64) {
        return Err(offsets(format!("not aligned to the {} bytes of {}", dtype.size(), dtype.name())));
    }
    // All of them are at most the file's length, which a usize holds.
    let shape = [rows as usize, columns as usize];
    Ok(Entry { dtype, shape, bytes: base + begin as usize..base + end as usize })
}

/// Fails unless the tensors cover the data section exactly once.
fn check_cover(path: &Path, tensors: &BTreeMap<String, Entry>, base: usize, data_len: usize) -> Result<()> {
    let mut ordered: Vec<(&String, &Entry)> = tensors.iter().collect();
    ordered.sort_by_key(|(_, entry)| (entry.bytes.start, entry.bytes.end));
    let hole = |begin: usize, end: usize| Error::Hole {
        path: path.into(),
        begin: (begin - base) as u64,
        end: (end - base) as u64,
    };
    let mut covered = base;
    let mut last = "";
    for (name, entry) in ordered {
        if entry.bytes.start < covered {
            return Err(Error::Overlap { path: path.into(), first: last.into(), second: name.clone() });
        }
        if entry.bytes.start > covered {
            return Err(hole(covered, entry.bytes.start));
        }
        (covered, last) = (entry.bytes.end, name);
    }
    if covered == base + data_len { Ok(()) } else { Err(hole(covered, base + data_len)) }
}
