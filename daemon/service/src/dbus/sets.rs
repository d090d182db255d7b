//! Sets of adapters, as callers name them: looked up, checked against the model and against each other.

use std::sync::Arc;

use blocklora_engine::merge::AdapterFactors;
use blocklora_engine::merge::strategy::{AdapterView, Factors, LayerInfo};
use serde_json::{Map, Value};

use super::call::Call;
use super::value::Options;
use crate::catalogue::adapters::AdapterEntry;
use crate::daemon::Daemon;
use crate::error::{Error, Kind, Result};
use crate::jobs::work::{Entry, Set};
use crate::objects::Object;

/// Adapters of one set.
const ENTRIES_MAX: usize = 1024;

/// The adapters that a(oa{sv}) names, and what the catalogue knows of each.
pub async fn entries_of(call: &Call, list: Vec<(String, Options)>) -> Result<Vec<(Entry, AdapterEntry)>> {
    if list.len() > ENTRIES_MAX {
        return Err(Error::option(format!("{} adapters; at most {ENTRIES_MAX} are allowed", list.len())));
    }
    let mut entries = Vec::new();
    for (index, (path, mut options)) in list.into_iter().enumerate() {
        let weight = options.f64("weight")?.unwrap_or(1.0) as f32;
        if !weight.is_finite() {
            return Err(Error::option(format!("adapters[{index}]: weight = {weight}: must be finite")));
        }
        let text = options.string("digest")?;
        options.finish().map_err(|e| e.context(format!("adapters[{index}]")))?;
        let known = match (call.daemon.object(&path), text) {
            (Some(Object::Adapter(adapter)), None) => adapter.entry.clone(),
            (_, Some(text)) if path == "/" => call.blocking(move |d| d.find_adapter(&text)).await?,
            (_, None) if path == "/" => {
                return Err(Error::option(format!("adapters[{index}]: give an object or the key \"digest\"")));
            }
            (_, Some(_)) => {
                return Err(Error::option(format!("adapters[{index}]: give an object or \"digest\", not both")));
            }
            _ => return Err(Error::option(format!("adapters[{index}]: {path} is not an adapter"))),
        };
        entries.push((Entry { digest: known.digest.clone(), name: known.name.clone(), weight }, known));
    }
    Ok(entries)
}

/// The set of `entries` on the model, as far as it can be checked without opening files.
pub async fn set_of(
    call: &Call,
    model: &str,
    entries: Vec<(Entry, AdapterEntry)>,
    strategy: Option<String>,
    config: Option<Map<String, Value>>,
) -> Result<Set> {
    let model = call.daemon.model(model)?;
    let (architecture, digest) = {
        let state = model.state();
        (state.architecture.clone(), state.digest.clone())
    };
    for (index, (entry, known)) in entries.iter().enumerate() {
        for (other, _) in &entries[..index] {
            if other.digest == entry.digest {
                let message =
                    format!("adapter {:?} is given twice; give it once, with the sum of the weights", entry.name);
                return Err(Error::option(message));
            }
            if other.name == entry.name {
                let message =
                    format!("two adapters are called {:?}, so that a prompt cannot tell them apart", entry.name);
                return Err(Error::option(message));
            }
        }
        check_base(known, &model.id, &architecture, &digest)?;
    }
    let strategy =
        strategy.filter(|id| !id.is_empty()).unwrap_or_else(|| call.daemon.config().plugins.merge_strategy.clone());
    let strategy_config = config.unwrap_or_default();
    let wanted = (strategy.clone(), strategy_config.clone());
    call.blocking(move |daemon| daemon.methods.strategy(&wanted.0, &wanted.1).map(drop)).await?;
    Ok(Set { entries: entries.into_iter().map(|(entry, _)| entry).collect(), strategy, strategy_config })
}

/// Fails on an adapter of another model; what is not known of the model yet is not compared.
pub fn check_base(adapter: &AdapterEntry, model: &str, architecture: &str, digest: &str) -> Result<()> {
    let wrong = |reason: String| Err(Error::new(Kind::IncompatibleArchitecture, reason));
    if !architecture.is_empty() && adapter.architecture != architecture {
        return wrong(format!(
            "adapter {:?} was made for the model {}, but {model:?} is {architecture}",
            adapter.name, adapter.architecture
        ));
    }
    if !digest.is_empty() && adapter.base_digest != digest {
        return wrong(format!(
            "adapter {:?} was trained on other weights ({:.12}) than those of {model:?} ({digest:.12})",
            adapter.name, adapter.base_digest
        ));
    }
    Ok(())
}

