//! Golden values of merge strategies: what NumPy makes of small adapters.

use std::collections::BTreeMap;
use std::path::Path;

use super::composed::{Problem, merge};
use super::golden::read_json;
use crate::error::{Code, Error, Result};
use crate::merge::{AnyMergeStrategy, Layer};

/// A file of golden values, as `tests/parity/make_merge_golden.py` writes it: layers, adapters, and the change of every
/// layer in each run.
#[derive(Clone, Debug)]
pub struct MergeGolden {
    /// The layers and adapters.
    pub problem: Problem,
    /// By name the change of every layer's weight, [rows, columns] row-major.
    pub runs: BTreeMap<String, Vec<Vec<f32>>>,
}

#[derive(serde::Deserialize)]
struct File {
    layers: Vec<(String, usize, usize)>,
    adapters: Vec<FileAdapter>,
    runs: BTreeMap<String, Vec<Vec<f32>>>,
}

#[derive(serde::Deserialize)]
struct FileAdapter {
    name: String,
    digest: String,
    weight: f32,
    scale: f32,
    factors: Vec<Option<FileFactors>>,
}

#[derive(serde::Deserialize)]
struct FileFactors {
    rank: usize,
    rows: Vec<u32>,
    a: Vec<f32>,
    b: Vec<f32>,
}

impl MergeGolden {
    /// Reads the file of this repository's plugins, in a test of one of them.
    pub fn of_the_repository() -> Result<Self> {
        let crate_folder = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default();
        Self::open(&Path::new(&crate_folder).join("../../tests/golden/merge.json"))
    }

    /// Reads the file.
    pub fn open(path: &Path) -> Result<Self> {
        let File { layers, adapters, runs } = read_json(path)?;
        let layer = |(name, rows, columns)| Layer { name, rows, columns };
        let mut problem = Problem::new(layers.into_iter().map(layer).collect());
        for FileAdapter { name, digest, weight, scale, factors } in adapters {
            let factors = factors.into_iter().map(|f| f.map(|f| (f.a, f.b, f.rows, f.rank))).collect();
            problem.add(&name, &digest, weight, scale, factors);
        }
        Ok(Self { problem, runs })
    }
}

/// Compares what `strategy` makes of the golden problem with the run `name`, for several heights of dense tiles. The
/// error says where it differs by more than 1e-5, or that it depends on the height.
pub fn check_merge(golden: &MergeGolden, name: &str, strategy: &dyn AnyMergeStrategy) -> Result<()> {
    let failed = |message: String| Err(Error::new(Code::Failed, format!("{name}: {message}")));
    let Some(expected) = golden.runs.get(name) else { return failed("there is no such run".into()) };
    let merged = merge(strategy, &golden.problem, usize::MAX)?;
    for tile_rows in [1, 5, 8] {
        if merge(strategy, &golden.problem, tile_rows)? != merged {
            return failed(format!("tiles of {tile_rows} rows give another result than whole layers"));
        }
    }
    if expected.len() != merged.len() {
        return failed(format!("golden values for {} layers of {}", expected.len(), merged.len()));
    }
    for (layer, (ours, theirs)) in golden.problem.layers.iter().zip(merged.iter().zip(expected)) {
        if ours.len() != theirs.len() {
            return failed(format!("{} golden values for {} of {}", theirs.len(), ours.len(), layer.name));
        }
        for (i, (a, b)) in ours.iter().zip(theirs).enumerate() {
            if (a - b).abs() > 1e-5 {
                let (row, column) = (i / layer.columns, i % layer.columns);
                return failed(format!("{}[{row}, {column}] = {a}, but NumPy has {b}", layer.name));
            }
        }
    }
    Ok(())
}
