//! A method: merge strategy, trainer or sampler.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use zbus::proxy::CacheProperties;
use zbus::{Connection, ObjectPath, OwnedObjectPath};

use crate::error::Result;
use crate::job::Job;
use crate::properties;
use crate::proxies::{Dict, PluginProxy};
use crate::value;

/// A plugin that the daemon knows.
#[derive(Clone, Debug)]
pub struct Plugin {
    proxy: PluginProxy<'static>,
}

/// The properties of a plugin.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all(deserialize = "PascalCase"))]
pub struct PluginState {
    /// Its id.
    pub id: String,
    /// Its version.
    pub version: String,
    /// JSON Schema of its settings.
    pub config_schema: String,
    /// "enabled", "disabled", "quarantined" or "incompatible".
    pub state: String,
    /// Digest of its file; "" if it is built in.
    pub digest: String,
    /// Its ABI version, major and minor; (0, 0) if it is built in.
    pub abi_version: (u32, u32),
    /// "sampler", "merge-strategy", "trainer".
    pub kinds: Vec<String>,
    /// Why it is in its state: error name and message.
    pub reason: (String, String),
    /// How often it crashed.
    pub crashes: u32,
}

impl Plugin {
    pub(crate) async fn new(connection: &Connection, path: OwnedObjectPath) -> Result<Self> {
        let proxy = PluginProxy::builder(connection).path(path).cache_properties(CacheProperties::No).build().await?;
        Ok(Self { proxy })
    }

    /// Its object path.
    pub fn path(&self) -> &ObjectPath<'static> {
        self.proxy.inner().path()
    }

    /// How it is now.
    pub async fn state(&self) -> Result<PluginState> {
        let proxy = self.proxy.inner();
        let interface = "org.blocklora.Daemon1.Plugin";
        value::read(&properties::all(proxy.connection(), proxy.path().as_str(), interface).await?)
    }

    /// "enabled", "disabled", or "cleared" to end a quarantine.
    pub async fn set_state(&self, state: &str) -> Result<()> {
        Ok(self.proxy.set_state(state, &Dict::new()).await?)
    }

    /// Runs its conformance tests up to `level`, 0 (loads) to 3 (everything); the job gives "report", JSON.
    pub async fn validate(&self, level: u32) -> Result<Job<Map<String, Value>>> {
        let path = self.proxy.validate(level, &Dict::new()).await?;
        Job::new(self.proxy.inner().connection(), path).await
    }
}
