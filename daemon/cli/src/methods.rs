//! Strategies, samplers and trainers: plugins, by the names that people use here.

use std::sync::{Arc, OnceLock};

use blocklora_engine::merge::strategy::MergeStrategy;
use blocklora_engine::sample::Sampler;
use blocklora_service::plugins::{Options, Plugins};
use serde_json::{Value, json};

use crate::args::{Clash, MergeArgs, Strategy};

/// The plugin host of this process.
pub fn plugins() -> &'static Plugins {
    static PLUGINS: OnceLock<Plugins> = OnceLock::new();
    PLUGINS.get_or_init(|| Plugins::new(Options::default()))
}

/// The strategy that `args` chooses.
pub fn strategy(args: &MergeArgs) -> anyhow::Result<Arc<dyn MergeStrategy>> {
    let clash = match args.on_clash {
        Clash::Refuse => "refuse",
        Clash::Mean => "mean",
    };
    let (id, settings) = match args.strategy {
        Strategy::Blocklora => ("blocklora", json!({"normalise": "owners", "clash": clash})),
        Strategy::BlockloraSum1 => ("blocklora", json!({"normalise": "sum1", "clash": clash})),
        Strategy::Average => ("weighted-average", Value::Null),
    };
    Ok(plugins().strategy(id, &settings)?)
}

/// The sampler `name`: its id, or another name that its manifest gives it.
pub fn sampler(name: &str) -> anyhow::Result<Arc<dyn Sampler>> {
    Ok(plugins().sampler(name, &Value::Null)?)
}
