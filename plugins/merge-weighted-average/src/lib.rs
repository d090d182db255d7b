//! Weighted averaging, the usual way to merge adapters at once.

use blocklora_sdk::merge::{Adapter, Layer, MergeStrategy, Plan, weighted_sum, weights_summing_to_one};
use blocklora_sdk::{Config, Job, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// W = W0 + sum_i (w_i / sum_j w_j) s_i B_i A_i: the coefficients sum to 1 (FedAvg: McMahan et al., AISTATS 2017,
/// algorithm 1; Mix-of-Show's weight fusion: Gu et al., NeurIPS 2023). An adapter that does not change a layer counts
/// there as a change of zero. It has no settings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct WeightedAverage {}

impl Config for WeightedAverage {}

impl MergeStrategy for WeightedAverage {
    fn plan(&self, _job: &dyn Job, layers: &[Layer], adapters: &[Adapter<'_>]) -> Result<Plan> {
        let alphas = weights_summing_to_one(adapters)?;
        Ok(weighted_sum(layers, adapters, |adapter, _| alphas[adapter]))
    }
}

blocklora_sdk::export_plugin! {
    merge: WeightedAverage,
    id: "weighted-average",
    manifest: include_str!("../merge-weighted-average.toml"),
}
