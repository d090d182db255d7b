//! Adapters' factors in memory: the least recently used go first.

use std::sync::Arc;

use blocklora_engine::merge::AdapterFactors;
use blocklora_engine::text;
use blocklora_spec::Adapter;

use crate::catalogue::adapters::AdapterEntry;
use crate::daemon::Daemon;
use crate::error::Result;

/// An adapter, ready to be merged.
pub struct Loaded {
    /// What the file says of it.
    pub entry: AdapterEntry,
    /// Its factors.
    pub factors: Arc<AdapterFactors>,
    /// The words that it adds.
    pub concept: text::Concept,
    bytes: u64,
}

impl Loaded {
    fn new(adapter: &Adapter) -> Result<Self> {
        let factors = AdapterFactors::from_adapter(adapter)?;
        let token = |t: &blocklora_spec::TokenVectors| text::TokenVectors {
            name: t.name.clone(),
            layers: t.layers,
            width: t.width,
            values: t.values.clone(),
        };
        let tokens: Vec<text::TokenVectors> = adapter.tokens().iter().map(token).collect();
        let words: usize = tokens.iter().map(|t| 4 * t.values.len()).sum();
        let bytes = (factors.bytes() + words) as u64;
        let concept = text::Concept { name: adapter.manifest().name.clone(), tokens };
        Ok(Self { entry: AdapterEntry::of(adapter, 0), factors: Arc::new(factors), concept, bytes })
    }
}

/// The adapters in memory, the last used one last.
#[derive(Default)]
pub struct Cache {
    list: Vec<Arc<Loaded>>,
}

impl Cache {
    /// The adapter `digest`, from memory or from the library.
    pub fn get(&mut self, daemon: &Daemon, digest: &str) -> Result<Arc<Loaded>> {
        let found = self.list.iter().position(|loaded| loaded.entry.digest == digest);
        let loaded = match found {
            Some(at) => self.list.remove(at),
            None => Arc::new(Loaded::new(&daemon.open_adapter(digest)?)?),
        };
        self.list.push(loaded.clone());
        Ok(loaded)
    }

    /// Their memory.
    pub fn bytes(&self) -> u64 {
        self.list.iter().map(|loaded| loaded.bytes).sum()
    }

    /// Frees the least recently used until at most `bytes` are left; how many were freed.
    pub fn shrink(&mut self, bytes: u64) -> u64 {
        let before = self.bytes();
        let mut left = before;
        let mut keep = 0;
        while left > bytes && keep < self.list.len() {
            left -= self.list[keep].bytes;
            keep += 1;
        }
        self.list.drain(..keep);
        before - left
    }
}
