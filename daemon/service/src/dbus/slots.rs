//! org.blocklora.Daemon1.Manager: who owns which slots.

use std::sync::{Mutex, PoisonError};

use blocklora_spec::{NAME_RULE, Partition, Scheme, is_name};

use super::call::{Answer, Call, no_options};
use super::interfaces::Method;
use super::manager::default_model;
use super::value::{Dict, Options};
use crate::catalogue::leases::Claim;
use crate::catalogue::scheme_from_name;
use crate::cut::{NAME_BYTES_MAX, cut};
use crate::daemon::Daemon;
use crate::error::{Error, Kind, Result};
use crate::jobs::{Job, now_usec};

/// The partition where a training names none: the paper's blocks, for up to 16 concepts.
pub const PARTITION: Partition = Partition { scheme: Scheme::Contiguous, capacity: 16, seed: 0, slot: 0 };
/// How long a lease lasts by default.
const LEASE_USEC: u64 = 24 * 60 * 60 * 1_000_000;

/// The partition that `options` describe.
pub fn partition_of(mut options: Options) -> Result<Partition> {
    let scheme = options.string("scheme")?;
    let unknown =
        |name: &str| Error::option(format!("partition: scheme {name:?} is not contiguous, strided or permuted"));
    let scheme = scheme.map(|name| scheme_from_name(&name).ok_or_else(|| unknown(&name))).transpose()?;
    let partition = Partition {
        scheme: scheme.unwrap_or(PARTITION.scheme),
        capacity: options.u32("capacity")?.unwrap_or(PARTITION.capacity),
        seed: options.u64("seed")?.unwrap_or(0),
        slot: 0,
    };
    options.finish()?;
    let most = blocklora_spec::limits::CAPACITY_MAX;
    if !(1..=most).contains(&partition.capacity) {
        return Err(Error::option(format!("partition: capacity = {}: must be 1 to {most}", partition.capacity)));
    }
    Ok(partition)
}

/// Held while a model is read for its digest: many may ask at once, and each reading takes the memory of a model.
static READING: Mutex<()> = Mutex::new(());

/// The digest of a model's weights, which slots are counted by. A model that was never loaded is read for it.
pub fn base_digest(daemon: &Daemon, id: &str) -> Result<String> {
    let model = daemon.model(id)?;
    let known = model.state().digest.clone();
    if !known.is_empty() {
        return Ok(known);
    }
    let _reading = READING.lock().unwrap_or_else(PoisonError::into_inner);
    let known = model.state().digest.clone();
    if !known.is_empty() {
        return Ok(known);
    }
    let fail = |e: blocklora_engine::Error| Error::new(Kind::ModelNotFound, format!("model {id:?}: {e}"));
    let precision = daemon.config().models.precision.dtype();
    let loaded = blocklora_engine::model::Model::load(&model.path, &blocklora_engine::Device::Cpu, precision);
    let digest = loaded.map_err(fail)?.digest().to_owned();
    model.state().digest.clone_from(&digest);
    daemon.touch(&model.object_path());
    Ok(digest)
}

/// Answers LeaseSlot.
pub async fn lease(call: &Call, method: &Method) -> Answer {
    let (partition, options): (Dict, Dict) = call.args()?;
    call.authorize("train").await?;
    let partition = partition_of(Options::new(partition))?;
    let mut options = Options::new(options);
    let slot = options.u32("slot")?;
    let model = options.string("model")?.map_or_else(|| default_model(&call.daemon), Ok)?;
    let name = options.string("name")?.unwrap_or_default();
    if !name.is_empty() && !is_name(&name) {
        return Err(Error::option(format!("option \"name\": {:?}: it {NAME_RULE}", cut(&name, NAME_BYTES_MAX))).into());
    }
    let span = options.u64("expires_usec")?.unwrap_or(LEASE_USEC);
    options.finish()?;
    check_slot(&partition, slot)?;
    let expires = if span == 0 { 0 } else { now_usec().saturating_add(span).min(i64::MAX as u64) };
    let uid = call.caller.uid;
    let lease = call
        .remembering(move |daemon| {
            let base = base_digest(daemon, &model)?;
            let claim = Claim { training: None, name: &name, uid, expires_usec: expires };
            daemon.catalogue.lease(&base, &partition, slot, &claim)
        })
        .await?;
    call.reply(method, &(lease.id, lease.partition.slot))
}

/// Fails on a slot that the partition does not have.
pub fn check_slot(partition: &Partition, slot: Option<u32>) -> Result<()> {
    match slot {
        Some(slot) if slot >= partition.capacity => {
            Err(Error::option(format!("slot = {slot}: must be 0 to {}", partition.capacity - 1)))
        }
        _ => Ok(()),
    }
}

/// Answers ReleaseSlot.
pub async fn release(call: &Call, method: &Method) -> Answer {
    let (id, options): (String, Dict) = call.args()?;
    no_options(options)?;
    let wanted = id.clone();
    let lease = call.blocking(move |daemon| daemon.catalogue.find_lease(&wanted)).await?;
    call.authorize_owner(lease.uid).await?;
    let has_it = |job: &Job| job.held.as_ref().is_some_and(|held| held.lease.as_ref() == Some(&id));
    if let Some(job) = call.daemon.jobs().iter().find(|job| has_it(job) && !job.status(|s| s.state.is_final())) {
        let message = format!("the lease {id} is the training's that job {} is: cancel the job instead", job.id);
        return Err(Error::option(message).into());
    }
    call.remembering(move |daemon| daemon.catalogue.release(&id)).await?;
    call.reply(method, &())
}
