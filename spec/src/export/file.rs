//! A file for another tool that is written tensor by tensor: B's rows are scattered on the way, so that the memory it
//! takes is that of its header, however large it is.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use crate::adapter::{Adapter, LayerFactors};
use crate::builder::write_atomically_with;
use crate::dtype::Storage;
use crate::error::{Error, Result};
use crate::format::Format;
use crate::{header, limits};

/// A file of an export, ready to be written: nothing in it is wrong any more, and only writing can fail.
pub struct File<'a> {
    name: String,
    /// What precedes the tensors; all of a file without any.
    head: Vec<u8>,
    tensors: Vec<Numbers<'a>>,
}

impl File<'_> {
    /// A text file.
    pub(super) fn text(name: String, text: String) -> Self {
        Self { name, head: text.into(), tensors: Vec::new() }
    }

    /// Its name, in a format of several files its path in their folder, with `/`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How many bytes it has.
    pub fn size(&self) -> u64 {
        self.head.len() as u64 + self.tensors.iter().map(Numbers::size).sum::<u64>()
    }

    /// Writes it, in blocks.
    pub fn write_to(&self, out: impl Write) -> io::Result<()> {
        let mut out = BufWriter::with_capacity(ZEROS.len(), out);
        out.write_all(&self.head)?;
        self.tensors.iter().try_for_each(|numbers| numbers.write_to(&mut out))?;
        out.flush()
    }

    /// Writes it to `path`, as [`write_atomically`](crate::write_atomically).
    pub(super) fn write_at(&self, path: &Path) -> Result<()> {
        write_atomically_with(path, |file| self.write_to(file))
    }
}

/// The tensors of a file to be, and its header's metadata.
#[derive(Default)]
pub(super) struct Draft<'a> {
    tensors: BTreeMap<String, (Storage, Vec<usize>, Numbers<'a>)>,
    pub(super) metadata: BTreeMap<&'static str, String>,
}

impl<'a> Draft<'a> {
    /// Adds a layer's A as it is, under each of `names`.
    pub(super) fn add_a(&mut self, names: &[String], layer: &'a LayerFactors) {
        let shape = vec![layer.rank, layer.columns];
        let numbers = Numbers::Bytes(Cow::Borrowed(layer.bytes_of_a()));
        for name in names {
            self.tensors.insert(name.clone(), (layer.entries[0].dtype, shape.clone(), numbers.clone()));
        }
    }

    /// Adds scale * B, scattered, under each of `names`. A scale other than 1 is folded in f32, which the file then
    /// stores.
    pub(super) fn add_b(&mut self, names: &[String], layer: &'a LayerFactors, scale: f32) {
        let storage = if scale == 1.0 { layer.entries[1].dtype } else { Storage::F32 };
        let shape = vec![layer.outputs, layer.rank];
        for name in names {
            let numbers = Numbers::Scattered { layer, storage, scale };
            self.tensors.insert(name.clone(), (storage, shape.clone(), numbers));
        }
    }

    /// Adds a tensor of f32.
    pub(super) fn add(&mut self, name: String, shape: Vec<usize>, values: &[f32]) {
        let mut bytes = Vec::new();
        Storage::F32.encode(values, &mut bytes);
        self.tensors.insert(name, (Storage::F32, shape, Numbers::Bytes(Cow::Owned(bytes))));
    }

    /// The file. Fails where it would be larger than any adapter may be, which is more than rank 1024 on every Linear of
    /// SD 1.5 takes.
    pub(super) fn file(self, name: String, adapter: &Adapter, format: Format) -> Result<File<'a>> {
        let mut tensors: Vec<_> = self.tensors.into_iter().collect();
        // Wide types first keeps every tensor aligned.
        tensors.sort_by_key(|(_, (storage, ..))| std::cmp::Reverse(storage.size()));
        let entries: Vec<_> = tensors.iter().map(|(name, (storage, shape, _))| (&**name, *storage, &**shape)).collect();
        let head = header::write(adapter.path(), &self.metadata, &entries)?;
        let file = File { name, head, tensors: tensors.into_iter().map(|(_, (.., numbers))| numbers).collect() };
        if file.size() <= limits::FILE_BYTES_MAX {
            return Ok(file);
        }
        let reason = format!("it would have {} bytes, more than an adapter's file may have", file.size());
        Err(Error::Export { path: adapter.path().into(), format: format.title(), reason })
    }
}

/// Where a tensor's bytes come from.
#[derive(Clone)]
enum Numbers<'a> {
    Bytes(Cow<'a, [u8]>),
    Scattered { layer: &'a LayerFactors, storage: Storage, scale: f32 },
}

impl Numbers<'_> {
    fn size(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::Scattered { layer, storage, .. } => (layer.outputs * layer.rank) as u64 * storage.size() as u64,
        }
    }

    fn write_to(&self, out: &mut impl Write) -> io::Result<()> {
        let (layer, storage, scale) = match self {
            Self::Bytes(bytes) => return out.write_all(bytes),
            Self::Scattered { layer, storage, scale } => (layer, *storage, *scale),
        };
        let zero_rows = |out: &mut _, rows: usize| write_zeros(out, (rows * layer.rank * storage.size()) as u64);
        let mut scaled = Vec::new();
        let mut next = 0;
        for (&row, bytes) in layer.rows.iter().zip(layer.bytes_of_b_rows()) {
            zero_rows(out, row as usize - next)?;
            next = row as usize + 1;
            if scale == 1.0 {
                out.write_all(bytes)?;
                continue;
            }
            scaled.clear();
            let values: Vec<f32> = layer.entries[1].dtype.decode(bytes).map(|x| x * scale).collect();
            storage.encode(&values, &mut scaled);
            out.write_all(&scaled)?;
        }
        zero_rows(out, layer.outputs - next)
    }
}

static ZEROS: [u8; 1 << 16] = [0; 1 << 16];

fn write_zeros(out: &mut impl Write, mut count: u64) -> io::Result<()> {
    while count > 0 {
        let now = count.min(ZEROS.len() as u64);
        out.write_all(&ZEROS[..now as usize])?;
        count -= now;
    }
    Ok(())
}
