//! A validated adapter file.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha2::{Digest, Sha256};

use crate::error::{Error, Result, excerpt, shortened};
use crate::header::{self, Entry, Header};
use crate::manifest::{Fault, Manifest, is_name, layer_name_fault};
use crate::map::Content;
use crate::{VERSION, json, limits};

pub(crate) const KEY_SPEC: &str = "blocklora.spec";
pub(crate) const KEY_MANIFEST: &str = "blocklora.manifest";
pub(crate) const KEY_MANIFEST_DIGEST: &str = "blocklora.manifest_digest";
const KEYS: [&str; 3] = [KEY_SPEC, KEY_MANIFEST, KEY_MANIFEST_DIGEST];

/// A concept's adapter: manifest, factors and tokens of a file that has been checked from end to end.
#[derive(Clone)]
pub struct Adapter {
    path: PathBuf,
    digest: String,
    manifest: Manifest,
    layers: Vec<LayerFactors>,
    tokens: Vec<TokenVectors>,
}

/// The factors of one layer. The numbers stay in the mapped file until [`a`](Self::a) and [`b`](Self::b) decode them.
#[derive(Clone)]
pub struct LayerFactors {
    /// The layer's module path with its part in front: `unet.down_blocks.0...to_q`.
    pub name: String,
    /// Outputs m of the layer.
    pub outputs: usize,
    /// Inputs n of the layer.
    pub columns: usize,
    /// The rank r.
    pub rank: usize,
    /// The output rows that the adapter owns, ascending; all of 0..m without a partition. Never empty.
    pub rows: Vec<u32>,
    content: Arc<Content>,
    pub(crate) entries: [Entry; 2],
}

impl LayerFactors {
    /// A, [rank, columns], row-major.
    pub fn a(&self) -> Vec<f32> {
        decode(&self.content, &self.entries[0])
    }
    /// The owned rows of B, [rows.len(), rank], row-major: B's row k belongs to output `rows[k]`.
    pub fn b(&self) -> Vec<f32> {
        decode(&self.content, &self.entries[1])
    }
    /// A's bytes as they are stored.
    pub(crate) fn bytes_of_a(&self) -> &[u8] {
        &self.content[self.entries[0].bytes.clone()]
    }
    /// The bytes of B's rows as they are stored, in the order of `rows`.
    pub(crate) fn bytes_of_b_rows(&self) -> impl Iterator<Item = &[u8]> {
        let entry = &self.entries[1];
        self.content[entry.bytes.clone()].chunks_exact(self.rank * entry.dtype.size())
    }
    /// B scattered to all outputs, [outputs, rank], row-major, zero in the rows that are not owned.
    pub fn b_scattered(&self) -> Vec<f32> {
        let mut full = vec![0.0; self.outputs * self.rank];
        for (row, values) in self.rows.iter().zip(self.b().chunks_exact(self.rank)) {
            full[*row as usize * self.rank..][..self.rank].copy_from_slice(values);
        }
        full
    }
}

impl std::fmt::Debug for LayerFactors {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { name, outputs, columns, rank, rows, .. } = self;
        write!(f, "LayerFactors({name}, {outputs}x{columns}, rank {rank}, {} rows)", rows.len())
    }
}

/// The vectors of one token.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenVectors {
    /// Its name.
    pub name: String,
    /// How many vectors: one per cross-attention layer in forward order, or 1.
    pub layers: usize,
    /// Elements d of a vector.
    pub width: usize,
    /// The vectors, [layers, width], row-major.
    pub values: Vec<f32>,
}

impl Adapter {
    /// Maps the file `path` and checks everything in it: structure, manifest, shapes, owned rows, digests, and that
    /// every number is finite. The error names file, tensor or field, and reason.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let io = |e| Error::io(path, e);
        let meta = std::fs::metadata(path).map_err(io)?;
        if !meta.is_file() {
            return Err(Error::NotAFile { path: path.into() });
        }
        let file = File::open(path).map_err(io)?;
        let bytes = file.metadata().map_err(io)?.len();
        if bytes > limits::FILE_BYTES_MAX {
            return Err(Error::FileTooLarge { path: path.into(), bytes, limit: limits::FILE_BYTES_MAX });
        }
        Self::read(path, Content::map(&file).map_err(io)?)
    }

    /// As [`open`](Self::open), on bytes that the caller has; `path` only names them in errors.
    pub fn from_bytes(path: impl AsRef<Path>, bytes: Vec<u8>) -> Result<Self> {
        Self::read(path.as_ref(), Content::Bytes(bytes))
    }

    fn read(path: &Path, content: Content) -> Result<Self> {
        let header = header::read(path, &content)?;
        let manifest = read_manifest(path, &header)?;
        check_names(path, &manifest, &header)?;
        let digest = hex(&Sha256::digest(&*content));
        let actual = check_numbers(path, &content, &header)?;
        if actual != manifest.tensor_digest {
            let expected = manifest.tensor_digest;
            return Err(Error::Digest { path: path.into(), part: "tensors", expected, actual });
        }
        let content = Arc::new(content);
        let layers = read_layers(path, &content, &manifest, &header)?;
        let tokens = read_tokens(path, &content, &manifest, &header)?;
        Ok(Self { path: path.into(), digest, manifest, layers, tokens })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }
    /// SHA-256 of the whole file, in lower-case hex: the adapter's identity.
    pub fn digest(&self) -> &str {
        &self.digest
    }
    /// The manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }
    /// The factors of every layer that the adapter changes, sorted by name.
    pub fn layers(&self) -> &[LayerFactors] {
        &self.layers
    }
    /// The tokens, in the manifest's order.
    pub fn tokens(&self) -> &[TokenVectors] {
        &self.tokens
    }
    /// The factor of B A in a layer's change: alpha or alpha / r, as the manifest's formula says.
    pub fn scale(&self) -> f32 {
        self.manifest.scale()
    }
}

