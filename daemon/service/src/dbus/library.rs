//! org.blocklora.Daemon1.Manager: what is known, adapters, models, slots and jobs.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;

use rusqlite::types::Value as Column;
use zbus::wire::serialized::Context;
use zbus::wire::{LE, serialized_size};
use zbus::{OwnedFd, Variant};

use super::call::{Answer, Call, Refusal, no_options};
use super::interfaces::Method;
use super::slots::partition_of;
use super::value::{Dict, Options, dict, own};
use crate::catalogue::adapters::{AdapterEntry, Filter};
use crate::catalogue::jobs::{JobEntry, JobFilter};
use crate::catalogue::leases::{Holder, SlotEntry, SlotFilter};
use crate::catalogue::models::ModelEntry;
use crate::daemon::Daemon;
use crate::error::{Error, Kind, Result};
use crate::jobs::{Job, Lifetime};
use crate::objects::{AdapterObject, ModelObject, ModelState, Object, object_path, partition_dict, path_of};

/// Entries of one page.
const PAGE_MAX: u32 = 1000;
/// Bytes of one page: many clients may ask for one at once.
const PAGE_BYTES_MAX: usize = 1 << 20;

/// Answers a call.
pub async fn answer(call: &Call, member: &str, method: &Method) -> Answer {
    match member {
        "RegisterAdapter" => {
            let (file, options): (OwnedFd, Dict) = call.args()?;
            let mut options = Options::new(options);
            let name = options.string("file_name")?.unwrap_or_else(|| "the adapter".to_owned());
            let lifetime = options.string("lifetime")?;
            let lifetime = lifetime.map_or(Ok(Lifetime::Daemon), |text| Lifetime::from_name("lifetime", &text))?;
            options.finish()?;
            let path = if lifetime == Lifetime::Connection {
                call.authorize("generate").await?;
                let owner = call.caller.owner();
                let _turn = call.turn_to_read().await?;
                call.blocking(move |daemon| daemon.add_loose(file, &name, &owner)).await?
            } else {
                call.authorize("manage-models").await?;
                let _turn = call.turn_to_read().await?;
                let entry = call.remembering(move |daemon| daemon.catalogue.import(file, &name)).await?;
                show(&call.daemon, entry, Some(call.caller.uid))
            };
            call.reply(method, &object_path(&path))
        }
        "OpenAdapter" => {
            let (text, options): (String, Dict) = call.args()?;
            no_options(options)?;
            call.authorize("generate").await?;
            let entry = call.blocking(move |daemon| daemon.find_adapter(&text)).await?;
            call.reply(method, &object_path(&show(&call.daemon, entry, Some(call.caller.uid))))
        }
        "QueryLibrary" => {
            let (filter, offset, limit): (Dict, u32, u32) = call.args()?;
            let filter = filter_of(filter)?;
            check_page(limit)?;
            let page = call.blocking(move |daemon| daemon.catalogue.adapters(&filter, offset, limit)).await?;
            call.reply(method, &page_of(page.iter().map(entry_dict)))
        }
        "CountLibrary" => {
            let filter = filter_of(call.args::<Dict>()?)?;
            if filter.sort.is_some() {
                return Err(Error::option("unknown option \"sort\": a number has no order").into());
            }
            let count = call.blocking(move |daemon| daemon.catalogue.count_adapters(&filter)).await?;
            call.reply(method, &count)
        }
        "RegisterModel" => register_model(call, method).await,
        "ForgetModel" => {
            let (id, options): (String, Dict) = call.args()?;
            no_options(options)?;
            call.authorize("manage-models").await?;
            let model = call.daemon.model(&id)?;
            if model.configured {
                let message = format!("model {id:?} stands in the configuration; take it out there");
                return Err(Error::new(Kind::NotSupported, message).into());
            }
            if model.is_in_use() {
                let message = format!("model {id:?} is loaded, or about to be; unload it first");
                return Err(Error::new(Kind::DeviceBusy, message).into());
            }
            let path = model.object_path();
            call.remembering(move |daemon| daemon.catalogue.remove_model(&id)).await?;
            call.daemon.remove_object(&path);
            call.reply(method, &())
        }
        "ListJobs" => list_jobs(call, method).await,
        "ListSlots" => {
            let (filter, offset, limit): (Dict, u32, u32) = call.args()?;
            check_page(limit)?;
            let mut filter = Options::new(filter);
            let base_digest = filter.string("base_digest")?;
            let partition = filter.options("partition")?.map(partition_of).transpose()?;
            filter.finish()?;
            let filter = SlotFilter { base_digest, partition };
            let page = call.blocking(move |daemon| daemon.catalogue.slots(&filter, offset, limit)).await?;
            call.reply(method, &page_of(page.iter().map(slot_dict)))
        }
        _ => Err(Refusal::bus("UnknownMethod", format!("there is no method {member}"))),
    }
}

