//! Adapters that answer to their own concepts.
//!
//! Disjoint rows make the changes of two adapters orthogonal as matrices, not selective: B_i A_i x is as large where x
//! enters a layer for another concept as for one's own. Of the adapters of a set, each layer's A can be chosen anew so that
//! it is not, without training and in closed form:
//!
//! > A' = argmin ||(A' - A_i) X_i||^2 + sum over j != i of ||A' X_j||^2 + ridge / n ||A'||^2
//! >    = A_i G_i (sum over j of G_j + ridge / n I)^-1,   G_j = X_j X_j^T
//!
//! where X_j [n, tokens] is what enters the layer for concept j, scaled to ||X_j|| = 1. B, its rows and the words stay as
//! they are, so that the new adapters are merged like any others. (The least squares are those of Mix-of-Show's gradient
//! fusion, asked of each adapter's A rather than of the merged weight.)

mod cholesky;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

use candle_core::Tensor;
use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::image::Picture;
use crate::merge::strategy::LayerInfo;
use crate::merge::{AdapterFactors, AdapterLayer};
use crate::model::Model;
use crate::nn::{LayerId, Recorder};
use crate::score::show;
use crate::text::Concept;

/// A layer's new A, [rank, n], row-major, by the layer's name.
pub type NewA = BTreeMap<String, Vec<f32>>;

/// Collects what enters the layers for each concept of a set, and separates the set's adapters. Takes n^2 numbers for
/// each layer that an adapter changes, however many adapters there are.
pub struct Separation {
    /// In the order of the model's layers; none of those that no adapter changes.
    layers: Vec<Option<Inputs>>,
    /// How many were added.
    adapters: usize,
}

/// What entered one layer.
#[derive(Default)]
struct Inputs {
    name: String,
    /// sum over j of G_j, [n, n]; empty before the first.
    all: Vec<f32>,
    /// A_i G_i, [rank, n], of the adapters that change the layer.
    own: BTreeMap<usize, Vec<f64>>,
}

impl Separation {
    /// For `adapters` on `model`; none is added yet.
    pub fn new<'a>(model: &Model, adapters: impl Iterator<Item = &'a AdapterFactors>) -> Self {
        let changed: BTreeSet<&str> = adapters.flat_map(AdapterFactors::layers).map(|l| l.name.as_str()).collect();
        let inputs = |layer: &LayerInfo| {
            let is_changed = changed.contains(layer.name.as_str());
            is_changed.then(|| Inputs { name: layer.name.clone(), ..Inputs::default() })
        };
        Self { layers: model.layers().iter().map(inputs).collect(), adapters: 0 }
    }

    /// Adds the next adapter. It should be the only one that is merged into `model`, and `pictures` show its concept,
    /// which `concepts` have, under their captions.
    pub fn add(
        &mut self,
        model: &Model,
        adapter: &AdapterFactors,
        concepts: &[Concept],
        pictures: &[(Picture, String)],
    ) -> Result<()> {
        let moments = Moments { wanted: &self.layers, sums: RefCell::new(vec![None; self.layers.len()]) };
        show(model, concepts, pictures, &moments)?;
        let sums = moments.sums.into_inner();
        for (inputs, sum) in self.layers.iter_mut().zip(sums) {
            if let (Some(inputs), Some(sum)) = (inputs, sum) {
                inputs.add(self.adapters, &sum.flatten_all()?.to_vec1::<f32>()?, adapter)?;
            }
        }
        self.adapters += 1;
        Ok(())
    }

    /// The new A of every adapter that was added, in their order. `ridge` keeps A' small where inputs are rare: 0.01
    /// is a good one. Fails on one that is not positive, or so small that rounding outweighs it.
    pub fn separate(self, ridge: f64) -> Result<Vec<NewA>> {
        if !(ridge > 0.0 && ridge.is_finite()) {
            return Err(Error::option("ridge", ridge, "must be positive"));
        }
        let solve = |inputs: Inputs| Ok((inputs.name.clone(), inputs.solve(ridge)?));
        let solved = self.layers.into_par_iter().flatten().map(solve).collect::<Result<Vec<_>>>()?;
        let mut adapters = vec![NewA::new(); self.adapters];
        for (name, of_layer) in solved {
            for (i, a) in of_layer {
                adapters[i].insert(name.clone(), a);
            }
        }
        Ok(adapters)
    }
}

impl Inputs {
    /// Adds adapter i's moment G [n, n], not scaled yet.
    fn add(&mut self, i: usize, moment: &[f32], adapter: &AdapterFactors) -> Result<()> {
        let n = moment.len().isqrt();
        let trace: f64 = (0..n).map(|k| f64::from(moment[k * n + k])).sum();
        if !(trace > 0.0 && trace.is_finite()) {
            let reason = format!("what enters {:?} adds up to {trace}", self.name);
            return Err(Error::Incompatible { adapter: adapter.name().to_owned(), reason });
        }
        self.all.resize(moment.len(), 0.0);
        self.all.iter_mut().zip(moment).for_each(|(sum, &g)| *sum += (f64::from(g) / trace) as f32);
        let Some(AdapterLayer { a, columns, .. }) = adapter.layer(&self.name) else { return Ok(()) };
        let mut own = vec![0.0; a.len()];
        for (own, a) in own.chunks_exact_mut(*columns).zip(a.chunks_exact(*columns)) {
            for (&a, row) in a.iter().zip(moment.chunks_exact(n)) {
                let weight = f64::from(a) / trace;
                own.iter_mut().zip(row).for_each(|(sum, &g)| *sum += weight * f64::from(g));
            }
        }
        self.own.insert(i, own);
        Ok(())
    }

    /// A' of every adapter that changes the layer.
    fn solve(self, ridge: f64) -> Result<Vec<(usize, Vec<f32>)>> {
        if self.own.is_empty() {
            return Ok(Vec::new());
        }
        let n = self.all.len().isqrt();
        let mut m: Vec<f64> = self.all.iter().map(|&g| f64::from(g)).collect();
        m.iter_mut().step_by(n + 1).for_each(|diagonal| *diagonal += ridge / n as f64);
        let l = cholesky::cholesky(m, n).ok_or_else(|| {
            Error::option("ridge", ridge, format!("too small for the inputs of {:?}: choose a larger one", self.name))
        })?;
        let of_adapter = |(i, mut own): (usize, Vec<f64>)| {
            own.chunks_exact_mut(n).for_each(|row| cholesky::solve(&l, row));
            (i, own.into_iter().map(|x| x as f32).collect())
        };
        Ok(self.own.into_iter().map(of_adapter).collect())
    }
}

/// Sums up X X^T for the layers that are wanted.
struct Moments<'a> {
    wanted: &'a [Option<Inputs>],
    sums: RefCell<Vec<Option<Tensor>>>,
}

impl Recorder for Moments<'_> {
    fn record(&self, layer: LayerId, input: &Tensor) -> candle_core::Result<()> {
        if self.wanted[layer.0].is_none() {
            return Ok(());
        }
        let x = input.flatten_to(input.dims().len().saturating_sub(2))?.contiguous()?;
        let more = x.t()?.matmul(&x)?;
        let mut sums = self.sums.borrow_mut();
        let sum = &mut sums[layer.0];
        *sum = Some(match sum.take() {
            None => more,
            Some(sum) => (sum + more)?,
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests;
