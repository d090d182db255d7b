//! BlockLoRA's merge: every adapter owns its rows, so that each adds up undiluted.

use serde::{Deserialize, Serialize};

use super::strategy::{AdapterView, Coefficients, LayerInfo, MergeStrategy, Plan, Term};
use crate::error::{Error, Result};

/// How the coefficients alpha_i are normalised.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Normalise {
    /// Each row's entries are divided by the number of adapters that own the row: alpha_i is the caller's weight
    /// where rows are disjoint.
    #[default]
    Owners,
    /// The paper's formula to the letter: sum_i alpha_i = 1.
    Sum1,
}

/// What to do about rows that two adapters own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Clash {
    /// An error that names both.
    #[default]
    Refuse,
    /// The owners' mean.
    Mean,
}

/// W = W0 + sum_i alpha_i (M_i * B_i A_i), M_i the mask of the rows that adapter i owns (BlockLoRA, section 3.3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Blocklora {
    /// How the alpha_i are normalised.
    pub normalise: Normalise,
    /// What to do about shared rows.
    pub clash: Clash,
}

impl MergeStrategy for Blocklora {
    fn id(&self) -> &'static str {
        "blocklora"
    }

    fn plan(&self, layers: &[LayerInfo], adapters: &[&dyn AdapterView]) -> Result<Plan> {
        let alphas = match self.normalise {
            Normalise::Owners => adapters.iter().map(|adapter| adapter.weight()).collect(),
            Normalise::Sum1 => sum_to_one(adapters)?,
        };
        let plan_layer = |(index, layer): (usize, &LayerInfo)| {
            let terms = adapters.iter().zip(&alphas).enumerate();
            let terms = terms.filter_map(|(adapter, (view, &alpha))| Some((adapter, view.factors(index)?.rows, alpha)));
            let terms: Vec<(usize, &[u32], f32)> = terms.collect();
            let term = |adapter, coefficients| Term { adapter, coefficients };
            if are_disjoint(layer.rows, terms.iter().map(|(_, rows, _)| *rows)) {
                return Ok(terms.into_iter().map(|(i, _, alpha)| term(i, Coefficients::Uniform(alpha))).collect());
            }
            if self.clash == Clash::Refuse {
                return Err(clash(index, layer, adapters));
            }
            let owners = count_owners(layer.rows, terms.iter().map(|(_, rows, _)| *rows));
            let mean = |rows: &[u32], alpha: f32| match self.normalise {
                Normalise::Owners => {
                    Coefficients::PerRow(rows.iter().map(|&row| alpha / owners[row as usize] as f32).collect())
                }
                Normalise::Sum1 => Coefficients::Uniform(alpha),
            };
            Ok(terms.into_iter().map(|(i, rows, alpha)| term(i, mean(rows, alpha))).collect())
        };
        layers.iter().enumerate().map(plan_layer).collect()
    }
}

/// The adapters' weights divided by their sum.
pub(super) fn sum_to_one(adapters: &[&dyn AdapterView]) -> Result<Vec<f32>> {
    let sum: f32 = adapters.iter().map(|adapter| adapter.weight()).sum();
    let alphas: Vec<f32> = adapters.iter().map(|adapter| adapter.weight() / sum).collect();
    if alphas.iter().all(|alpha| alpha.is_finite()) {
        Ok(alphas)
    } else {
        Err(Error::option("weights", sum, "the weights' sum divides each of them, so it must not be 0"))
    }
}

/// Whether no row of a layer's `m` is in two of the ascending lists.
fn are_disjoint<'a>(m: usize, lists: impl Iterator<Item = &'a [u32]> + Clone) -> bool {
    // Blocks one after the other need no look at every row.
    let mut spans: Vec<(u32, u32)> = lists.clone().filter_map(|rows| Some((*rows.first()?, *rows.last()?))).collect();
    spans.sort_unstable();
    spans.windows(2).all(|pair| pair[0].1 < pair[1].0) || count_owners(m, lists).iter().all(|&count| count <= 1)
}

/// How many of the lists have each of a layer's `m` rows.
fn count_owners<'a>(m: usize, lists: impl Iterator<Item = &'a [u32]>) -> Vec<u32> {
    let mut owners = vec![0; m];
    lists.flatten().for_each(|&row| owners[row as usize] += 1);
    owners
}

/// The error about the first row of `layer` that two adapters own.
fn clash(index: usize, layer: &LayerInfo, adapters: &[&dyn AdapterView]) -> Error {
    let mut owner: Vec<Option<&str>> = vec![None; layer.rows];
    for adapter in adapters {
        for &row in adapter.factors(index).map_or(&[][..], |factors| factors.rows) {
            if let Some(first) = owner[row as usize].replace(adapter.name()) {
                return Error::Incompatible {
                    adapter: adapter.name().to_owned(),
                    reason: format!(
                        "it and {first:?} both own row {row} of {}; leave one out, train one of them again in a free \
                         slot, or accept the mean of both with clash = \"mean\"",
                        layer.name
                    ),
                };
            }
        }
    }
    Error::option("clash", "refuse", "two adapters own the same rows")
}
