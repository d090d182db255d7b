//! The plugins of this build.
#![allow(clippy::unwrap_used, dead_code)]

pub mod live;

use std::sync::{Arc, OnceLock};

use blocklora_engine::sample::Sampler;
use blocklora_service::plugins::{Options, Plugins};
use serde_json::Value;
use tempfile::TempDir;

/// A host of its own, with records of its own.
pub fn host(folder: &TempDir, change: impl FnOnce(&mut Options)) -> Plugins {
    let mut options = Options { state: folder.path().join("state"), ..Options::default() };
    change(&mut options);
    Plugins::new(options)
}

/// The host that the tests of one binary share.
pub fn plugins() -> &'static Plugins {
    static PLUGINS: OnceLock<(TempDir, Plugins)> = OnceLock::new();
    &PLUGINS
        .get_or_init(|| {
            let folder = tempfile::tempdir().unwrap();
            let plugins = host(&folder, |_| ());
            (folder, plugins)
        })
        .1
}

/// A sampler by its usual name.
pub fn sampler(name: &str) -> Arc<dyn Sampler> {
    plugins().sampler(name, &Value::Null).unwrap()
}
