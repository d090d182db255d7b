//! TIES-Merging: trim, elect signs, average what agrees.

mod trim;

use blocklora_sdk::merge::{Adapter, Factors, Layer, LayerPlan, MergeStrategy, Plan, Tile, present};
use blocklora_sdk::{Config, Job, Result, parallel};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Over what an adapter's largest changes are chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Scope {
    /// Each layer for itself: every layer keeps its share, also those that are trained with a smaller rate.
    #[default]
    Layer,
    /// All layers that the adapter changes, together: the paper's task vector.
    Model,
}

/// TIES-Merging (Yadav et al., "TIES-Merging: Resolving interference when merging models", NeurIPS 2023, algorithm 1)
/// of the task vectors tau_i = s_i B_i A_i.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Ties {
    /// k: of each task vector the k percent of largest magnitude are kept, the others set to zero. 20 is what the
    /// authors' code runs (`topk20`).
    #[schemars(range(min = 0.0, max = 100.0))]
    pub top_k_percent: f32,
    /// lambda: multiplies the merged task vector. 1 leaves it as it is; the authors' code searches 0.8 to 2.5.
    #[schemars(range(min = 0.0, max = 10.0))]
    pub lambda: f32,
    /// Over what the k percent are chosen.
    pub trim: Scope,
}

impl Default for Ties {
    fn default() -> Self {
        Self { top_k_percent: 20.0, lambda: 1.0, trim: Scope::Layer }
    }
}

impl Config for Ties {}

impl Ties {
    /// The least magnitude that stays when k percent of the numbers in `parts` (factors and their layers) do.
    fn threshold(&self, parts: &[(Factors<'_>, &Layer)]) -> f32 {
        let numbers: usize = parts.iter().map(|(_, layer)| layer.rows * layer.columns).sum();
        let kept = f64::from(self.top_k_percent) * numbers as f64 / 100.0;
        trim::kth_largest(parts, kept as usize)
    }
}

impl MergeStrategy for Ties {
    /// Step 1, trim: a threshold for each adapter that changes the layer, in their order.
    fn plan(&self, job: &dyn Job, layers: &[Layer], adapters: &[Adapter<'_>]) -> Result<Plan> {
        let of_model = match self.trim {
            Scope::Layer => None,
            Scope::Model => Some(parallel::map(adapters.len(), |adapter| {
                job.check_cancelled()?;
                let parts = adapters[adapter].factors_by_layer().zip(layers).filter_map(|(f, layer)| Some((f?, layer)));
                Ok(self.threshold(&parts.collect::<Vec<_>>()))
            })?),
        };
        parallel::map(layers.len(), |index| {
            job.check_cancelled()?;
            let threshold = |(adapter, _, factors)| match &of_model {
                Some(thresholds) => thresholds[adapter],
                None => self.threshold(&[(factors, &layers[index])]),
            };
            let thresholds: Vec<f32> = present(adapters, index).map(threshold).collect();
            Ok(if thresholds.is_empty() { LayerPlan::Factored(Vec::new()) } else { LayerPlan::Dense(thresholds) })
        })
    }

    fn fill(&self, tile: &Tile<'_>, delta: &mut [f32]) -> Result<()> {
        let trimmed = |((_, adapter, factors), &threshold): ((_, &Adapter<'_>, Factors<'_>), &f32)| {
            let mut tau = factors.delta(tile.rows.clone());
            tau.iter_mut().for_each(|x| *x = if x.abs() >= threshold { adapter.weight * *x } else { 0.0 });
            tau
        };
        let taus: Vec<Vec<f32>> = tile.present().zip(tile.numbers).map(trimmed).collect();
        for (p, merged) in delta.iter_mut().enumerate() {
            // In f64: rounding in f32 could decide a close vote.
            let entries = || taus.iter().map(|tau| f64::from(tau[p]));
            // Step 2, elect: the sign with the greater total magnitude. On a draw nobody has it, and p stays pristine.
            let gamma: f64 = entries().sum();
            // Step 3, disjoint merge: the mean of those that have the elected sign.
            let agreeing = || entries().filter(|x| x * gamma > 0.0);
            let count = agreeing().count();
            if count > 0 {
                *merged = (f64::from(self.lambda) * agreeing().sum::<f64>() / count as f64) as f32;
            }
        }
        Ok(())
    }
}

blocklora_sdk::export_plugin! {
    merge: Ties,
    id: "ties",
    manifest: include_str!("../merge-ties.toml"),
}
