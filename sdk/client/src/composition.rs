//! A set of adapters with weights.

use serde_json::{Map, Value};
use zbus::proxy::CacheProperties;
use zbus::{Connection, ObjectPath, OwnedObjectPath};

use crate::error::Result;
use crate::proxies::{CompositionProxy, Dict};
use crate::requests::{Entry, entries};
use crate::value::{Options, object_of};

/// A set that the daemon keeps; dropping this does not close it.
#[derive(Clone, Debug)]
pub struct Composition {
    proxy: CompositionProxy<'static>,
}

impl Composition {
    pub(crate) async fn new(connection: &Connection, path: OwnedObjectPath) -> Result<Self> {
        let builder = CompositionProxy::builder(connection).path(path).cache_properties(CacheProperties::No);
        Ok(Self { proxy: builder.build().await? })
    }

    /// Its object path, as a target of [`crate::Generate`].
    pub fn path(&self) -> &ObjectPath<'static> {
        self.proxy.inner().path()
    }

    /// The interface itself.
    pub fn proxy(&self) -> &CompositionProxy<'static> {
        &self.proxy
    }

    /// Another set, if nobody changed it since `if_generation`; its new generation. Errors:
    /// [`crate::ErrorKind::GenerationConflict`].
    pub async fn swap(&self, set: &[Entry], if_generation: u64, options: Options) -> Result<u64> {
        Ok(self.proxy.swap(&entries(set), if_generation, &options.into_dict()).await?)
    }

    /// Counts changes; 1 when made.
    pub async fn generation(&self) -> Result<u64> {
        Ok(self.proxy.generation().await?)
    }

    /// How much its adapters get in each other's way; with `layers` also layer by layer.
    pub async fn explain(&self, layers: bool) -> Result<Map<String, Value>> {
        Ok(object_of(&self.proxy.explain(&Options::new().with("layers", layers).into_dict()).await?))
    }

    /// Other weights for some of its adapters; its new generation.
    pub async fn set_weights(&self, weights: &[(&crate::Adapter, f64)]) -> Result<u64> {
        let weights: Vec<(ObjectPath<'_>, f64)> = weights.iter().map(|(a, w)| (a.path().clone(), *w)).collect();
        Ok(self.proxy.set_weights(&weights, &Dict::new()).await?)
    }

    /// The object goes; queued jobs keep their set.
    pub async fn close(self) -> Result<()> {
        Ok(self.proxy.close().await?)
    }
}