fn check_page(limit: u32) -> Result<()> {
    match limit {
        0..=PAGE_MAX => Ok(()),
        _ => Err(Error::option(format!("limit = {limit}: at most {PAGE_MAX}"))),
    }
}

/// As many of `entries` as one message should carry; the rest is the next page's.
fn page_of(entries: impl Iterator<Item = Dict>) -> Vec<Dict> {
    let mut bytes = 0;
    let fits = |entry: &Dict| {
        // One entry always, or nobody would ever come past it.
        let is_first = bytes == 0;
        // What cannot be measured cannot be sent either, which the reply says.
        bytes += serialized_size(Context::new(LE, 0), entry).map_or(1, |size| *size);
        is_first || bytes <= PAGE_BYTES_MAX
    };
    entries.take_while(fits).collect()
}

/// Shows an adapter as an object, for a user if one asked for it; its path.
pub fn show(daemon: &Daemon, entry: AdapterEntry, user: Option<u32>) -> String {
    let path = path_of("adapter", &entry.digest);
    let mut users: BTreeSet<u32> = user.into_iter().collect();
    if let Some(Object::Adapter(shown)) = daemon.object(&path) {
        shown.users().extend(user);
        if shown.entry == entry {
            return path;
        }
        users.extend(shown.users().iter());
        daemon.replace_object(&path, Object::Adapter(Arc::new(AdapterObject::new(entry, users))));
        return path;
    }
    daemon.add_object(&path, Object::Adapter(Arc::new(AdapterObject::new(entry, users))));
    path
}

/// A file of the library was read: an object of its adapter says from now on how it was found.
pub fn show_found(daemon: &Daemon, digest: &str) {
    if let Some(Object::Adapter(_)) = daemon.object(&path_of("adapter", digest))
        && let Ok(entry) = daemon.find_adapter(digest)
    {
        show(daemon, entry, None);
    }
}

/// Fails on a value that no entry can have, which would find nothing without saying why.
fn one_of(key: &str, value: Option<&str>, known: &[&str]) -> Result<()> {
    match value {
        Some(value) if !known.contains(&value) => {
            Err(Error::option(format!("option {key:?}: {value:?} is not one of {}", known.join(", "))))
        }
        _ => Ok(()),
    }
}

fn filter_of(filter: Dict) -> Result<Filter> {
    let mut options = Options::new(filter);
    let mut filter = Filter {
        text: options.string("text")?,
        digest: options.string("digest")?,
        sort: options.string("sort")?,
        equal: Vec::new(),
    };
    for column in ["name", "kind", "class_word", "architecture", "base_digest", "algorithm", "state"] {
        if let Some(value) = options.string(column)? {
            match column {
                "kind" => one_of(column, Some(&value), &["subject", "person", "scene", "style"])?,
                "state" => one_of(column, Some(&value), &["ok", "missing", "corrupt"])?,
                _ => {}
            }
            filter.equal.push((column, Column::Text(value)));
        }
    }
    let partition = options.options("partition")?.map(partition_of).transpose()?;
    let slot = options.u32("slot")?;
    match (partition, slot) {
        (Some(partition), slot) => filter.in_partition(&partition, slot),
        (None, Some(slot)) => filter.equal.push(("slot", slot.into())),
        (None, None) => {}
    }
    options.finish()?;
    Ok(filter)
}

fn entry_dict(entry: &AdapterEntry) -> Dict {
    let mut info = dict([
        ("digest", own(entry.digest.clone())),
        ("name", own(entry.name.clone())),
        ("kind", own(entry.kind.clone())),
        ("class_word", own(entry.class_word.clone())),
        ("architecture", own(entry.architecture.clone())),
        ("base_digest", own(entry.base_digest.clone())),
        ("algorithm", own(entry.algorithm.clone())),
        ("algorithm_version", own(entry.algorithm_version.clone())),
        ("rank", own(entry.rank)),
        ("tokens", own(entry.tokens)),
        ("size", own(entry.size)),
        ("added_usec", own(entry.added_usec)),
        ("licence", own(entry.licence.clone())),
        ("state", own(entry.state.clone())),
        ("problem", own(entry.problem.clone())),
    ]);
    if let Some(partition) = &entry.partition {
        info.insert("partition".to_owned(), own(Variant::from(partition_dict(partition, false))));
        info.insert("slot".to_owned(), own(partition.slot));
    }
    info
}

