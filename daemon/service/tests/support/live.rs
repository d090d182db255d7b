//! The starter model in memory, with adapters merged into its weights.
#![allow(clippy::unwrap_used, dead_code)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use blocklora_engine::merge::strategy::{MergeStrategy, Sum};
use blocklora_engine::merge::{AdapterFactors, Merger, Target};
use blocklora_engine::model::Model;
use blocklora_engine::nn::LayerId;
use blocklora_engine::{DType, Device};
use blocklora_spec::Adapter;

/// A model and what is merged into it.
pub struct Live {
    pub model: Model,
    pub merger: Merger,
    pub adapters: Vec<(Arc<AdapterFactors>, f32)>,
}

/// The bundled starter: `model`, `adapters`, `concepts`.
pub fn starter() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("starter")
}

impl Live {
    /// The starter with these of its adapters, each at its weight, known but not merged.
    pub fn open(adapters: &[(&str, f32)]) -> Self {
        let model = Model::load(&starter().join("model"), &Device::Cpu, DType::F32).unwrap();
        let target = |(index, info): (usize, &blocklora_engine::merge::strategy::LayerInfo)| Target {
            info: info.clone(),
            live: model.live(LayerId(index)).clone(),
            pristine: model.pristine(LayerId(index)).clone(),
        };
        let merger = Merger::new(model.layers().iter().enumerate().map(target).collect()).unwrap();
        let adapters = adapters.iter().map(|(name, weight)| {
            let file = Adapter::open(starter().join(format!("adapters/{name}.safetensors"))).unwrap();
            (Arc::new(AdapterFactors::from_adapter(&file).unwrap()), *weight)
        });
        Self { adapters: adapters.collect(), model, merger }
    }

    /// The same, all of them merged as they are.
    pub fn merged(adapters: &[(&str, f32)]) -> Self {
        let mut live = Self::open(adapters);
        live.merge(&(Arc::new(Sum) as Arc<dyn MergeStrategy>)).unwrap();
        live
    }

    /// Merges all adapters by `strategy`.
    pub fn merge(&mut self, strategy: &Arc<dyn MergeStrategy>) -> blocklora_engine::Result<()> {
        self.merger.apply(&self.adapters, strategy).map(drop)
    }

    /// Every live weight that can be merged into, layer by layer.
    pub fn weights(&self) -> Vec<Vec<f32>> {
        let layer = |index| self.model.live(LayerId(index)).flatten_all().unwrap().to_vec1().unwrap();
        (0..self.model.layers().len()).map(layer).collect()
    }

    /// Their bits, to be compared.
    pub fn bits(&self) -> Vec<u32> {
        self.weights().into_iter().flatten().map(f32::to_bits).collect()
    }
}
