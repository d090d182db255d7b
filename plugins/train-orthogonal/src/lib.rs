//! Orthogonal Adaptation: every concept has its own directions of a layer's input, and they are orthogonal.

mod basis;

use std::cell::RefCell;
use std::collections::BTreeMap;

use blocklora_sdk::merge::Layer;
use blocklora_sdk::rng::Rng;
use blocklora_sdk::train::{
    Concept, ConceptSettings, LayerChoice, LearningRates, Parameters, Recipe, StartA, TrainHost, TrainPlan, Trainer,
    train_concept,
};
use blocklora_sdk::{Config, Error, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use basis::Basis;

/// Which rows of the basis a concept gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Allocation {
    /// r rows at random in each layer, by the job's seed and the concept's name: as published. Nobody needs to agree on
    /// anything, but two concepts share r * r / n rows on average (1.25 at n = 320, r = 20).
    #[default]
    Random,
    /// Rows slot * r to slot * r + r in every layer: concepts of one basis, one rank and different slots share none.
    /// There are n / r slots, 16 at n = 320, r = 20.
    Allocated,
}

/// Trains B alone, from zero; A is made of rows of an orthogonal matrix that all concepts share, one for each input width
/// n (Po et al., "Orthogonal adaptation for modular customization of diffusion models", CVPR 2024).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Orthogonal {
    /// What it shares with other methods.
    #[serde(flatten)]
    pub settings: ConceptSettings,
    /// Which rows of the basis the concept gets.
    pub allocation: Allocation,
    /// The concept's slot, with allocation = "allocated"; another one for each concept. It is a slot of the layers' inputs,
    /// not of a partition of their rows, so that the daemon leases none: the strategy `orthogonal` refuses two adapters
    /// of one slot.
    pub slot: usize,
    /// Seed of the basis; concepts that are to be merged need the same.
    pub basis_seed: u64,
}

impl Default for Orthogonal {
    fn default() -> Self {
        let settings = ConceptSettings {
            rank: 20,
            learning_rate: LearningRates { tokens: 1e-3, text_encoder: 1e-5, unet: 1e-5 },
            layers: LayerChoice::All,
            ..ConceptSettings::default()
        };
        Self { settings, allocation: Allocation::Random, slot: 0, basis_seed: 0 }
    }
}

impl Config for Orthogonal {
    fn check(&self) -> Result<()> {
        if self.allocation == Allocation::Random && self.slot != 0 {
            return Err(Error::config("slot", self.slot, "means nothing without allocation = \"allocated\""));
        }
        self.settings.check()
    }
}

impl Orthogonal {
    /// The numbers of the rows of the basis that make A in `layer`.
    fn rows(&self, layer: &Layer, rng: &mut Rng) -> Result<Vec<usize>> {
        let (n, r) = (layer.columns, self.settings.rank);
        if r > n {
            let reason = format!("must be at most {n}, the inputs of {}", layer.name);
            return Err(Error::config("rank", r, reason));
        }
        match self.allocation {
            Allocation::Random => {
                let mut all: Vec<usize> = (0..n).collect();
                rng.shuffle(&mut all);
                all.truncate(r);
                Ok(all)
            }
            Allocation::Allocated if self.slot < n / r => Ok((self.slot * r..self.slot * r + r).collect()),
            Allocation::Allocated => {
                let reason = format!(
                    "must be below {}, since {} has {n} inputs, {r} for each concept; choose a smaller rank, or \
                     allocation = \"random\"",
                    n / r,
                    layer.name
                );
                Err(Error::config("slot", self.slot, reason))
            }
        }
    }
}

impl Trainer for Orthogonal {
    fn plan(&self, concept: &Concept) -> Result<TrainPlan> {
        Ok(self.settings.plan(concept))
    }

    fn train(&self, host: &mut dyn TrainHost) -> Result<Parameters> {
        self.check()?;
        let bases = RefCell::new(BTreeMap::new());
        let frozen_a = |_index: usize, layer: &Layer, rng: &mut Rng| {
            let mut bases = bases.borrow_mut();
            let basis = bases.entry(layer.columns).or_insert_with(|| Basis::new(self.basis_seed, layer.columns));
            Ok(self.rows(layer, rng)?.into_iter().flat_map(|i| basis.row(i)).collect())
        };
        train_concept(host, &Recipe { start_a: StartA::Frozen(&frozen_a), ..Recipe::new(&self.settings) })
    }
}

blocklora_sdk::export_plugin! {
    train: Orthogonal,
    id: "orthogonal",
    manifest: include_str!("../train-orthogonal.toml"),
}
