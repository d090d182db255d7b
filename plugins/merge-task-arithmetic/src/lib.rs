//! Task arithmetic: adapters are directions in weight space that can be added and subtracted.

use blocklora_sdk::merge::{Adapter, Coefficients, Layer, LayerPlan, MergeStrategy, Plan, Term, present};
use blocklora_sdk::{Config, Job, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// theta = theta_0 + lambda sum_i w_i tau_i, with the task vector tau_i = s_i B_i A_i (Ilharco et al., "Editing models
/// with task arithmetic", ICLR 2023, section 2). An adapter with a negative weight is forgotten instead of learned.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct TaskArithmetic {
    /// lambda, the scaling term. The paper tunes it from 0 to 1; 0.3 to 0.5 suit most sums of several tasks, 1 suits a
    /// single one.
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
        let term = |(adapter, Adapter { weight, .. }, _): (usize, &Adapter<'_>, _)| Term {
            adapter,
            coefficients: Coefficients::Uniform(self.lambda * weight),
        };
        Ok((0..layers.len()).map(|index| LayerPlan::Factored(present(adapters, index).map(term).collect())).collect())
    }
}

blocklora_sdk::export_plugin! {
    merge: TaskArithmetic,
    id: "task-arithmetic",
    manifest: include_str!("../merge-task-arithmetic.toml"),
}
