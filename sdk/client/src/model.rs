//! A registered model.

use serde::{Deserialize, Serialize};
use zbus::proxy::CacheProperties;
use zbus::{Connection, ObjectPath, OwnedObjectPath};

use crate::composition::Composition;
use crate::error::Result;
use crate::properties;
use crate::proxies::{Dict, ModelProxy};
use crate::requests::{Entry, entries};
use crate::value::{self, Options};

/// A model that the daemon knows.
#[derive(Clone, Debug)]
pub struct Model {
    proxy: ModelProxy<'static>,
}

/// The properties of a model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all(deserialize = "PascalCase"))]
pub struct ModelState {
    /// Its id.
    pub id: String,
    /// Digest of its weights; "" before it has been loaded once.
    pub digest: String,
    /// What adapters depend on; "" before it has been loaded once.
    pub architecture: String,
    /// The device that holds it; "" while it is not loaded.
    pub device: String,
    /// Storage type of its weights; "" while it is not loaded.
    pub precision: String,
    /// "unloaded", "loading", "loaded", "missing" or "failed".
    pub state: String,
    /// Why it is missing or failed: error name and message.
    pub problem: (String, String),
    /// Memory that it takes; 0 while it is not loaded.
    pub resident_bytes: u64,
    /// Its folder.
    pub path: String,
    /// The size of its pictures, pixels; 0 before it has been loaded once.
    pub width: u32,
    /// Likewise.
    pub height: u32,
    /// Sizes of pictures are multiples of this; 0 before it has been loaded once.
    pub size_multiple: u32,
}

impl Model {
    pub(crate) async fn new(connection: &Connection, path: OwnedObjectPath) -> Result<Self> {
        let proxy = ModelProxy::builder(connection).path(path).cache_properties(CacheProperties::No).build().await?;
        Ok(Self { proxy })
    }

    /// Its object path.
    pub fn path(&self) -> &ObjectPath<'static> {
        self.proxy.inner().path()
    }

    /// The interface itself.
    pub fn proxy(&self) -> &ModelProxy<'static> {
        &self.proxy
    }

    /// How it is now.
    pub async fn state(&self) -> Result<ModelState> {
        let proxy = self.proxy.inner();
        let interface = "org.blocklora.Daemon1.Model";
        value::read(&properties::all(proxy.connection(), proxy.path().as_str(), interface).await?)
    }

    /// Makes a set of adapters that jobs can name. `options`: strategy, strategy_config, lifetime.
    pub async fn compose(&self, set: &[Entry], options: Options) -> Result<Composition> {
        let path = self.proxy.compose(&entries(set), &options.into_dict()).await?;
        Composition::new(self.proxy.inner().connection(), path).await
    }

    /// Frees its memory.
    pub async fn unload(&self) -> Result<()> {
        Ok(self.proxy.unload(&Dict::new()).await?)
    }

    /// How long it stays loaded after its last use, microseconds.
    pub async fn keep_alive(&self, usec: u64) -> Result<()> {
        Ok(self.proxy.set_keep_alive(usec, &Dict::new()).await?)
    }
}
