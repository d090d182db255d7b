//! DARE: drop and rescale.

use blocklora_sdk::merge::{Adapter, Layer, LayerPlan, MergeStrategy, Plan, Tile, present};
use blocklora_sdk::rng::{Rng, Stream};
use blocklora_sdk::{Config, Job, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// DARE (Yu et al., "Language models are super Mario", ICML 2024), with task arithmetic to add up:
/// W = W0 + lambda sum_i w_i (m_i * tau_i) / (1 - p), where tau_i = s_i B_i A_i and each element of the mask m_i is 0 with
/// probability p, else 1.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Dare {
    /// p: the share of each adapter's change that is dropped. The paper finds that 0.9 and even 0.99 can be; its code
    /// demonstrates 0.9.
    #[schemars(range(min = 0.0, max = 0.99))]
    pub drop_rate: f32,
    /// lambda: multiplies the sum; 1 is what the authors' code takes with task arithmetic.
    #[schemars(range(min = 0.0, max = 10.0))]
    pub lambda: f32,
    /// Chooses the masks.
    pub seed: u64,
}

impl Default for Dare {
    fn default() -> Self {
        Self { drop_rate: 0.9, lambda: 1.0, seed: 0 }
    }
}

impl Config for Dare {}

impl MergeStrategy for Dare {
    fn plan(&self, _job: &dyn Job, layers: &[Layer], adapters: &[Adapter<'_>]) -> Result<Plan> {
        let plan_layer = |index| match present(adapters, index).next() {
            Some(_) => LayerPlan::Dense(Vec::new()),
            None => LayerPlan::Factored(Vec::new()),
        };
        Ok((0..layers.len()).map(plan_layer).collect())
    }

    fn fill(&self, tile: &Tile<'_>, delta: &mut [f32]) -> Result<()> {
        let mut tau = vec![0.0; tile.layer.columns];
        for (_, adapter, factors) in tile.present() {
            let rescaled = self.lambda * adapter.weight / (1.0 - self.drop_rate);
            let key = key(self.seed, adapter.digest, &tile.layer.name);
            for row in factors.rows.iter().map(|&row| row as usize).filter(|row| tile.rows.contains(row)) {
                tau.fill(0.0);
                factors.add_delta(1.0, row..row + 1, &mut tau);
                // The mask of a row is a function of its key and number, so that it does not matter who else is merged
                // and how rows are cut into tiles.
                let mut rng = Rng::new(key, Stream::Merge, row as u32, 0);
                let out = &mut delta[(row - tile.rows.start) * tile.layer.columns..][..tile.layer.columns];
                for (out, tau) in out.iter_mut().zip(&tau) {
                    if rng.uniform() >= self.drop_rate {
                        *out += rescaled * tau;
                    }
                }
            }
        }
        Ok(())
    }
}

/// Key of the masks of an adapter in a layer: FNV-1a of the seed (8 bytes, little endian), the digest, a zero and the
/// layer's name.
fn key(seed: u64, digest: &str, layer: &str) -> u64 {
    let bytes = seed.to_le_bytes().into_iter().chain(digest.bytes()).chain([0]).chain(layer.bytes());
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

blocklora_sdk::export_plugin! {
    merge: Dare,
    id: "dare",
    manifest: include_str!("../merge-dare.toml"),
}
