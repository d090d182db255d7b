//! An adapter's factors in memory, decoded and checked, ready to be merged.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::strategy::{AdapterView, Factors, LayerInfo};
use crate::error::{Error, Result};
use crate::weights::hex;

/// One adapter's factors on one Linear of m outputs and n inputs.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterLayer {
    /// The Linear's name, as in [`LayerInfo`](super::strategy::LayerInfo).
    pub name: String,
    /// Outputs m of the Linear that it was trained on.
    pub outputs: usize,
    /// Inputs n.
    pub columns: usize,
    /// r.
    pub rank: usize,
    /// The owned output rows, ascending.
    pub rows: Vec<u32>,
    /// A, [rank, columns], row-major.
    pub a: Vec<f32>,
    /// The owned rows of B, [rows.len(), rank], row-major.
    pub b: Vec<f32>,
}

/// An adapter: its factors by layer, its scale, and the digest that stands for all of them.
#[derive(Clone, Debug)]
pub struct AdapterFactors {
    name: String,
    digest: String,
    scale: f32,
    /// Sorted by name.
    layers: Vec<AdapterLayer>,
}

impl AdapterFactors {
    /// An adapter made in memory: delta = `scale` * scatter(B, rows) A on each layer. Its digest is a SHA-256 of all
    /// of that. Fails, naming the layer, where shapes do not fit, rows are not ascending or a value is not finite.
    pub fn new(name: impl Into<String>, scale: f32, layers: Vec<AdapterLayer>) -> Result<Self> {
        let mut sha = Sha256::new();
        sha.update(scale.to_le_bytes());
        for layer in &layers {
            sha.update((layer.name.len() as u64).to_le_bytes());
            sha.update(layer.name.as_bytes());
            for size in [layer.outputs, layer.columns, layer.rank, layer.rows.len()] {
                sha.update((size as u64).to_le_bytes());
            }
            sha.update(bytes_of(&layer.rows, |row| row.to_le_bytes()));
            sha.update(bytes_of(&layer.a, |x| x.to_le_bytes()));
            sha.update(bytes_of(&layer.b, |x| x.to_le_bytes()));
        }
        Self::with_digest(name, hex(&sha.finalize()), scale, layers)
    }

    /// As [`new`](Self::new), with the digest of the file that it came from. Equal digests must mean equal factors.
    pub fn with_digest(
        name: impl Into<String>,
        digest: impl Into<String>,
        scale: f32,
        layers: Vec<AdapterLayer>,
    ) -> Result<Self> {
        let (name, digest) = (name.into(), digest.into());
        let incompatible = |reason: String| Error::Incompatible { adapter: name.clone(), reason };
        if !scale.is_finite() {
            return Err(incompatible(format!("its scale is {scale}; it must be finite")));
        }
        let mut layers = layers;
        layers.sort_by(|one, other| one.name.cmp(&other.name));
        for layer in &layers {
            layer.check().map_err(|reason| incompatible(format!("layer {:?}: {reason}", layer.name)))?;
        }
        if let Some(pair) = layers.windows(2).find(|pair| pair[0].name == pair[1].name) {
            return Err(incompatible(format!("layer {:?} is there twice", pair[0].name)));
        }
        Ok(Self { name, digest, scale, layers })
    }

    /// The factors of a file, decoded to f32; its digest is the file's.
    pub fn from_adapter(adapter: &blocklora_spec::Adapter) -> Result<Self> {
        let layers = adapter.layers().iter().map(|layer| AdapterLayer {
            name: layer.name.clone(),
            outputs: layer.outputs,
            columns: layer.columns,
            rank: layer.rank,
            rows: layer.rows.clone(),
            a: layer.a(),
            b: layer.b(),
        });
        Self::with_digest(&adapter.manifest().name, adapter.digest(), adapter.scale(), layers.collect())
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }
    /// SHA-256 in hex of its file, or of its content where it was made in memory. Adapters add up in this order.
    pub fn digest(&self) -> &str {
        &self.digest
    }
    /// The factor of every delta (alpha, or alpha / r, as the file's formula says).
    pub fn scale(&self) -> f32 {
        self.scale
    }
    /// Its layers, sorted by name.
    pub fn layers(&self) -> impl Iterator<Item = &AdapterLayer> {
        self.layers.iter()
    }
    /// Its factors on the Linear `name`, if it changes that one.
    pub fn layer(&self, name: &str) -> Option<&AdapterLayer> {
        self.layers.binary_search_by(|layer| layer.name.as_str().cmp(name)).ok().map(|at| &self.layers[at])
    }
    /// The memory that its factors take, in bytes.
    pub fn bytes(&self) -> usize {
        self.layers().map(|layer| 4 * (layer.rows.len() + layer.a.len() + layer.b.len())).sum()
    }
}

impl AdapterLayer {
    fn check(&self) -> Result<(), String> {
        if self.rank.checked_mul(self.columns) != Some(self.a.len()) {
            return Err(format!("A has {} values, not {} x {}", self.a.len(), self.rank, self.columns));
        }
        if self.rank.checked_mul(self.rows.len()) != Some(self.b.len()) {
            return Err(format!("B has {} values, not {} x {}", self.b.len(), self.rows.len(), self.rank));
        }
        if !self.rows.is_sorted_by(|p, q| p < q) {
            return Err("its rows are not ascending".into());
        }
        if let Some(&row) = self.rows.last().filter(|&&row| row as usize >= self.outputs) {
            return Err(format!("it owns row {row}, but the Linear has {} outputs", self.outputs));
        }
        match self.a.iter().chain(&self.b).find(|x| !x.is_finite()) {
            Some(x) => Err(format!("its factors hold {x}; they must be finite")),
            None => Ok(()),
        }
    }
}

