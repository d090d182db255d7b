//! A merge in memory, as the engine does it, on small problems.

use super::job::TestJob;
use crate::error::{Error, Result};
use crate::merge::{Adapter, AnyMergeStrategy, Coefficients, Factors, Layer, LayerPlan, Tile};
use crate::rng::{Rng, Stream};

/// Factors of one adapter on one layer, owned.
#[derive(Clone, Debug, PartialEq)]
struct OwnedFactors {
    a: Vec<f32>,
    b: Vec<f32>,
    rows: Vec<u32>,
    rank: usize,
    scale: f32,
}

/// (A, owned rows of B, owned rows, rank) of an adapter on a layer.
pub type LayerNumbers = (Vec<f32>, Vec<f32>, Vec<u32>, usize);

/// Layers and adapters to merge.
#[derive(Clone, Debug, PartialEq)]
pub struct Problem {
    /// The layers.
    pub layers: Vec<Layer>,
    adapters: Vec<(String, String, f32, Vec<Option<OwnedFactors>>)>,
}

impl Problem {
    /// A problem without adapters.
    pub fn new(layers: Vec<Layer>) -> Self {
        Self { layers, adapters: Vec::new() }
    }

    /// Layers of different shapes with `adapters` adapters of rank 2 that own every row, or a block of each layer's
    /// rows if `disjoint`. The numbers come from `seed`.
    pub fn random(seed: u64, adapters: usize, disjoint: bool) -> Self {
        let layer = |name: &str, rows, columns| Layer { name: name.into(), rows, columns };
        let layers = vec![
            layer("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", 24, 16),
            layer("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q", 32, 8),
            layer("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k", 32, 20),
        ];
        let mut problem = Self::new(layers);
        for index in 0..adapters {
            let factors = |layer: usize| {
                let Layer { rows, columns, .. } = problem.layers[layer];
                let block = if disjoint { index * rows / adapters..(index + 1) * rows / adapters } else { 0..rows };
                let mut rng = Rng::new(seed, Stream::Test, index as u32, layer as u16);
                let (a, b) = (rng.normals(2 * columns), rng.normals(2 * block.len()));
                Some((a, b, block.map(|row| row as u32).collect(), 2))
            };
            let factors = (0..problem.layers.len()).map(factors).collect();
            problem.add(&format!("concept{index}"), &format!("{index:064x}"), 1.0, 0.5, factors);
        }
        problem
    }

    /// Adds an adapter: name, digest, weight, scale, and its numbers on each layer.
    pub fn add(&mut self, name: &str, digest: &str, weight: f32, scale: f32, factors: Vec<Option<LayerNumbers>>) {
        let own = |(a, b, rows, rank)| OwnedFactors { a, b, rows, rank, scale };
        let factors = factors.into_iter().map(|f| f.map(own)).collect();
        self.adapters.push((name.to_owned(), digest.to_owned(), weight, factors));
    }

    /// Gives every adapter this weight.
    pub fn set_weights(&mut self, weights: &[f32]) {
        for (adapter, &weight) in self.adapters.iter_mut().zip(weights) {
            adapter.2 = weight;
        }
    }

    /// The same layers with these of the adapters, in this order.
    pub fn choose(&self, adapters: &[usize]) -> Self {
        let adapters = adapters.iter().filter_map(|&i| self.adapters.get(i).cloned()).collect();
        Self { layers: self.layers.clone(), adapters }
    }

    /// The adapters as a strategy sees them.
    pub fn adapters(&self) -> Vec<Adapter<'_>> {
        self.adapters
            .iter()
            .map(|(name, digest, weight, factors)| {
                Adapter::new(name, digest, *weight, factors.iter().map(|f| f.as_ref().map(OwnedFactors::view)))
            })
            .collect()
    }
}

impl OwnedFactors {
    fn view(&self) -> Factors<'_> {
        Factors { a: &self.a, b: &self.b, rows: &self.rows, rank: self.rank, scale: self.scale }
    }
}

/// The change of every layer's weight, [rows, columns] row-major, that `strategy` makes of `problem`: factored terms
/// summed in the order of the adapters, dense layers filled in tiles of `tile_rows` rows. Checks what the engine checks.
pub fn merge(strategy: &dyn AnyMergeStrategy, problem: &Problem, tile_rows: usize) -> Result<Vec<Vec<f32>>> {
    let adapters = problem.adapters();
    let plan = strategy.plan(&TestJob::new(0), &problem.layers, &adapters)?;
    if plan.len() != problem.layers.len() {
        return Err(Error::contract(format!("{} layers planned of {}", plan.len(), problem.layers.len())));
    }
    let layers = problem.layers.iter().enumerate().zip(plan);
    let merged = layers.map(|((index, layer), plan)| {
        let mut delta = vec![0.0; layer.rows * layer.columns];
        match plan {
            LayerPlan::Factored(mut terms) => {
                terms.sort_by_key(|term| term.adapter);
                for term in terms {
                    let factors = adapters.get(term.adapter).and_then(|a| a.factors(index)).ok_or_else(|| {
                        Error::contract(format!("adapter {} does not change {}", term.adapter, layer.name))
                    })?;
                    add_term(&factors, &term.coefficients, layer, &mut delta)?;
                }
            }
            LayerPlan::Dense(numbers) => {
                for start in (0..layer.rows).step_by(tile_rows.max(1)) {
                    let rows = start..layer.rows.min(start + tile_rows.max(1));
                    let tile = Tile { index, layer, adapters: &adapters, numbers: &numbers, rows: rows.clone() };
                    strategy.fill(&tile, &mut delta[rows.start * layer.columns..rows.end * layer.columns])?;
                }
            }
        }
        match delta.iter().find(|x| !x.is_finite()) {
            Some(&value) => Err(Error::not_finite(&format!("a weight of {}", layer.name), value, 0)),
            None => Ok(delta),
        }
    });
    merged.collect()
}

fn add_term(factors: &Factors<'_>, coefficients: &Coefficients, layer: &Layer, delta: &mut [f32]) -> Result<()> {
    match coefficients {
        Coefficients::Uniform(c) => factors.add_delta(*c, 0..layer.rows, delta),
        Coefficients::PerRow(values) if values.len() == factors.rows.len() => {
            for (local, (&row, &c)) in factors.rows.iter().zip(values).enumerate() {
                let b = &factors.b[local * factors.rank..][..factors.rank];
                let one = Factors { b, rows: &factors.rows[local..=local], ..*factors };
                one.add_delta(c, 0..layer.rows, delta);
                debug_assert!((row as usize) < layer.rows);
            }
        }
        Coefficients::PerRow(values) => {
            let message = format!("{} coefficients for {} rows of {}", values.len(), factors.rows.len(), layer.name);
            return Err(Error::contract(message));
        }
    }
    Ok(())
}