impl std::fmt::Debug for Adapter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Adapter({}, {} layers, {:?})", self.path.display(), self.layers.len(), self.manifest)
    }
}

fn read_manifest(path: &Path, header: &Header) -> Result<Manifest> {
    let entry = |key: &'static str| header.metadata.get(key).ok_or(Error::MissingMetadata { path: path.into(), key });
    let version = entry(KEY_SPEC)?;
    if version != VERSION {
        return Err(Error::UnknownVersion { path: path.into(), version: shortened(version), known: VERSION });
    }
    if let Some(key) = header.metadata.keys().find(|key| !KEYS.contains(&key.as_str())) {
        return Err(Error::UnknownMetadata { path: path.into(), key: shortened(key) });
    }
    let text = entry(KEY_MANIFEST)?;
    json::check(path, "manifest", text.as_bytes(), limits::MANIFEST_DEPTH_MAX)?;
    if let Some((field, reason)) = lenient_form(text) {
        return Err(Error::Field { path: path.into(), field, reason: reason.into() });
    }
    let mut reader = serde_json::Deserializer::from_str(text);
    let manifest: Manifest = serde_path_to_error::deserialize(&mut reader).map_err(|e| {
        let (path, reason) = (path.into(), excerpt(&e.inner().to_string()));
        match e.path().to_string().as_str() {
            "." => Error::Json { path, part: "manifest", reason },
            field => Error::Field { path, field: excerpt(field), reason },
        }
    })?;
    manifest.validate().map_err(|Fault { field, reason }| Error::Field { path: path.into(), field, reason })?;
    let (expected, actual) = (entry(KEY_MANIFEST_DIGEST)?, hex(&Sha256::digest(text)));
    if *expected != actual {
        return Err(Error::Digest { path: path.into(), part: "manifest", expected: excerpt(expected), actual });
    }
    Ok(manifest)
}

/// The first field of the manifest `text` in a form that serde's derived readers take and other readers do not: an
/// array of the fields' values for an object, or an object with one key for a choice of words.
fn lenient_form(text: &str) -> Option<(String, &'static str)> {
    let manifest: serde_json::Value = serde_json::from_str(text).ok()?;
    let tokens = manifest.get("tokens").and_then(serde_json::Value::as_array).map_or(0, Vec::len);
    let objects = ["", "/base", "/algorithm", "/partition", "/training"].map(str::to_owned).into_iter();
    for at in objects.chain((0..tokens).map(|i| format!("/tokens/{i}"))) {
        if manifest.pointer(&at).is_some_and(serde_json::Value::is_array) {
            let field = if at.is_empty() { "all of it".into() } else { at[1..].replace('/', ".") };
            return Some((field, "must be an object, not an array"));
        }
    }
    let words = ["/kind", "/delta", "/partition/scheme"].into_iter();
    let mut lenient = words.filter(|at| manifest.pointer(at).is_some_and(serde_json::Value::is_object));
    lenient.next().map(|at| (at[1..].replace('/', "."), "must be a string, not an object"))
}

/// Fails unless the file has exactly the tensors that the manifest announces.
fn check_names(path: &Path, manifest: &Manifest, header: &Header) -> Result<()> {
    if header.tensors.is_empty() {
        return Err(Error::Empty { path: path.into() });
    }
    let tensor = |name: &str, reason: &str| Error::UnknownTensor {
        path: path.into(),
        tensor: name.into(),
        reason: reason.into(),
    };
    for name in header.tensors.keys() {
        let bad = |reason: &str| Error::TensorName { path: path.into(), tensor: name.clone(), reason: reason.into() };
        if let Some(token) = name.strip_prefix("tokens.") {
            if !is_name(token) {
                return Err(bad("not a token's name"));
            }
            if !manifest.tokens.iter().any(|t| t.name == token) {
                return Err(tensor(name, "the manifest's tokens do not list it"));
            }
            continue;
        }
        let Some(layer) = name.strip_suffix(".lora_A").or_else(|| name.strip_suffix(".lora_B")) else {
            return Err(bad("must be tokens.<name>, <layer>.lora_A or <layer>.lora_B"));
        };
        if let Some(reason) = layer_name_fault(layer) {
            return Err(bad(reason));
        }
        match manifest.outputs.get(layer) {
            None => return Err(tensor(name, "the manifest's outputs do not list the layer")),
            Some(&m) if manifest.row_count(m) == 0 => {
                return Err(tensor(name, &format!("the slot owns none of the layer's {m} rows")));
            }
            Some(_) => {}
        }
    }
    Ok(())
}

