//! A merge strategy that breaks its contract in the way that BLOCKLORA_HOSTILE names, and adds adapters up otherwise.
#![allow(missing_docs)]

use blocklora_sdk::merge::{Adapter, Coefficients, Layer, LayerPlan, MergeStrategy, Plan, Term, Tile, present};
use blocklora_sdk::{Config, Job, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

include!("hostile/mode.rs");

/// The sum of the adapters.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Hostile {
    /// Multiplies every adapter.
    #[schemars(range(min = 0.0, max = 2.0))]
    pub factor: f32,
}

impl Default for Hostile {
    fn default() -> Self {
        misbehave("defaults");
        Self { factor: 1.0 }
    }
}

impl Config for Hostile {
    fn check(&self) -> Result<()> {
        if mode("panic-check") {
            panic!("no settings today");
        }
        Ok(())
    }
}

impl Drop for Hostile {
    fn drop(&mut self) {
        if mode("panic-drop") && !std::thread::panicking() {
            panic!("no farewell today");
        }
    }
}

impl MergeStrategy for Hostile {
    fn plan(&self, job: &dyn Job, layers: &[Layer], adapters: &[Adapter<'_>]) -> Result<Plan> {
        misbehave("plan");
        hand_over(job, "plan")?;
        // A plan of three seconds that asks as it should; this is no misdeed.
        let began = std::time::Instant::now();
        while mode("plans-for-long") && began.elapsed().as_secs() < 3 {
            job.check_cancelled()?;
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        let term = |layer: usize| {
            let terms = present(adapters, layer).map(|(adapter, a, _)| {
                let coefficient = self.factor * a.weight * if mode("twice") { 2.0 } else { 1.0 };
                let coefficients = match () {
                    () if mode("rows-outside") => Coefficients::PerRow(vec![1.0; layers[layer].rows + 1]),
                    () if mode("nan") => Coefficients::Uniform(f32::NAN),
                    () => Coefficients::Uniform(coefficient),
                };
                Term { adapter: if mode("adapter-outside") { 99 } else { adapter }, coefficients }
            });
            terms.collect()
        };
        let is_dense = mode("dense") || mode("tiles") || current_mode().ends_with("-fill");
        let plan = |layer| if is_dense { LayerPlan::Dense(vec![]) } else { LayerPlan::Factored(term(layer)) };
        let planned = if mode("wrong-shape") { layers.len() - 1 } else { layers.len() };
        Ok((0..planned).map(plan).collect())
    }

    fn fill(&self, tile: &Tile<'_>, delta: &mut [f32]) -> Result<()> {
        misbehave("fill");
        for (_, adapter, factors) in tile.present() {
            factors.add_delta(self.factor * adapter.weight, tile.rows.clone(), delta);
        }
        if mode("tiles") {
            delta[0] += tile.rows.len() as f32;
        }
        if mode("nan-fill") {
            delta[0] = f32::NAN;
        }
        Ok(())
    }
}

blocklora_sdk::export_plugin! {
    merge: Hostile,
    id: "hostile",
    manifest: include_str!("hostile/merge-hostile.toml"),
}
