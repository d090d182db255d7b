//! What lives with a client's connection.

use super::{Daemon, descriptors, lock};
use crate::error::{Error, Kind, Result};
use crate::jobs::{Lifetime, Stop};
use crate::objects::{CompositionObject, Object, Objects, path_of};

impl Daemon {
    /// Shows what a client's call made. A call may end after its client has gone: what lives with the connection is
    /// refused then, since nothing would ever end it.
    pub fn add_owned(&self, path: &str, object: Object) -> Result<()> {
        let properties = object.properties(self);
        // Held all the time: `client_gone` looks at the objects when the client is no longer connected, so that either
        // it finds this one, or the client is found to have gone here.
        let mut objects = lock(&self.objects);
        if let Some(client) = object.lives_with() {
            self.check_connected(client)?;
        }
        if let Object::Composition(composition) = &object {
            check_compositions(&objects, composition, self.config().limits.compositions_per_client_max)?;
        }
        if objects.contains_key(path) {
            return Err(Error::option("option \"token\": it is in use"));
        }
        self.hub.added(path, &object, &properties);
        lock(&self.told).insert(path.to_owned(), properties);
        objects.insert(path.to_owned(), object);
        Ok(())
    }

    /// Fails if the client has gone.
    pub fn check_connected(&self, client: &str) -> Result<()> {
        if self.hub.is_connected(client) {
            return Ok(());
        }
        Err(Error::new(Kind::Cancelled, format!("the client {client} has gone")))
    }

    /// Fails where no more previews can be watched.
    pub fn check_previews(&self) -> Result<()> {
        let open: usize = self.jobs().iter().map(|job| job.previews.watchers()).sum();
        descriptors::check(open, descriptors::for_previews(), "previews are watched", "close some")
    }

    /// A client has gone, and is no longer among those that are connected: what lived with its connection ends.
    pub fn client_gone(&self, client: &str) {
        self.drop_loose(client);
        for (path, object) in self.objects() {
            if object.lives_with() != Some(client) {
                continue;
            }
            match object {
                Object::Job(job) if !job.status(|s| s.state.is_final()) => {
                    tracing::info!("job {}: cancelled, because its client {client} has gone", job.id);
                    // A training keeps what it has done, for when it is asked for again.
                    self.stop_job(&job, Stop::Checkpoint);
                }
                Object::Composition(_) => drop(self.remove_object(&path)),
                _ => {}
            }
        }
    }
}

/// Fails where the client has as many compositions as it may have; of those that outlive it, its user.
fn check_compositions(objects: &Objects, new: &CompositionObject, most: usize) -> Result<()> {
    let is_same = |known: &CompositionObject| {
        known.lifetime == new.lifetime
            && match new.lifetime {
                Lifetime::Connection => known.owner.client == new.owner.client,
                Lifetime::Daemon => known.owner.uid == new.owner.uid,
            }
    };
    let prefix = path_of("composition", "");
    let all = objects.range(prefix.clone()..).take_while(|(path, _)| path.starts_with(&prefix));
    let open = all.filter(|(_, object)| matches!(object, Object::Composition(known) if is_same(known))).count();
    if open < most {
        return Ok(());
    }
    let whose = if new.lifetime == Lifetime::Connection { "this client" } else { "this user" };
    let message =
        format!("{open} compositions of {whose} are open, limits.compositions_per_client_max is {most}; close some");
    Err(Error::new(Kind::NotSupported, message))
}

impl Object {
    /// The client whose connection it lives with.
    fn lives_with(&self) -> Option<&str> {
        let (owner, lifetime) = match self {
            Self::Job(job) => (&job.owner, job.lifetime),
            Self::Composition(composition) => (&composition.owner, composition.lifetime),
            _ => return None,
        };
        (lifetime == Lifetime::Connection).then_some(owner.client.as_str())
    }
}
