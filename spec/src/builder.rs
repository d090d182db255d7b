//! Writing adapters: the same content gives the same bytes, and no reader ever sees half a file.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write as _;
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::VERSION;
use crate::adapter::{Adapter, KEY_MANIFEST, KEY_MANIFEST_DIGEST, KEY_SPEC, TokenVectors, hex};
use crate::dtype::Storage;
use crate::error::{Error, Result};
use crate::header;
use crate::limits;
use crate::manifest::{Fault, Manifest};

/// One layer's factors to be written.
#[derive(Clone, Copy, Debug)]
pub struct Layer<'a> {
    /// Its module path with its part in front: `unet.down_blocks.0...to_q`.
    pub name: &'a str,
    /// Outputs m of the layer.
    pub outputs: usize,
    /// A, [rank, inputs], row-major.
    pub a: &'a [f32],
    /// The owned rows of B, [rows, rank], row-major. Empty where the slot owns no row: nothing is stored then.
    pub b: &'a [f32],
}

/// Collects an adapter's tensors and writes them.
///
/// The manifest's `outputs` and `tensor_digest` are computed, whatever they were. Shapes are checked when writing:
/// what is written has passed the reader's own checks.
#[derive(Clone, Debug)]
pub struct AdapterBuilder {
    manifest: Manifest,
    storage: Storage,
    tensors: BTreeMap<String, ([usize; 2], Vec<u8>)>,
}

impl AdapterBuilder {
    /// An adapter with this manifest, its numbers stored as `storage`.
    pub fn new(manifest: &Manifest, storage: Storage) -> Self {
        let manifest = Manifest { outputs: BTreeMap::new(), ..manifest.clone() };
        Self { manifest, storage, tensors: BTreeMap::new() }
    }

    /// Adds a layer's factors, rounding them to the storage type.
    pub fn layer(mut self, layer: Layer<'_>) -> Self {
        let Layer { name, outputs, a, b } = layer;
        let rank = self.manifest.rank.max(1);
        self.manifest.outputs.insert(name.to_owned(), outputs);
        if !(b.is_empty() && self.manifest.partition.is_some_and(|p| p.count(outputs) == 0)) {
            self.insert(format!("{name}.lora_A"), [rank, a.len() / rank], a);
            self.insert(format!("{name}.lora_B"), [b.len() / rank, rank], b);
        }
        self
    }

    /// Adds a token's vectors, rounding them to the storage type. The manifest must list the token.
    pub fn token(mut self, token: &TokenVectors) -> Self {
        self.insert(format!("tokens.{}", token.name), [token.layers, token.width], &token.values);
        self
    }

    fn insert(&mut self, name: String, shape: [usize; 2], values: &[f32]) {
        let mut bytes = Vec::with_capacity(values.len() * self.storage.size());
        self.storage.encode(values, &mut bytes);
        self.tensors.insert(name, (shape, bytes));
    }

    /// The file's bytes, which depend on nothing but what was added. `path` names them in errors.
    pub fn to_bytes(&self, path: impl AsRef<Path>) -> Result<Vec<u8>> {
        let path = path.as_ref();
        let numbers: u64 = self.tensors.values().map(|(_, bytes)| bytes.len() as u64).sum();
        // With room for the header; a larger file could not be opened.
        if numbers > limits::FILE_BYTES_MAX - limits::HEADER_BYTES_MAX {
            return Err(Error::FileTooLarge { path: path.into(), bytes: numbers, limit: limits::FILE_BYTES_MAX });
        }
        let mut manifest = self.manifest.clone();
        let mut hasher = Sha256::new();
        let mut tensors = Vec::new();
        for (name, (shape, bytes)) in &self.tensors {
            let [rows, columns] = shape;
            let elements = bytes.len() / self.storage.size();
            if rows.checked_mul(*columns) != Some(elements) {
                return Err(Error::Shape {
                    path: path.into(),
                    tensor: name.clone(),
                    shape: vec![*rows as u64, *columns as u64],
                    reason: format!("{elements} numbers were given"),
                });
            }
            hasher.update(format!("{name} {} {rows},{columns}\n", self.storage.name()));
            hasher.update(bytes);
            tensors.push((name.as_str(), self.storage, shape.as_slice()));
        }
        manifest.tensor_digest = hex(&hasher.finalize());
        // Before it becomes JSON, which has no way to write the NaN that the reader would complain about.
        manifest.validate().map_err(|Fault { field, reason }| Error::Field { path: path.into(), field, reason })?;
        let json_error =
            |e: serde_json::Error| Error::Json { path: path.into(), part: "manifest", reason: e.to_string() };
        let text = serde_json::to_string(&manifest).map_err(json_error)?;
        let metadata = BTreeMap::from([
            (KEY_SPEC, VERSION.to_owned()),
            (KEY_MANIFEST_DIGEST, hex(&Sha256::digest(&text))),
            (KEY_MANIFEST, text),
        ]);
        let mut bytes = header::write(path, &metadata, &tensors)?;
        self.tensors.values().for_each(|(_, numbers)| bytes.extend_from_slice(numbers));
        Adapter::from_bytes(path, bytes.clone())?;
        Ok(bytes)
    }

    /// Writes the adapter to `path` by temporary file, fsync and rename, replacing what is there; returns the file's
    /// SHA-256 digest. Nothing is written if the adapter is not valid.
    pub fn write(&self, path: impl AsRef<Path>) -> Result<String> {
        let path = path.as_ref();
        let bytes = self.to_bytes(path)?;
        write_atomically(path, &bytes)?;
        Ok(hex(&Sha256::digest(&bytes)))
    }
}

/// Writes an adapter in one call; see [`AdapterBuilder`].
pub fn write(
    path: impl AsRef<Path>,
    manifest: &Manifest,
    storage: Storage,
    layers: &[Layer<'_>],
    tokens: &[TokenVectors],
) -> Result<String> {
    let builder = layers.iter().fold(AdapterBuilder::new(manifest, storage), |b, layer| b.layer(*layer));
    tokens.iter().fold(builder, |b, token| b.token(token)).write(path)
}

/// Writes `bytes` to `path` so that a reader, also after a crash, sees the old file or the new one and nothing else:
/// temporary file in the same folder, fsync, rename, fsync of the folder. On an error `path` is as it was.
pub fn write_atomically(path: impl AsRef<Path>, bytes: &[u8]) -> Result<()> {
    write_atomically_with(path.as_ref(), |file| file.write_all(bytes))
}

/// As [`write_atomically`], with what `write` writes.
pub(crate) fn write_atomically_with(path: &Path, write: impl FnOnce(&mut File) -> std::io::Result<()>) -> Result<()> {
    let io = |e| Error::io(path, e);
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut options = tempfile::Builder::new();
    options.prefix(".blocklora-").suffix(".tmp");
    #[cfg(unix)]
    {
        // The umask decides, as it does for any file that a program creates; the crate's default is private.
        use std::os::unix::fs::PermissionsExt as _;
        options.permissions(std::fs::Permissions::from_mode(0o666));
    }
    let mut file = options.tempfile_in(folder).map_err(io)?;
    write(file.as_file_mut()).map_err(io)?;
    file.as_file().sync_all().map_err(io)?;
    file.persist(path).map_err(|e| io(e.error))?;
    #[cfg(unix)]
    File::open(folder).and_then(|f| f.sync_all()).map_err(io)?;
    Ok(())
}
