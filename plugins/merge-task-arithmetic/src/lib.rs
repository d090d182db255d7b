//! Task arithmetic: adapters are directions in weight space that can be added and subtracted.

use blocklora_sdk::merge::{Adapter, Layer, MergeStrategy, Plan, weighted_sum};
use blocklora_sdk::{Config, Job, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// theta = theta_0 + lambda sum_i w_i tau_i, with the task vector tau_i = s_i B_i A_i (Ilharco et al., "Editing models
/// with task arithmetic", ICLR 2023, section 2). An adapter with a negative weight is forgotten instead of learned.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct TaskArithmetic {
    /// lambda, the scaling term. There is no published default: it is chosen on validation data (the code of
    /// TIES-Merging tries 0.1 to 1; an example in that of task arithmetic adds two at 0.8). 0.4 is our careful value for
    /// several adapters; 1 suits a single one.
    #[schemars(range(min = 0.0, max = 10.0))]
    pub lambda: f32,
}

impl Default for TaskArithmetic {
    fn default() -> Self {
        Self { lambda: 0.4 }
    }
}

impl Config for TaskArithmetic {}

impl MergeStrategy for TaskArithmetic {
    fn plan(&self, _job: &dyn Job, layers: &[Layer], adapters: &[Adapter<'_>]) -> Result<Plan> {
        Ok(weighted_sum(layers, adapters, |_, adapter| self.lambda * adapter.weight))
    }
}

blocklora_sdk::export_plugin! {
    merge: TaskArithmetic,
    id: "task-arithmetic",
    manifest: include_str!("../merge-task-arithmetic.toml"),
}
