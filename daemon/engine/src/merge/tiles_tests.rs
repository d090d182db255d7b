//! Tiles written as `kernels/merge.cu` writes them give the bits that the CPU's kernel gives.

#![allow(clippy::unwrap_used)]

use candle_core::DType;

use super::composition::Composition;
use super::tests::{Model, SHAPES, adapter, at_one, disjoint, mean, model, strided, sum};
use super::tiles::{Matrices, ROWS, Tiles};
use super::{AdapterFactors, Merger};

/// Addresses of an imagined card: the live and the pristine matrix of each layer, and each adapter's factors.
fn matrices(layer: usize) -> Matrices {
    let (pristine, live) = (0x1_0000 + layer as u64, 0x2_0000 + layer as u64);
    Matrices { pristine, live, columns: SHAPES[layer].1 }
}

const FACTORS: u64 = 1 << 32;

/// All A of an adapter, and where each of its layers' begins.
fn uploaded(number: usize, factors: &AdapterFactors) -> (Vec<f32>, Vec<u64>) {
    let (mut values, mut starts) = (Vec::new(), Vec::new());
    for layer in factors.layers() {
        starts.push(FACTORS * (number as u64 + 1) + 4 * values.len() as u64);
        values.extend(&layer.a);
    }
    (values, starts)
}

/// Brings `live`, by layer and row, from `old` to `new` as the card does, with what was in `tiles` before.
fn write(model: &Model, live: &mut [Vec<Vec<f32>>], tiles: &mut Tiles, old: &Composition, new: &Composition) {
    let (memory, starts): (Vec<_>, Vec<_>) =
        new.adapters().iter().enumerate().map(|(number, placed)| uploaded(number, &placed.factors)).unzip();
    let same = new.same_in(old);
    tiles.clear();
    for (layer, &(rows, _)) in SHAPES.iter().enumerate() {
        if let Some(changed) = new.changed_rows(old, &same, layer, rows) {
            let terms = new.row_terms(layer, &changed);
            tiles.append(&Tiles::of_layer(new, layer, &terms, matrices(layer), &starts));
        }
    }
    assert_eq!(tiles.w.len(), ROWS * tiles.a.len());
    let mut written = std::collections::BTreeSet::new();
    for tile in &tiles.tiles {
        let layer = (tile.live - 0x2_0000) as usize;
        assert_eq!((tile.pristine, tile.columns as usize), (matrices(layer).pristine, SHAPES[layer].1));
        assert!((1..=ROWS).contains(&(tile.rows as usize)));
        let pristine = model.targets[layer].pristine.load(DType::F32, &candle_core::Device::Cpu).unwrap();
        let pristine = pristine.to_vec2::<f32>().unwrap();
        for r in 0..tile.rows as usize {
            let at = tile.first_row as usize + r;
            let row = tiles.rows[at] as usize;
            assert_eq!(tiles.layer_of(at), layer);
            assert!(written.insert((layer, row)), "row {row} of layer {layer} twice");
            for (column, to) in live[layer][row].iter_mut().enumerate() {
                let mut value = pristine[row][column];
                for k in 0..tile.terms as usize {
                    let address = tiles.a[tile.first_a as usize + k];
                    let a = &memory[(address / FACTORS) as usize - 1][(address % FACTORS) as usize / 4..];
                    value = tiles.w[tile.first_w as usize + k * ROWS + r].mul_add(a[column], value);
                }
                *to = value;
            }
        }
    }
}

#[test]
fn tiles_give_the_bits_of_the_kernel() {
    let model = model(DType::F32, DType::F32);
    let plain = |model: &Model| -> Vec<Vec<Vec<f32>>> {
        model
            .bits()
            .iter()
            .map(|layer| layer.iter().map(|r| r.iter().map(|&x| f32::from_bits(x)).collect()).collect())
            .collect()
    };
    let mut live = plain(&model);
    let mut merger: Merger = model.merger();
    let blocks = disjoint(5, 3);
    let rows_of_all: Vec<_> =
        (0..3).map(|s| adapter(&format!("all{s}"), 40 + s, 2, |m| (0..m as u32).collect())).collect();
    let scattered: Vec<_> = (0..4).map(|s| adapter(&format!("s{s}"), 60 + s as u64, 4, |m| strided(s, m))).collect();
    let swapped = [adapter("other", 7, 3, |m| super::tests::block(0, m))];
    let lists = [
        (blocks.clone(), sum()),
        ([&swapped[..], &blocks[1..]].concat(), sum()),
        ([&rows_of_all[..], &scattered, &blocks].concat(), mean()),
        ([&scattered[..], &rows_of_all[..1]].concat(), sum()),
        (scattered, mean()),
        (Vec::new(), sum()),
    ];
    let (mut old, mut tiles) = (Composition::default(), Tiles::default());
    for (list, strategy) in &lists {
        let new = merger.compose(&at_one(list), strategy).unwrap();
        write(&model, &mut live, &mut tiles, &old, &new);
        merger.apply(&at_one(list), strategy).unwrap();
        assert_eq!(live, plain(&model), "{} adapters", list.len());
        old = new;
    }
}