fn bytes_of<T: Copy>(values: &[T], to_bytes: impl Fn(T) -> [u8; 4]) -> Vec<u8> {
    values.iter().flat_map(|&x| to_bytes(x)).collect()
}

/// Which rows of a layer an adapter owns.
pub(super) enum Owned<'a> {
    /// All of these.
    Block(Range<u32>),
    /// These, ascending.
    Scattered(&'a [u32]),
}

impl Owned<'_> {
    /// How many.
    pub fn len(&self) -> usize {
        match self {
            Self::Block(rows) => rows.len(),
            Self::Scattered(rows) => rows.len(),
        }
    }
    /// The `local`-th of them.
    pub fn row(&self, local: usize) -> u32 {
        match self {
            Self::Block(rows) => rows.start + local as u32,
            Self::Scattered(rows) => rows[local],
        }
    }
    /// Which of them lie in `range`.
    pub fn within(&self, range: Range<u32>) -> Range<usize> {
        match self {
            Self::Block(rows) => {
                let local = |row: u32| (row.clamp(rows.start, rows.end) - rows.start) as usize;
                local(range.start)..local(range.end)
            }
            Self::Scattered(rows) => {
                let local = |bound: u32| rows.partition_point(|&row| row < bound);
                local(range.start)..local(range.end)
            }
        }
    }
}

/// Where an adapter's layers are in a model. A merge of many adapters looks at all of them, and has their factors pushed
/// out of the caches before: what it must know of each is small and lies together here.
#[derive(Debug)]
pub(super) struct Place {
    /// By the model's layer index the index of its own layer.
    layers: Box<[Option<u32>]>,
    /// By the model's layer index.
    spans: Box<[Span]>,
}

/// From an adapter's first row in a layer to behind its last one.
#[derive(Clone, Debug, Default)]
struct Span {
    rows: Range<u32>,
    /// All rows in between are its own.
    is_block: bool,
}

impl Place {
    /// `index_of` finds the model's `layers` by name. Fails on a layer that the model lacks or has in another size.
    pub fn new(factors: &AdapterFactors, layers: &[LayerInfo], index_of: &BTreeMap<String, usize>) -> Result<Self> {
        let incompatible = |reason: String| Error::Incompatible { adapter: factors.name().to_owned(), reason };
        let (mut own, mut spans) = (vec![None; layers.len()], vec![Span::default(); layers.len()]);
        for (at, layer) in factors.layers().enumerate() {
            let &index = index_of.get(&layer.name).ok_or_else(|| {
                incompatible(format!(
                    "layer {:?} is not in this model; use the base model that the adapter was trained on",
                    layer.name
                ))
            })?;
            let LayerInfo { rows, columns, .. } = layers[index];
            if (layer.outputs, layer.columns) != (rows, columns) {
                return Err(incompatible(format!(
                    "layer {:?} is {} x {} in the adapter and {rows} x {columns} in this model; use the base model \
                     that the adapter was trained on",
                    layer.name, layer.outputs, layer.columns
                )));
            }
            own[index] = Some(at as u32);
            if let (Some(first), Some(last)) = (layer.rows.first(), layer.rows.last()) {
                let rows = *first..last + 1;
                spans[index] = Span { is_block: rows.len() == layer.rows.len(), rows };
            }
        }
        Ok(Self { layers: own.into(), spans: spans.into() })
    }
}

/// An adapter placed on a model, with the caller's weight.
#[derive(Clone, Debug)]
pub(super) struct Placed {
    pub factors: Arc<AdapterFactors>,
    pub weight: f32,
    place: Arc<Place>,
}

impl Placed {
    /// Fails unless `weight` is finite.
    pub fn new(factors: Arc<AdapterFactors>, place: Arc<Place>, weight: f32) -> Result<Self> {
        if !weight.is_finite() {
            let reason = format!("its weight is {weight}; it must be finite");
            return Err(Error::Incompatible { adapter: factors.name().to_owned(), reason });
        }
        Ok(Self { factors, weight, place })
    }

    /// From its first row on the model's layer `index` to behind its last one; empty if it has none.
    pub fn span(&self, index: usize) -> Range<u32> {
        self.place.spans.get(index).map_or(0..0, |span| span.rows.clone())
    }

    /// The rows that it owns of the model's layer `index`.
    pub fn owned(&self, index: usize) -> Owned<'_> {
        match self.place.spans.get(index) {
            Some(Span { rows, is_block: false }) if !rows.is_empty() => {
                Owned::Scattered(self.layer(index).map_or(&[], |layer| &layer.rows))
            }
            _ => Owned::Block(self.span(index)),
        }
    }

    /// Which of its own layers the model's layer `index` is.
    pub fn own_index(&self, index: usize) -> Option<usize> {
        self.place.layers.get(index).copied().flatten().map(|at| at as usize)
    }

    /// Its factors on the model's layer `index`.
    pub fn layer(&self, index: usize) -> Option<&AdapterLayer> {
        self.own_index(index).map(|at| &self.factors.layers[at])
    }
}

impl AdapterView for Placed {
    fn name(&self) -> &str {
        self.factors.name()
    }
    fn digest(&self) -> &str {
        self.factors.digest()
    }
    fn weight(&self) -> f32 {
        self.weight
    }
    fn changes(&self, layer: usize) -> bool {
        self.own_index(layer).is_some()
    }
    fn factors(&self, layer: usize) -> Option<Factors<'_>> {
        self.layer(layer).map(|found| Factors {
            a: &found.a,
            b: &found.b,
            rows: &found.rows,
            rank: found.rank,
            scale: self.factors.scale(),
        })
    }
}