/// Why two adapters own the same rows, if they do: (one, other, reason).
pub fn clashes(adapters: &[AdapterEntry]) -> Vec<(u32, u32, String)> {
    let mut found = Vec::new();
    for (i, one) in adapters.iter().enumerate() {
        for (j, other) in adapters.iter().enumerate().skip(i + 1) {
            let reason = match (&one.partition, &other.partition) {
                (Some(p), Some(q)) if !p.same_division(q) => Some("they divide the rows differently".to_owned()),
                (Some(p), Some(q)) => (p.slot == q.slot).then(|| format!("both own slot {}", p.slot)),
                (None, None) => Some("both own all rows".to_owned()),
                (None, Some(_)) => Some(format!("{:?} owns all rows", one.name)),
                (Some(_), None) => Some(format!("{:?} owns all rows", other.name)),
            };
            found.extend(reason.map(|reason| (i as u32, j as u32, reason)));
        }
    }
    found
}

/// An adapter as a strategy sees it.
struct View<'a> {
    factors: &'a AdapterFactors,
    weight: f32,
    layers: &'a [LayerInfo],
}

impl AdapterView for View<'_> {
    fn name(&self) -> &str {
        self.factors.name()
    }
    fn digest(&self) -> &str {
        self.factors.digest()
    }
    fn weight(&self) -> f32 {
        self.weight
    }
    fn factors(&self, layer: usize) -> Option<Factors<'_>> {
        let found = self.factors.layer(&self.layers.get(layer)?.name)?;
        let scale = self.factors.scale();
        Some(Factors { a: &found.a, b: &found.b, rows: &found.rows, rank: found.rank, scale })
    }
}

/// The factors of every adapter of a set, in its order.
pub fn load_factors(daemon: &Daemon, set: &Set) -> Result<Vec<Arc<AdapterFactors>>> {
    let load = |entry: &Entry| Ok(Arc::new(AdapterFactors::from_adapter(&daemon.open_adapter(&entry.digest)?)?));
    set.entries.iter().map(load).collect()
}

/// Lets the set's strategy plan it, so that a set which cannot be merged is refused when it is made. Opens the files.
pub fn check_plan(daemon: &Daemon, set: &Set) -> Result<()> {
    let strategy = daemon.methods.strategy(&set.strategy, &set.strategy_config)?;
    let mut factors = load_factors(daemon, set)?.into_iter().zip(&set.entries).collect::<Vec<_>>();
    factors.retain(|(_, entry)| entry.weight != 0.0);
    factors.sort_by(|one, other| one.0.digest().cmp(other.0.digest()));
    let mut layers: Vec<LayerInfo> = Vec::new();
    for layer in factors.iter().flat_map(|(factors, _)| factors.layers()) {
        layers.push(LayerInfo { name: layer.name.clone(), rows: layer.outputs, columns: layer.columns });
    }
    layers.sort_by(|one, other| one.name.cmp(&other.name));
    layers.dedup();
    let views: Vec<View> =
        factors.iter().map(|(factors, entry)| View { factors, weight: entry.weight, layers: &layers }).collect();
    let views: Vec<&dyn AdapterView> = views.iter().map(|view| view as &dyn AdapterView).collect();
    if views.is_empty() {
        return Ok(());
    }
    strategy.plan(&layers, &views).map(drop).map_err(|e| plan_error(daemon, set, e))
}

/// The name of an error of planning: adapters that share rows are a conflict of slots.
pub fn plan_error(daemon: &Daemon, set: &Set, error: blocklora_engine::Error) -> Error {
    let error = Error::from(error);
    let known: Vec<AdapterEntry> =
        set.entries.iter().filter_map(|entry| daemon.find_adapter(&entry.digest).ok()).collect();
    let clashes = clashes(&known);
    if error.kind == Kind::IncompatibleArchitecture && !clashes.is_empty() {
        return Error { kind: Kind::SlotConflict, ..error };
    }
    error
}
