//! A merge strategy: the sum of all adapters, each as strong as the user says.

use blocklora_sdk::merge::{Adapter, Coefficients, Layer, LayerPlan, MergeStrategy, Plan, Term, present};
use blocklora_sdk::{Config, Job, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// W = W0 + strength * sum_i weight_i B_i A_i.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct MyMethod {
    /// Multiplies every adapter.
    #[schemars(range(min = 0.0, max = 2.0))]
    pub strength: f32,
}

impl Default for MyMethod {
    fn default() -> Self {
        Self { strength: 1.0 }
    }
}

impl Config for MyMethod {}

impl MergeStrategy for MyMethod {
    fn plan(&self, _job: &dyn Job, layers: &[Layer], adapters: &[Adapter<'_>]) -> Result<Plan> {
        let plan_layer = |layer: usize| {
            let terms = present(adapters, layer).map(|(index, adapter, _)| Term {
                adapter: index,
                coefficients: Coefficients::Uniform(self.strength * adapter.weight),
            });
            LayerPlan::Factored(terms.collect())
        };
        Ok((0..layers.len()).map(plan_layer).collect())
    }
}

blocklora_sdk::export_plugin! {
    merge: MyMethod,
    id: "my-method",
    manifest: include_str!("../merge-my-method.toml"),
}
