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
    /// Numbers of rows in their matrix, and of which layer each is.
    pub rows: Vec<u32>,
    pub layers: Vec<u32>,
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
        let mut tiles = Self::default();
        let Matrices { pristine, live, columns } = matrices;
        let count = terms.rows.len();
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
                for k in 0..layer.rank {
                    tiles.a.push(a + (k * columns * size_of::<f32>()) as u64);
                    let mut w = [0.0; ROWS];
                    for (w, row) in w.iter_mut().zip(rows.clone()) {
                        let term = &terms.of(row)[at];
                        *w = term.coefficient * placed.factors.scale() * layer.b[term.local as usize * layer.rank + k];
                    }
                    tiles.w.extend(w);
                }
            }
            tiles.tiles.push(Tile {
                pristine,
                live,
                columns: columns as u32,
                rows: rows.len() as u32,
                first_row: tiles.rows.len() as u32,
                first_a: first_a as u32,
                terms: (tiles.a.len() - first_a) as u32,
                first_w: first_w as u32,
            });
            tiles.layers.extend(rows.clone().map(|_| index as u32));
            tiles.rows.extend(&terms.rows[rows]);
        }
        tiles
    }

    /// Takes in what `other` has.
    pub fn append(&mut self, mut other: Self) {
        let [rows, a, w] = [self.rows.len(), self.a.len(), self.w.len()].map(|len| len as u32);
        self.tiles.extend(other.tiles.iter().map(|tile| Tile {
            first_row: tile.first_row + rows,
            first_a: tile.first_a + a,
            first_w: tile.first_w + w,
            ..*tile
        }));
        self.rows.append(&mut other.rows);
        self.layers.append(&mut other.layers);
        self.a.append(&mut other.a);
        self.w.append(&mut other.w);
    }
}
