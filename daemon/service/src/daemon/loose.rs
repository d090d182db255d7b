//! Adapters that clients brought without adding them to the library.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use blocklora_spec::Adapter;

use super::{Daemon, lock};
use crate::catalogue::adapters::AdapterEntry;
use crate::error::{Error, Result};
use crate::memfd;
use crate::objects::path_of;

/// An adapter in memory, for as long as one of its clients is connected.
pub(super) struct Loose {
    file: OwnedFd,
    entry: AdapterEntry,
    clients: Vec<String>,
}

impl Daemon {
    /// Takes an adapter from a client until its connection ends; one that the library has already is that one.
    pub fn add_loose(&self, fd: impl AsFd, what: &str, client: &str) -> Result<AdapterEntry> {
        let bytes = memfd::read_client_file(fd, blocklora_spec::limits::FILE_BYTES_MAX, what)?;
        let file = memfd::sealed("adapter", &bytes)?;
        let entry = AdapterEntry::of(
            &Adapter::from_bytes(what, bytes)?,
            rustix::fs::fstat(&file).map_or(0, |s| s.st_size as u64),
        );
        if let Ok(known) = self.catalogue.find_adapter(&entry.digest) {
            return Ok(known);
        }
        let mut loose = lock(&self.loose);
        let held = loose.entry(entry.digest.clone()).or_insert(Loose { file, entry, clients: Vec::new() });
        if !held.clients.iter().any(|other| other == client) {
            held.clients.push(client.to_owned());
        }
        Ok(held.entry.clone())
    }

    /// The adapter that `text` names, in the library or brought by a client.
    pub fn find_adapter(&self, text: &str) -> Result<AdapterEntry> {
        if let Some(held) = lock(&self.loose).get(text) {
            return Ok(held.entry.clone());
        }
        self.catalogue.find_adapter(text)
    }

    /// Opens an adapter of the library or of a client.
    pub fn open_adapter(&self, digest: &str) -> Result<Adapter> {
        let held = lock(&self.loose).get(digest).map(|held| held.file.try_clone());
        match held {
            Some(file) => {
                let file = file.map_err(|e| Error::io("adapter", &e))?;
                // Sealed memory: what is mapped cannot change.
                Ok(Adapter::open(format!("/proc/self/fd/{}", file.as_raw_fd()))?)
            }
            None => self.catalogue.open_adapter(digest),
        }
    }

    pub(super) fn drop_loose(&self, client: &str) {
        let mut gone = Vec::new();
        lock(&self.loose).retain(|digest, held| {
            held.clients.retain(|other| other != client);
            if held.clients.is_empty() {
                gone.push(digest.clone());
            }
            !held.clients.is_empty()
        });
        for digest in gone {
            if self.catalogue.find_adapter(&digest).is_err() {
                self.remove_object(&path_of("adapter", &digest));
            }
        }
    }
}
