//! Orthogonal Adaptation's merge: what is trained in orthogonal subspaces adds up as it is.

use blocklora_sdk::merge::{Adapter, Layer, MergeStrategy, Plan, weighted_sum};
use blocklora_sdk::{Config, Job, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// W = W0 + lambda sum_i w_i s_i B_i A_i (Po et al., "Orthogonal adaptation for modular customization of diffusion
/// models", CVPR 2024, and its supplement). Not normalised: coefficients that sum to 1 dilute every concept.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Orthogonal {
    /// lambda: multiplies every adapter. 0.6 is the published value.
    #[schemars(range(min = 0.0, max = 10.0))]
    pub lambda: f32,
}

impl Default for Orthogonal {
    fn default() -> Self {
        Self { lambda: 0.6 }
    }
}

impl Config for Orthogonal {}

impl MergeStrategy for Orthogonal {
    fn plan(&self, _job: &dyn Job, layers: &[Layer], adapters: &[Adapter<'_>]) -> Result<Plan> {
        Ok(weighted_sum(layers, adapters, |_, adapter| self.lambda * adapter.weight))
    }
}

blocklora_sdk::export_plugin! {
    merge: Orthogonal,
    id: "orthogonal",
    manifest: include_str!("../merge-orthogonal.toml"),
}
