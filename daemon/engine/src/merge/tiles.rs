//! Rows to write as the kernel of a card takes them (`kernels/merge.cu`): tiles of rows that take the same adapters, with
//! addresses instead of references.

use super::composition::{Composition, RowTerms};

/// The most rows of a tile.
pub(super) const ROWS: usize = 8;

/// Rows of one matrix that take the same adapters; `kernels/merge.cu` has the same structure.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Tile {
    /// Where the matrix as in the file begins,
    pub pristine: u64,
    /// and the live one.
    pub live: u64,
    pub columns: u32,
    /// 1 to [`ROWS`].
    pub rows: u32,
    /// In [`Tiles::rows`].
    pub first_row: u32,
    /// In [`Tiles::a`].
    pub first_a: u32,
    /// Rows of A; none: the rows get the file's values.
    pub terms: u32,
    /// In [`Tiles::w`].
    pub first_w: u32,
}

/// Tiles of any number of layers.
#[derive(Debug, Default)]
pub(super) struct Tiles {
    pub tiles: Vec<Tile>,
    /// Numbers of rows in their matrix.
    pub rows: Vec<u32>,
    /// Of each layer its index, and where its rows begin; these ascend.
    layers: Vec<(usize, usize)>,
    /// Where rows of A begin.
    pub a: Vec<u64>,
    /// c_ip * scale_i * B_i[p, k]: [`ROWS`] of them for each of `a`.
    pub w: Vec<f32>,
}

/// Where a layer's matrices begin.
#[derive(Clone, Copy, Debug)]
pub(super) struct Matrices {
    pub pristine: u64,
    pub live: u64,
    pub columns: usize,
}

impl Tiles {
    /// The rows of layer `index` as `composition` has them; `starts` by adapter and by its own layers: where A begins.
    pub fn of_layer<S: AsRef<[u64]>>(
        composition: &Composition,
        index: usize,
        terms: &RowTerms,
        matrices: Matrices,
        starts: &[S],
    ) -> Self {
        let count = terms.rows.len();
        let mut tiles = Self {
            tiles: Vec::with_capacity(count.div_ceil(ROWS)),
            rows: terms.rows.clone(),
            layers: vec![(index, 0)],
            a: Vec::with_capacity(terms.all().len()),
            w: Vec::with_capacity(terms.all().len() * ROWS),
        };
        let Matrices { pristine, live, columns } = matrices;
        let mut first = 0;
        while first < count {
            let same = (first + 1..count.min(first + ROWS)).take_while(|&row| terms.alike(first, row)).count();
            let rows = first..first + 1 + same;
            first = rows.end;
            let (first_a, first_w) = (tiles.a.len(), tiles.w.len());
            for (at, term) in terms.of(rows.start).iter().enumerate() {
                let placed = &composition.adapters()[term.adapter as usize];
                let (Some(own), Some(layer)) = (placed.own_index(index), placed.layer(index)) else { continue };
                let a = starts[term.adapter as usize].as_ref()[own];
                tiles.a.extend((0..layer.rank).map(|k| a + (k * columns * size_of::<f32>()) as u64));
                let these = tiles.w.len();
                tiles.w.resize(these + ROWS * layer.rank, 0.0);
                for (r, row) in rows.clone().enumerate() {
                    let term = &terms.of(row)[at];
                    let scaled = term.coefficient * placed.factors.scale();
                    let b = &layer.b[term.local as usize * layer.rank..][..layer.rank];
                    tiles.w[these + r..].iter_mut().step_by(ROWS).zip(b).for_each(|(w, b)| *w = scaled * b);
                }
            }
            tiles.tiles.push(Tile {
                pristine,
                live,
                columns: columns as u32,
                rows: rows.len() as u32,
                first_row: rows.start as u32,
                first_a: first_a as u32,
                terms: (tiles.a.len() - first_a) as u32,
                first_w: first_w as u32,
            });
        }
        tiles
    }

    /// Takes in what `other` has.
    pub fn append(&mut self, other: &Self) {
        self.layers.extend(other.layers.iter().map(|&(layer, start)| (layer, self.rows.len() + start)));
        let [rows, a, w] = [self.rows.len(), self.a.len(), self.w.len()].map(|len| len as u32);
        self.tiles.extend(other.tiles.iter().map(|tile| Tile {
            first_row: tile.first_row + rows,
            first_a: tile.first_a + a,
            first_w: tile.first_w + w,
            ..*tile
        }));
        self.rows.extend_from_slice(&other.rows);
        self.a.extend_from_slice(&other.a);
        self.w.extend_from_slice(&other.w);
    }

    /// Forgets all, but keeps the memory.
    pub fn clear(&mut self) {
        self.tiles.clear();
        self.rows.clear();
        self.layers.clear();
        self.a.clear();
        self.w.clear();
    }

    /// Of which layer the `index`-th of `rows` is.
    pub fn layer_of(&self, index: usize) -> usize {
        self.layers[..self.layers.partition_point(|&(_, start)| start <= index)].last().map_or(0, |&(layer, _)| layer)
    }
}