/// Checks that every number is finite and computes the digest of the tensors: SHA-256 over, for each tensor in the
/// order of names, the line `<name> <type> <rows>,<columns>\n` and the tensor's bytes.
fn check_numbers(path: &Path, content: &Content, header: &Header) -> Result<String> {
    let mut hasher = Sha256::new();
    for (name, entry) in &header.tensors {
        let bytes = &content[entry.bytes.clone()];
        if let Some((index, value)) = entry.dtype.decode(bytes).enumerate().find(|(_, x)| !x.is_finite()) {
            return Err(Error::NotFinite { path: path.into(), tensor: name.clone(), index, value });
        }
        let [rows, columns] = entry.shape;
        hasher.update(format!("{name} {} {rows},{columns}\n", entry.dtype.name()));
        hasher.update(bytes);
    }
    Ok(hex(&hasher.finalize()))
}

/// The tensor `name`, or an error that says what asks for it.
fn entry<'a>(path: &Path, header: &'a Header, name: &str, reason: impl FnOnce() -> String) -> Result<&'a Entry> {
    header.tensors.get(name).ok_or_else(|| Error::MissingTensor {
        path: path.into(),
        tensor: name.into(),
        reason: reason(),
    })
}

fn shape_error(path: &Path, tensor: &str, entry: &Entry, reason: String) -> Error {
    Error::Shape { path: path.into(), tensor: tensor.into(), shape: entry.shape.map(|d| d as u64).into(), reason }
}

fn read_layers(path: &Path, content: &Arc<Content>, manifest: &Manifest, header: &Header) -> Result<Vec<LayerFactors>> {
    // Rows depend on m alone, and a permutation is worth making once.
    let mut rows_of: BTreeMap<usize, Vec<u32>> = BTreeMap::new();
    let mut layers = Vec::new();
    for (name, &outputs) in &manifest.outputs {
        let count = manifest.row_count(outputs);
        if count == 0 {
            continue;
        }
        let (name_a, name_b) = (format!("{name}.lora_A"), format!("{name}.lora_B"));
        let asks = || format!("the manifest's outputs list {name:?}");
        let a = entry(path, header, &name_a, asks)?;
        let b = entry(path, header, &name_b, asks)?;
        let rank = manifest.rank;
        if a.shape[0] != rank {
            let reason = format!("lora_A is [rank, inputs], and the manifest's rank is {rank}");
            return Err(shape_error(path, &name_a, a, reason));
        }
        if a.shape[1] > limits::LAYER_WIDTH_MAX {
            return Err(shape_error(path, &name_a, a, format!("more than {} inputs", limits::LAYER_WIDTH_MAX)));
        }
        if b.shape != [count, rank] {
            let owner = match manifest.partition {
                Some(p) => format!("slot {} of {} owns {count} of the {outputs} rows", p.slot, p.capacity),
                None => format!("without a partition it owns all {outputs} rows"),
            };
            return Err(shape_error(path, &name_b, b, format!("must be [{count}, {rank}]: {owner}")));
        }
        let rows = rows_of.entry(outputs).or_insert_with(|| manifest.rows(outputs)).clone();
        layers.push(LayerFactors {
            name: name.clone(),
            outputs,
            columns: a.shape[1],
            rank,
            rows,
            content: content.clone(),
            entries: [a.clone(), b.clone()],
        });
    }
    Ok(layers)
}

fn read_tokens(path: &Path, content: &Content, manifest: &Manifest, header: &Header) -> Result<Vec<TokenVectors>> {
    let mut tokens: Vec<TokenVectors> = Vec::new();
    for token in &manifest.tokens {
        let name = format!("tokens.{}", token.name);
        let entry = entry(path, header, &name, || "the manifest's tokens list it".into())?;
        let [layers, width] = entry.shape;
        if layers != token.vectors {
            let reason = format!("the manifest gives the token {} vectors", token.vectors);
            return Err(shape_error(path, &name, entry, reason));
        }
        if let Some(first) = tokens.first().filter(|first| first.width != width) {
            let reason = format!("token {:?} has vectors of {} elements; all must agree", first.name, first.width);
            return Err(shape_error(path, &name, entry, reason));
        }
        tokens.push(TokenVectors { name: token.name.clone(), layers, width, values: decode(content, entry) });
    }
    Ok(tokens)
}

fn decode(content: &Content, entry: &Entry) -> Vec<f32> {
    entry.dtype.decode(&content[entry.bytes.clone()]).collect()
}

/// Lower-case hexadecimal of `bytes`.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, b| {
        let _ = write!(text, "{b:02x}");
        text
    })
}
