//! Adapters that clients brought without adding them to the library.

use std::os::fd::{AsFd, OwnedFd};

use blocklora_spec::Adapter;
use blocklora_spec::limits::FILE_BYTES_MAX;

use super::{Daemon, descriptors, lock};
use crate::catalogue::adapters::AdapterEntry;
use crate::dbus::library::{show, show_found};
use crate::error::{Error, Kind, Result};
use crate::jobs::Owner;
use crate::memfd;
use crate::objects::path_of;

/// An adapter in memory, for as long as one of its clients is connected.
pub(super) struct Loose {
    file: OwnedFd,
    entry: AdapterEntry,
    clients: Vec<String>,
}

impl Loose {
    fn is_of(&self, client: &str) -> bool {
        self.clients.iter().any(|other| other == client)
    }
}

const CURE: &str = "unregister some, or register them in the library";

/// Fails if `size` bytes more are too many for a client that brought `bytes`.
fn check_bytes(bytes: u64, size: u64, most: u64) -> Result<()> {
    if bytes.saturating_add(size) <= most {
        return Ok(());
    }
    let message = format!(
        "the adapters of this connection have {bytes} bytes; with {size} more they are above the {most} of \
         limits.adapter_bytes_per_client_max; {CURE}"
    );
    Err(Error::new(Kind::NotSupported, message))
}

impl Daemon {
    /// Takes an adapter from a client until its connection ends, and shows it; its path. The file is kept also where the
    /// library has one: that may be damaged, or go.
    pub fn add_loose(&self, fd: impl AsFd, what: &str, owner: &Owner) -> Result<String> {
        // Before all of it is read: more than all that the client may bring is not.
        let most = self.config().limits.adapter_bytes_per_client_max;
        if let Ok(size) = memfd::size(&fd)
            && size <= FILE_BYTES_MAX
        {
            check_bytes(0, size, most)?;
        }
        let bytes = memfd::read_client_file(fd, FILE_BYTES_MAX, what)?;
        let file = memfd::sealed("adapter", &bytes)?;
        let size = bytes.len() as u64;
        let mut entry = AdapterEntry::of(&Adapter::from_bytes(what, bytes)?, size);
        if let Ok(known) = self.catalogue.find_adapter(&entry.digest) {
            entry.added_usec = known.added_usec;
        }
        // Until it is shown: `client_gone` then finds all of it, or nothing.
        let mut loose = lock(&self.loose);
        self.check_connected(&owner.client)?;
        let known = loose.get(&entry.digest);
        if known.is_none_or(|held| !held.is_of(&owner.client)) {
            let brought = loose.values().filter(|held| held.is_of(&owner.client)).map(|held| held.entry.size).sum();
            check_bytes(brought, size, most)?;
        }
        if known.is_none() {
            descriptors::check(loose.len(), descriptors::for_adapters(), "adapters of connections are open", CURE)?;
        }
        let held = loose.entry(entry.digest.clone()).or_insert(Loose { file, entry, clients: Vec::new() });
        if !held.is_of(&owner.client) {
            held.clients.push(owner.client.clone());
        }
        Ok(show(self, held.entry.clone(), Some(owner.uid)))
    }

    /// The adapter that `text` names, in the library or brought by a client.
    pub fn find_adapter(&self, text: &str) -> Result<AdapterEntry> {
        let held = |digest: &str| lock(&self.loose).get(digest).map(|held| held.entry.clone());
        if let Some(entry) = held(text) {
            return Ok(entry);
        }
        let known = self.catalogue.find_adapter(text)?;
        Ok(held(&known.digest).unwrap_or(known))
    }

    /// Opens an adapter of the library or of a client.
    pub fn open_adapter(&self, digest: &str) -> Result<Adapter> {
        match self.read_loose(digest)? {
            Some((bytes, name)) => Ok(Adapter::from_bytes(name, bytes)?),
            None => {
                let opened = self.catalogue.open_adapter(digest);
                show_found(self, digest);
                opened
            }
        }
    }

    /// The file of an adapter of the library or of a client, byte for byte.
    pub fn read_adapter(&self, digest: &str) -> Result<Vec<u8>> {
        if let Some((bytes, _)) = self.read_loose(digest)? {
            return Ok(bytes);
        }
        let path = self.catalogue.adapter_path(digest);
        std::fs::read(&path).map_err(|e| Error::io(path.display(), &e))
    }

    /// The content of a client's adapter, and what to call it in errors. It has no path: one by its descriptor's number
    /// would soon name another file.
    fn read_loose(&self, digest: &str) -> Result<Option<(Vec<u8>, String)>> {
        let (file, name) = match lock(&self.loose).get(digest) {
            Some(held) => (held.file.try_clone(), format!("adapter {:?}", held.entry.name)),
            None => return Ok(None),
        };
        let file = file.map_err(|e| Error::io(&name, &e))?;
        Ok(Some((memfd::read_client_file(&file, FILE_BYTES_MAX, &name)?, name)))
    }

    /// The client no longer needs the adapter as an object. It stays for those who brought its file, too.
    pub fn hide_adapter(&self, digest: &str, client: &str) {
        let mut loose = lock(&self.loose);
        if let Some(held) = loose.get_mut(digest) {
            held.clients.retain(|other| other != client);
            if !held.clients.is_empty() {
                return;
            }
            loose.remove(digest);
        }
        self.remove_object(&path_of("adapter", digest));
    }

    /// What the client brought goes, unless others brought it, too. What the library has stays an object.
    pub(super) fn drop_loose(&self, client: &str) {
        lock(&self.loose).retain(|digest, held| {
            held.clients.retain(|other| other != client);
            if held.clients.is_empty() {
                match self.catalogue.find_adapter(digest) {
                    Ok(known) => drop(show(self, known, None)),
                    Err(_) => drop(self.remove_object(&path_of("adapter", digest))),
                }
            }
            !held.clients.is_empty()
        });
    }
}
