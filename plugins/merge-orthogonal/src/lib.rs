//! Orthogonal Adaptation's merge: what is trained in orthogonal subspaces adds up as it is.

use blocklora_sdk::merge::{Adapter, Factors, Layer, MergeStrategy, Plan, present, weighted_sum};
use blocklora_sdk::{Config, Error, Job, Result};
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
        for (index, layer) in layers.iter().enumerate() {
            check_slots(index, layer, adapters)?;
        }
        Ok(weighted_sum(layers, adapters, |_, adapter| self.lambda * adapter.weight))
    }
}

/// Fails where two adapters have the same A, so that they answer to the same inputs, and nothing is orthogonal about them:
/// they were trained in one slot of one basis, or chose its rows at random when names did not count for that yet. Which
/// slots of a basis are taken nobody keeps but their users; that the rows of two random choices overlap in part is as
/// published.
fn check_slots(index: usize, layer: &Layer, adapters: &[Adapter<'_>]) -> Result<()> {
    let here: Vec<_> = present(adapters, index).collect();
    for (at, (_, first, of_first)) in here.iter().enumerate() {
        let same_a = |of_other: &Factors<'_>| !of_first.a.is_empty() && of_other.a == of_first.a;
        if let Some((_, other, _)) = here[at + 1..].iter().find(|(_, _, of_other)| same_a(of_other)) {
            return Err(Error::incompatible(format!(
                "adapter {:?}: it and {:?} have the same A in {}, so that both answer to the same inputs; train one of \
                 them again (with allocation = \"allocated\" in another slot = N; with \"random\" its name chooses \
                 other rows), leave one out, or merge by another strategy",
                other.name, first.name, layer.name
            )));
        }
    }
    Ok(())
}

blocklora_sdk::export_plugin! {
    merge: Orthogonal,
    id: "orthogonal",
    manifest: include_str!("../merge-orthogonal.toml"),
}
