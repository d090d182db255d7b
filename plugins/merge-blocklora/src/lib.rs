//! BlockLoRA's merge: every adapter owns its rows, so that each adds up undiluted.

use blocklora_sdk::merge::{
    Adapter, Coefficients, Layer, LayerPlan, MergeStrategy, Plan, Term, present, weights_summing_to_one,
};
use blocklora_sdk::{Config, Error, Job, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How the coefficients alpha_i are normalised.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
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
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Clash {
    /// An error that names both.
    #[default]
    Refuse,
    /// The owners' mean; with `normalise = "sum1"` their sum, as everywhere.
    Mean,
}

/// W = W0 + sum_i alpha_i (M_i * B_i A_i), M_i the mask of the rows that adapter i owns (BlockLoRA, section 3.3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Blocklora {
    /// How the alpha_i are normalised.
    pub normalise: Normalise,
    /// What to do about shared rows.
    pub clash: Clash,
}

impl Config for Blocklora {}

impl MergeStrategy for Blocklora {
    fn plan(&self, _job: &dyn Job, layers: &[Layer], adapters: &[Adapter<'_>]) -> Result<Plan> {
        let alphas = match self.normalise {
            Normalise::Owners => adapters.iter().map(|adapter| adapter.weight).collect(),
            Normalise::Sum1 => weights_summing_to_one(adapters)?,
        };
        // Thousands of pairs of layer and adapter: their lists are made once.
        let mut owned: Vec<(usize, &[u32])> = Vec::with_capacity(adapters.len());
        let mut spans = Vec::with_capacity(adapters.len());
        let plan_layer = |(index, layer): (usize, &Layer)| {
            owned.clear();
            owned.extend(present(adapters, index).map(|(i, _, f)| (i, f.rows)));
            let term = |adapter, coefficients| Term { adapter, coefficients };
            if are_disjoint(layer.rows, owned.iter().map(|(_, rows)| *rows), &mut spans) {
                let terms = owned.iter().map(|&(i, _)| term(i, Coefficients::Uniform(alphas[i])));
                return Ok(LayerPlan::Factored(terms.collect()));
            }
            if self.clash == Clash::Refuse {
                return Err(clash(index, layer, adapters));
            }
            let owners = count_owners(layer.rows, owned.iter().map(|(_, rows)| *rows));
            let coefficients = |rows: &[u32], alpha: f32| match self.normalise {
                Normalise::Owners => {
                    Coefficients::PerRow(rows.iter().map(|&row| alpha / owners[row as usize] as f32).collect())
                }
                Normalise::Sum1 => Coefficients::Uniform(alpha),
            };
            Ok(LayerPlan::Factored(owned.iter().map(|&(i, rows)| term(i, coefficients(rows, alphas[i]))).collect()))
        };
        layers.iter().enumerate().map(plan_layer).collect()
    }
}

/// Whether no row of a layer's `m` is in two of the ascending lists; `spans` is room to work in.
fn are_disjoint<'a>(m: usize, lists: impl Iterator<Item = &'a [u32]> + Clone, spans: &mut Vec<(u32, u32)>) -> bool {
    // Blocks one after the other need no look at every row.
    spans.clear();
    spans.extend(lists.clone().filter_map(|rows| Some((*rows.first()?, *rows.last()?))));
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
fn clash(index: usize, layer: &Layer, adapters: &[Adapter<'_>]) -> Error {
    let mut owner: Vec<Option<&str>> = vec![None; layer.rows];
    for (_, adapter, factors) in present(adapters, index) {
        for &row in factors.rows {
            if let Some(first) = owner[row as usize].replace(adapter.name) {
                return Error::incompatible(format!(
                    "adapter {:?}: it and {first:?} both own row {row} of {}; leave one out, train one of them again \
                     in a free slot, or accept the mean of both with clash = \"mean\"",
                    adapter.name, layer.name
                ));
            }
        }
    }
    Error::incompatible("two adapters own the same rows")
}

blocklora_sdk::export_plugin! {
    merge: Blocklora,
    id: "blocklora",
    manifest: include_str!("../merge-blocklora.toml"),
}