fn slot_dict(slot: &SlotEntry) -> Dict {
    let (holder, name, digest, lease, uid, expires) = match &slot.holder {
        Holder::Adapter(name, digest) => ("adapter", name.clone(), digest.clone(), String::new(), 0, 0),
        Holder::Lease(lease) => {
            ("lease", lease.name.clone(), String::new(), lease.id.clone(), lease.uid, lease.expires_usec)
        }
    };
    let mut info = partition_dict(&slot.partition, true);
    let seed = info.remove("seed");
    info.extend(seed.map(|seed| ("partition_seed".to_owned(), seed)));
    info.extend(dict([
        ("base_digest", own(slot.base_digest.clone())),
        ("holder", own(holder)),
        ("name", own(name)),
        ("digest", own(digest)),
        ("lease", own(lease)),
        ("uid", own(uid)),
        ("expires_usec", own(expires)),
    ]));
    info
}

async fn register_model(call: &Call, method: &Method) -> Answer {
    let (path, options): (String, Dict) = call.args()?;
    let mut options = Options::new(options);
    let id = options.string("id")?;
    options.finish()?;
    call.authorize("manage-models").await?;
    let path = PathBuf::from(path);
    if !path.is_absolute() {
        return Err(Error::option(format!("path {:?}: must be absolute", path.display())).into());
    }
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
    let id = id.or(name).unwrap_or_default();
    check_model_id(&id)?;
    let fail = |e: blocklora_engine::Error| Error::new(Kind::ModelNotFound, e.to_string());
    let folder = path.clone();
    call.blocking(move |_| blocklora_engine::model::ModelIndex::open(&folder).map(drop).map_err(fail)).await?;
    if let Ok(known) = call.daemon.model(&id) {
        if known.path == path {
            return call.reply(method, &object_path(&known.object_path()));
        }
        let message = format!("option \"id\": {id:?} is {}; choose another id", known.path.display());
        return Err(Error::option(message).into());
    }
    let entry = ModelEntry { id: id.clone(), path: path.clone(), ..ModelEntry::default() };
    call.remembering(move |daemon| daemon.catalogue.put_model(&entry)).await?;
    let object = call.daemon.add_model(&id, path, false, None);
    call.reply(method, &object_path(&object))
}

/// Fails unless `id` can name a model.
pub fn check_model_id(id: &str) -> Result<()> {
    let valid = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    if (1..=64).contains(&id.len()) && id.bytes().all(valid) {
        return Ok(());
    }
    Err(Error::option(format!("model id {id:?}: must be 1 to 64 of [A-Za-z0-9._-]")))
}

async fn list_jobs(call: &Call, method: &Method) -> Answer {
    let (filter, offset, limit): (Dict, u32, u32) = call.args()?;
    check_page(limit)?;
    let mut options = Options::new(filter);
    let (state, kind, uid) = (options.string("state")?, options.string("kind")?, options.u32("uid")?);
    let active = options.boolean("active")?;
    options.finish()?;
    one_of("state", state.as_deref(), &["queued", "running", "done", "failed", "cancelled"])?;
    one_of("kind", kind.as_deref(), &["generate", "train", "merge", "bake", "load-model", "validate", "empty"])?;
    let mut live = call.daemon.jobs();
    // Also those that are not asked for: they are in the history, too, once they have ended.
    let known: Vec<String> = live.iter().map(|job| job.id.clone()).collect();
    live.retain(|job| {
        let (own, is_final) = job.status(|s| (s.state.name(), s.state.is_final()));
        state.as_ref().is_none_or(|state| state == own)
            && kind.as_ref().is_none_or(|kind| kind == job.kind)
            && uid.is_none_or(|uid| uid == job.owner.uid)
            && active.is_none_or(|active| active != is_final)
    });
    live.sort_by_key(|job| std::cmp::Reverse(job.created_usec));
    let mut list: Vec<Dict> = live.iter().map(|job| job_dict(job)).collect();
    let wanted = (offset as usize).saturating_add(limit as usize);
    if list.len() < wanted && active != Some(true) {
        let most = u32::try_from(wanted + known.len()).unwrap_or(u32::MAX);
        let filter = JobFilter { state, kind, uid };
        let old = call.blocking(move |daemon| daemon.catalogue.jobs(&filter, 0, most)).await?;
        list.extend(old.iter().filter(|old| !known.contains(&old.id)).map(history_dict));
    }
    let mut page: Vec<Dict> = list.into_iter().skip(offset as usize).take(limit as usize).collect();
    let own_uid = own(call.caller.uid);
    let of_others = |job: &Dict| job.get("uid") != Some(&own_uid);
    if page.iter().any(of_others) && !call.reads_all().await {
        for job in page.iter_mut().filter(|job| of_others(job)) {
            job.extend(dict([("description", own("")), ("message", own(""))]));
        }
    }
    call.reply(method, &page_of(page.into_iter()))
}

