//! A model with adapters in this process: what `score` works on. `import` loads a model alone.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, bail};
use blocklora_engine::bake::baked_concepts;
use blocklora_engine::merge::strategy::MergeStrategy;
use blocklora_engine::merge::{AdapterFactors, MergeReport, Merger, Target};
use blocklora_engine::model::Model;
use blocklora_engine::nn::LayerId;
use blocklora_engine::text;
use blocklora_engine::{DType, Device};
use blocklora_spec::Adapter;

use crate::args::{OwnModelArgs, Precision};
use crate::{base, progress};

impl From<Precision> for DType {
    fn from(precision: Precision) -> Self {
        match precision {
            Precision::F32 => Self::F32,
            Precision::F16 => Self::F16,
            Precision::Bf16 => Self::BF16,
        }
    }
}

/// Loads the model that `args` names.
pub fn open_model(args: &OwnModelArgs) -> anyhow::Result<Model> {
    let folder = base::folder(args.base.as_deref())?;
    load_model(&folder, args.precision.into())
}

/// Loads the model in `folder`.
pub fn load_model(folder: &Path, precision: DType) -> anyhow::Result<Model> {
    let spinner = progress::spinner("loading the model");
    let model = Model::load(folder, &Device::Cpu, precision);
    spinner.finish_and_clear();
    Ok(model?)
}

/// The words that `adapter` adds.
fn concept_of(adapter: &Adapter) -> text::Concept {
    let token = |t: &blocklora_spec::TokenVectors| text::TokenVectors {
        name: t.name.clone(),
        layers: t.layers,
        width: t.width,
        values: t.values.clone(),
    };
    text::Concept { name: adapter.manifest().name.clone(), tokens: adapter.tokens().iter().map(token).collect() }
}

/// A model and the adapters that may be merged into it.
pub struct Session {
    /// The model; its live weights are those of the last [`Session::merge`].
    pub model: Model,
    /// The adapters, in the order given.
    pub adapters: Vec<Adapter>,
    /// The words that prompts may use: those built into the model, then those of the adapters.
    pub concepts: Vec<text::Concept>,
    factors: Vec<Arc<AdapterFactors>>,
    merger: Merger,
}

impl Session {
    /// Puts `model` and the adapters in `files` together; nothing is merged yet. Fails on an adapter of another base
    /// and on two concepts of one name.
    pub fn new<P: AsRef<Path>>(model: Model, files: &[P]) -> anyhow::Result<Self> {
        let adapters = files.iter().map(Adapter::open).collect::<Result<Vec<_>, _>>()?;
        for (i, adapter) in adapters.iter().enumerate() {
            check_base(adapter, &model)?;
            let name = &adapter.manifest().name;
            if let Some(other) = adapters[..i].iter().find(|a| a.manifest().name == *name) {
                bail!(
                    "{} and {}: both concepts are called {name:?}: leave one out, or train it again with another --name",
                    other.path().display(),
                    adapter.path().display()
                );
            }
        }
        let factors =
            adapters.iter().map(|a| AdapterFactors::from_adapter(a).map(Arc::new)).collect::<Result<Vec<_>, _>>()?;
        let target = |(i, info): (usize, &blocklora_engine::merge::strategy::LayerInfo)| Target {
            info: info.clone(),
            live: model.live(LayerId(i)).clone(),
            pristine: model.pristine(LayerId(i)).clone(),
        };
        let merger = Merger::new(model.layers().iter().enumerate().map(target).collect())?;
        // A folder written by `merge` already has concepts of its own.
        let mut concepts = baked_concepts(model.dir())?;
        for adapter in &adapters {
            let concept = concept_of(adapter);
            if concepts.iter().any(|c| c.name == concept.name) {
                bail!(
                    "{}: the concept {:?} is already built into {}: leave it out",
                    adapter.path().display(),
                    concept.name,
                    model.dir().display()
                );
            }
            concepts.push(concept);
        }
        Ok(Self { model, adapters, concepts, factors, merger })
    }

    /// The adapters' factors, in the order of the adapters.
    pub fn factors(&self) -> impl Iterator<Item = &AdapterFactors> {
        self.factors.iter().map(Arc::as_ref)
    }

    /// Makes the adapters with these positions and weights the composition, whatever was merged before.
    pub fn merge(&mut self, set: &[(usize, f32)], strategy: &Arc<dyn MergeStrategy>) -> anyhow::Result<MergeReport> {
        let set = set.iter().map(|&(i, weight)| {
            let factors = self.factors.get(i).with_context(|| format!("there is no adapter {i}"))?;
            Ok((factors.clone(), weight))
        });
        Ok(self.merger.apply(&set.collect::<anyhow::Result<Vec<_>>>()?, strategy)?)
    }
}

fn check_base(adapter: &Adapter, model: &Model) -> anyhow::Result<()> {
    let base = &adapter.manifest().base;
    let (architecture, digest) = (model.architecture(), model.digest());
    if base.architecture != architecture {
        bail!(
            "{}: made for the model {}, but {} is {architecture}: give the base model it was trained on with --base",
            adapter.path().display(),
            base.architecture,
            model.dir().display()
        );
    }
    if base.digest != digest {
        bail!(
            "{}: trained on other weights ({:.12}) than those in {} ({digest:.12}): give the base model it was trained \
             on with --base",
            adapter.path().display(),
            base.digest,
            model.dir().display()
        );
    }
    Ok(())
}
