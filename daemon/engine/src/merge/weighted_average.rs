//! Weighted averaging, the usual way to merge adapters at once.

use serde::{Deserialize, Serialize};

use super::blocklora::sum_to_one;
use super::strategy::{AdapterView, Coefficients, LayerInfo, MergeStrategy, Plan, Term};
use crate::error::Result;

/// W = W0 + sum_i (w_i / sum_j w_j) s_i B_i A_i (Mix-of-Show's weight fusion): the coefficients sum to 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WeightedAverage {}

impl MergeStrategy for WeightedAverage {
    fn id(&self) -> &'static str {
        "weighted-average"
    }

    fn plan(&self, layers: &[LayerInfo], adapters: &[&dyn AdapterView]) -> Result<Plan> {
        let alphas = sum_to_one(adapters)?;
        let terms_of = |layer| {
            let touches = |&(adapter, _): &(usize, &f32)| adapters[adapter].factors(layer).is_some();
            let term = |(adapter, &alpha)| Term { adapter, coefficients: Coefficients::Uniform(alpha) };
            alphas.iter().enumerate().filter(touches).map(term).collect()
        };
        Ok((0..layers.len()).map(terms_of).collect())
    }
}