fn job_dict(job: &Job) -> Dict {
    let mut info = history_dict(&JobEntry::of(job));
    job.status(|s| {
        info.extend(dict([
            ("path", own(Variant::from(object_path(&job.path)))),
            ("stage", own(s.stage)),
            ("progress", own(s.progress.unwrap_or(0.0))),
            ("progress_valid", own(s.progress.is_some())),
            ("queue_position", own(s.queue_position)),
        ]));
    });
    info
}

fn history_dict(job: &JobEntry) -> Dict {
    dict([
        ("id", own(job.id.clone())),
        ("path", own(Variant::from(object_path("/")))),
        ("kind", own(job.kind.clone())),
        ("state", own(job.state.clone())),
        ("stage", own("finished")),
        ("progress", own(0.0)),
        ("progress_valid", own(false)),
        ("uid", own(job.uid)),
        ("priority", own(job.priority.clone())),
        ("created_usec", own(job.created_usec)),
        ("started_usec", own(job.started_usec)),
        ("finished_usec", own(job.finished_usec)),
        ("queue_position", own(0u32)),
        ("error", own(job.error.clone())),
        ("message", own(job.message.clone())),
        ("description", own(job.description.clone())),
    ])
}

impl Daemon {
    /// Shows a model; its object path. `known` is what the catalogue has.
    pub fn add_model(&self, id: &str, path: PathBuf, configured: bool, known: Option<ModelEntry>) -> String {
        let known = known.unwrap_or_default();
        let missing = !path.join("model_index.json").is_file();
        let problem = missing.then(|| {
            let message = format!("{}: no model folder: it has no model_index.json", path.display());
            Error::new(Kind::ModelNotFound, message)
        });
        let state = ModelState {
            digest: known.digest,
            architecture: known.architecture,
            size: (known.width, known.height),
            size_multiple: known.size_multiple,
            state: if missing { "missing" } else { "unloaded" },
            problem,
            ..ModelState::default()
        };
        let object = Arc::new(ModelObject::new(id.to_owned(), path, configured, state));
        let path = object.object_path();
        self.add_object(&path, Object::Model(object));
        self.touch(crate::objects::ROOT);
        path
    }

    /// Shows the models of configuration and catalogue, and the bundled one.
    pub fn add_known_models(&self) -> Result<()> {
        let known = self.catalogue.models()?;
        self.add_configured_models();
        for entry in &known {
            if self.model(&entry.id).is_err() {
                self.add_model(&entry.id, entry.path.clone(), false, Some(entry.clone()));
            }
        }
        if self.model("starter").is_err()
            && let Some(folder) = crate::life::paths::starter_model()
        {
            let entry = known.into_iter().find(|entry| entry.id == "starter" && entry.path == folder);
            self.add_model("starter", folder, true, entry);
        }
        Ok(())
    }

    /// Shows the models of the configuration: those that are not shown yet, or from another folder.
    pub fn add_configured_models(&self) {
        let known = self.catalogue.models().unwrap_or_default();
        for (id, path) in &self.config().models.folders {
            if let Err(error) = check_model_id(id) {
                tracing::error!("configuration: models.folders: {error}");
                continue;
            }
            match self.model(id) {
                Ok(shown) if shown.path == *path => continue,
                Ok(shown) if shown.is_in_use() => {
                    let path = path.display();
                    tracing::warn!(
                        "model {id:?} is loaded: its folder {path} counts once it is unloaded and this is read again"
                    );
                    continue;
                }
                Ok(shown) => drop(self.remove_object(&shown.object_path())),
                Err(_) => {}
            }
            let entry = known.iter().find(|entry| entry.id == *id && entry.path == *path).cloned();
            self.add_model(id, path.clone(), true, entry);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_ends_where_a_message_should_and_never_before_its_first_entry() {
        let entry = |bytes: usize| dict([("text", own("x".repeat(bytes)))]);
        assert_eq!(page_of((0..1000).map(|_| entry(500))).len(), 1000);
        let page = page_of((0..1000).map(|_| entry(10_000)));
        assert!((100..105).contains(&page.len()), "{}", page.len());
        assert_eq!(page_of([entry(2 * PAGE_BYTES_MAX), entry(1)].into_iter()).len(), 1);
        assert_eq!(page_of([entry(1), entry(2 * PAGE_BYTES_MAX)].into_iter()).len(), 1);
        assert!(page_of(std::iter::empty()).is_empty());
    }
}
