//! A plugin as the engine's merge strategy.

use std::sync::Arc;

use blocklora_engine::merge::strategy::{
    AdapterView, Coefficients, LayerInfo, LayerPlan, MergeStrategy, Plan, Term, Tile,
};
use blocklora_engine::{Error, MethodFault, Result};
use blocklora_sdk::{Code, merge as sdk};
use blocklora_spec::Algorithm;
use rayon::prelude::*;

use super::running::{Place, inside};
use super::train::layers;
use super::{stop, words};

pub struct PluginStrategy {
    algorithm: Algorithm,
    fingerprint: String,
    strategy: Box<dyn sdk::AnyMergeStrategy>,
    /// In this process.
    place: Option<Place>,
}

impl PluginStrategy {
    pub fn new(algorithm: Algorithm, strategy: Box<dyn sdk::AnyMergeStrategy>, place: Option<Place>) -> Self {
        let digest = algorithm.digest.as_deref().unwrap_or_default();
        let fingerprint = format!("{} {digest} {}", algorithm.id, algorithm.config);
        Self { algorithm, fingerprint, strategy, place }
    }

    fn failed(&self, error: blocklora_sdk::Error) -> Error {
        failed(&self.algorithm.id, error)
    }
}

/// A plugin's error as the engine's.
pub fn failed(id: &str, error: blocklora_sdk::Error) -> Error {
    let message = words::said(&error.message);
    let fault = match error.code {
        Code::Cancelled if stop::is_asked_for() => return Error::Cancelled,
        Code::Cancelled => {
            return Error::faulty_method(id, "it says that the job is cancelled, which nobody has done");
        }
        Code::Panicked | Code::Contract => return Error::faulty_method(id, message),
        Code::InvalidConfig => MethodFault::Option,
        Code::Incompatible => MethodFault::Incompatible,
        _ => MethodFault::Failed,
    };
    let reason = match error.code {
        Code::NotFinite => format!("{message}: use other settings, or another method"),
        _ => message,
    };
    Error::Method { method: id.to_owned(), reason, fault }
}

/// The adapters as a plugin sees them.
fn adapters<'a>(layers: usize, views: &[&'a dyn AdapterView]) -> Vec<sdk::Adapter<'a>> {
    let factors = |view: &'a dyn AdapterView, layer| {
        let f = view.factors(layer)?;
        Some(sdk::Factors { a: f.a, b: f.b, rows: f.rows, rank: f.rank, scale: f.scale })
    };
    let adapter = |&view: &&'a dyn AdapterView| {
        let factors = (0..layers).map(|layer| factors(view, layer));
        sdk::Adapter::new(view.name(), view.digest(), view.weight(), factors)
    };
    views.par_iter().map(adapter).collect()
}

impl MergeStrategy for PluginStrategy {
    fn id(&self) -> &str {
        &self.algorithm.id
    }

    fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    fn plan(&self, infos: &[LayerInfo], views: &[&dyn AdapterView]) -> Result<Plan> {
        let job = super::sample::QuietJob::until(super::stop::current());
        let adapters = adapters(infos.len(), views);
        let layers = layers(infos);
        let plan = inside(self.place.as_ref(), || self.strategy.plan(&job, &layers, &adapters));
        let plan = plan.map_err(|e| self.failed(e))?;
        let term = |term: sdk::Term| Term {
            adapter: term.adapter,
            coefficients: match term.coefficients {
                sdk::Coefficients::Uniform(c) => Coefficients::Uniform(c),
                sdk::Coefficients::PerRow(values) => Coefficients::PerRow(values.into()),
            },
        };
        let layer = |plan| match plan {
            sdk::LayerPlan::Factored(terms) => LayerPlan::Factored(terms.into_iter().map(term).collect()),
            sdk::LayerPlan::Dense(numbers) => LayerPlan::Dense(Arc::from(numbers)),
        };
        Ok(plan.into_iter().map(layer).collect())
    }

    fn fill(&self, tile: Tile<'_>, delta: &mut [f32]) -> Result<()> {
        let layer = sdk::Layer { name: tile.layer.name.clone(), rows: tile.layer.rows, columns: tile.layer.columns };
        // The plugin finds an adapter's factors by the layer's index; those of the layers before it are not needed.
        let adapters = adapters(tile.index + 1, tile.adapters);
        let tile = sdk::Tile {
            index: tile.index,
            layer: &layer,
            adapters: &adapters,
            numbers: tile.numbers,
            rows: tile.first_row..tile.first_row + tile.rows,
        };
        inside(self.place.as_ref(), || self.strategy.fill(&tile, delta)).map_err(|e| self.failed(e))
    }
}
