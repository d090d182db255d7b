//! An adapter that is registered or opened.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use zbus::proxy::CacheProperties;
use zbus::{Connection, ObjectPath, OwnedObjectPath};

use crate::error::Result;
use crate::job::read_files;
use crate::properties;
use crate::proxies::{AdapterProxy, Dict};
use crate::results::ResultFile;
use crate::value::{self, Options, object_of};

/// An adapter that the daemon knows.
#[derive(Clone, Debug)]
pub struct Adapter {
    proxy: AdapterProxy<'static>,
}

/// The properties of an adapter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all(deserialize = "PascalCase"))]
pub struct AdapterState {
    /// The concept's name.
    pub name: String,
    /// Digest of the file.
    pub digest: String,
    /// The format's version.
    pub spec_version: String,
    /// Of the model that it was trained on.
    pub architecture: String,
    /// Digest of that model.
    pub base_digest: String,
    /// The trainer's id.
    pub algorithm: String,
    /// The trainer's version, and the digest of its plugin.
    pub producer: (String, String),
    /// "subject", "person", "scene" or "style".
    pub kind: String,
    /// The word for what it is.
    pub class_word: String,
    /// Of the factors.
    pub rank: u32,
    /// The rows that it owns: scheme, capacity, seed, slot; empty: all.
    pub partition: Map<String, Value>,
    /// Size of the file.
    pub size_bytes: u64,
    /// Error name and message of each problem.
    pub problems: Vec<(String, String)>,
}

impl Adapter {
    pub(crate) async fn new(connection: &Connection, path: OwnedObjectPath) -> Result<Self> {
        let proxy = AdapterProxy::builder(connection).path(path).cache_properties(CacheProperties::No).build().await?;
        Ok(Self { proxy })
    }

    /// Its object path.
    pub fn path(&self) -> &ObjectPath<'static> {
        self.proxy.inner().path()
    }

    /// The interface itself.
    pub fn proxy(&self) -> &AdapterProxy<'static> {
        &self.proxy
    }

    /// What it is.
    pub async fn state(&self) -> Result<AdapterState> {
        let proxy = self.proxy.inner();
        let interface = "org.blocklora.Daemon1.Adapter";
        value::read(&properties::all(proxy.connection(), proxy.path().as_str(), interface).await?)
    }

    /// All that its file says: manifest (JSON), layers, tokens, size, added_usec.
    pub async fn inspect(&self) -> Result<Map<String, Value>> {
        Ok(object_of(&self.proxy.inspect(&Dict::new()).await?))
    }

    /// Its files in `format`: "blocklora", "kohya", "diffusers", "peft" or "textual-inversion".
    pub async fn export(&self, format: &str) -> Result<Vec<ResultFile>> {
        read_files(self.proxy.export(format, &Dict::new()).await?)
    }

    /// Takes the object away; with `remove` also its file and its entry in the library.
    pub async fn unregister(&self, remove: bool) -> Result<()> {
        Ok(self.proxy.unregister(&Options::new().with("remove", remove).into_dict()).await?)
    }
}
