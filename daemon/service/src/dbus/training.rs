//! org.blocklora.Daemon1.Manager: trainings.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use blocklora_engine::model::Defaults;
use blocklora_engine::train::{Concept, TrainRequest, check};
use blocklora_sdk::overlay;
use blocklora_spec::{NAME_RULE, Partition, Storage, is_name};
use serde_json::{Map, Value};
use zbus::OwnedFd;

use super::call::{Call, Refusal};
use super::manager::{default_model, precision_of};
use super::slots::{PARTITION, base_digest, check_slot, partition_of};
use super::value::{Dict, Options};
use crate::catalogue::leases::Claim;
use crate::config::Precision;
use crate::daemon::Daemon;
use crate::error::{Error, Kind, Result};
use crate::jobs::work::{Train, Work};
use crate::jobs::{Job, Lifetime, Priority, Ticket, now_usec};
use crate::memfd::read_client_file;

/// Pictures of one training.
const PICTURES_MAX: usize = 10_000;

/// Which rows a training asks for.
enum Rows {
    All,
    Lease(String),
    Slot(Partition, Option<u32>),
}

/// A training as it is asked for.
struct Asked {
    /// Id of the trainer.
    plugin: String,
    /// The trainer's settings, as far as the caller gives them.
    config: Map<String, Value>,
    model: String,
    precision: Precision,
    rows: Rows,
    /// What the engine is to make; where to is known once there is a job.
    request: TrainRequest,
    pictures: Pictures,
    uid: u32,
}

/// The pictures of a training, as they are sent.
struct Pictures {
    /// One file each, or one with all of them.
    data: Vec<OwnedFd>,
    /// How many bytes of that one file each has.
    lengths: Option<Vec<u64>>,
    /// One for each; empty: none.
    captions: Vec<String>,
}

/// Queues a training.
pub async fn train(call: &Call) -> Result<Arc<Job>, Refusal> {
    let (plugin, config, data, options): (String, Dict, Vec<OwnedFd>, Dict) = call.args()?;
    call.authorize("train").await?;
    let mut options = Options::new(options);
    let ticket = call.ticket(&mut options, Priority::Background, Lifetime::Daemon)?;
    let concept = concept_of(&mut options)?;
    let (captions, lengths) = (options.strings("captions")?, options.u64s("lengths")?);
    let model = options.string("model")?.map_or_else(|| default_model(&call.daemon), Ok)?;
    let precision = precision_of(&call.daemon, &mut options)?;
    let in_slots = {
        let plugin = plugin.clone();
        call.blocking(move |daemon| daemon.methods.trains_in_slots(&plugin)).await?
    };
    let rows = rows_of(&plugin, in_slots, &mut options)?;
    let storage = match options.string("storage")?.as_deref() {
        None | Some("f32") => Storage::F32,
        Some("f16") => Storage::F16,
        Some(other) => return Err(Error::option(format!("option \"storage\": {other:?} is not f32 or f16")).into()),
    };
    let request = TrainRequest {
        concept,
        seed: options.u64("seed")?.unwrap_or(0),
        output: PathBuf::new(),
        resume: options.boolean("resume")?.unwrap_or(false),
        storage,
        licence: options.string("licence")?,
        created: options.string("created")?,
        sampler: None,
    };
    options.finish()?;
    let pictures = pictures_of(data, lengths, captions)?;
    call.daemon.model(&model)?;
    let config = Options::new(config).into_json()?;
    let asked = Asked { plugin, config, model, precision, rows, request, pictures, uid: call.caller.uid };
    let _turn = call.turn_to_read().await?;
    Ok(call.remembering(move |daemon| queue(daemon, &ticket, asked)).await?)
}

/// The concept that `options` name.
fn concept_of(options: &mut Options) -> Result<Concept> {
    let name = options.required("name")?;
    if !is_name(&format!("{name}-1")) {
        return Err(Error::option(format!("option \"name\": {name:?}: with -1 behind it, it {NAME_RULE}")));
    }
    let class_word = options.required("class_word")?;
    let kind = options.string("kind")?.unwrap_or_else(|| "subject".to_owned());
    let unknown = || Error::option(format!("option \"kind\": {kind:?} is not subject, person, scene or style"));
    let kind = blocklora_spec::Kind::from_name(&kind).ok_or_else(unknown)?;
    Ok(Concept { name, class_word, kind })
}

/// Checks that `data`, `lengths` and `captions` are of as many pictures.
fn pictures_of(data: Vec<OwnedFd>, lengths: Option<Vec<u64>>, captions: Option<Vec<String>>) -> Result<Pictures> {
    if lengths.is_some() && data.len() != 1 {
        let reason = format!("option \"lengths\": data has {} files, not the one that holds all pictures", data.len());
        return Err(Error::option(reason));
    }
    let count = lengths.as_ref().map_or(data.len(), Vec::len);
    if count == 0 || count > PICTURES_MAX {
        return Err(Error::option(format!("data: {count} pictures; 1 to {PICTURES_MAX} are needed")));
    }
    let captions = captions.unwrap_or_else(|| vec![String::new(); count]);
    if captions.len() != count {
        let message = format!("option \"captions\": {} for {count} pictures; give one for each", captions.len());
        return Err(Error::option(message));
    }
    Ok(Pictures { data, lengths, captions })
}

/// Checks the settings, stores the pictures, takes the rows and queues the job; where one of them fails nothing is left.
fn queue(daemon: &Daemon, ticket: &Ticket, asked: Asked) -> Result<Arc<Job>> {
    let Asked { plugin, config, model, precision, rows, request, pictures, uid } = asked;
    // Wrong settings are said now, not when the job runs; which slot it will be does not matter for that.
    let tried = if matches!(rows, Rows::All) { None } else { Some(PARTITION) };
    let config = settings(daemon, &model, &plugin, config)?;
    check(daemon.methods.trainer(&plugin, &config, tried)?.as_ref(), &request)?;
    let id = daemon.new_id();
    let folder = daemon.training_folder(&id);
    let given = match &rows {
        Rows::Lease(lease) => Some(daemon.catalogue.find_lease(lease)?),
        _ => None,
    };
    let TrainRequest { concept, seed, resume, storage, licence, created, .. } = request;
    let pictures = store_pictures(daemon, &folder, &pictures);
    let work = pictures.and_then(|pictures| {
        let claim = Claim::of_training(&id, &concept.name, uid);
        let (partition, lease) = take_rows(daemon, &id, rows, &model, &claim)?;
        Ok(Train {
            model,
            precision,
            trainer: plugin,
            config,
            partition,
            lease,
            name: concept.name,
            class_word: concept.class_word,
            kind: concept.kind,
            pictures,
            seed,
            storage,
            licence,
            created,
            folder: folder.clone(),
            ends_with_client: ticket.lifetime == Lifetime::Connection,
            resume,
            deadline_usec: ticket.timeout.map(|span| now_usec().saturating_add(span.as_micros() as u64)),
        })
    });
    let limits = daemon.queue_limits();
    let job = work.and_then(|work| daemon.submit_as(id.clone(), ticket, Work::Train(Box::new(work)), limits));
    if job.is_err() {
        // What could not be queued leaves nothing behind; the first error is the one to report.
        let _ = std::fs::remove_dir_all(&folder);
        let _ = match given {
            Some(lease) => daemon.catalogue.hand_back(&lease, &id),
            None => daemon.catalogue.release(&id),
        };
    }
    job
}

/// The trainer's settings: those that the client gives, and the model folder's own for the others, table by table.
fn settings(daemon: &Daemon, model: &str, plugin: &str, given: Map<String, Value>) -> Result<Map<String, Value>> {
    let folder = &daemon.model(model)?.path;
    let id = plugin.strip_prefix("train-").unwrap_or(plugin);
    Ok(on_top_of(Defaults::of(folder)?.training.remove(id).unwrap_or_default(), given))
}

fn on_top_of(own: Map<String, Value>, given: Map<String, Value>) -> Map<String, Value> {
    let mut settings = Value::Object(own);
    overlay(&mut settings, &Value::Object(given));
    match settings {
        Value::Object(settings) => settings,
        _ => Map::new(),
    }
}

/// `in_slots` is whether the trainer can be told which rows to own.
fn rows_of(plugin: &str, in_slots: bool, options: &mut Options) -> Result<Rows> {
    let partition = options.options("partition")?.map(partition_of).transpose()?;
    let slot = options.u32("slot")?;
    let all_rows = options.boolean("all_rows")?;
    let lease = options.string("lease")?;
    if let Some(lease) = lease {
        if partition.is_some() || slot.is_some() || all_rows.is_some() {
            return Err(Error::option("option \"lease\": give it alone, without partition, slot and all_rows"));
        }
        return Ok(Rows::Lease(lease));
    }
    if all_rows.unwrap_or(!in_slots) {
        if partition.is_some() || slot.is_some() {
            return Err(Error::option(format!("{plugin} is to own all rows: leave partition and slot out")));
        }
        return Ok(Rows::All);
    }
    let partition = partition.unwrap_or(PARTITION);
    check_slot(&partition, slot)?;
    Ok(Rows::Slot(partition, slot))
}

/// Leases the rows for the training that `job` is; none: all rows.
fn take_rows(
    daemon: &Daemon,
    job: &str,
    rows: Rows,
    model: &str,
    claim: &Claim,
) -> Result<(Option<Partition>, Option<String>)> {
    match rows {
        Rows::All => Ok((None, None)),
        Rows::Lease(id) => {
            let lease = daemon.catalogue.find_lease(&id)?;
            if lease.uid != claim.uid && claim.uid != 0 && claim.uid != daemon.uid {
                return Err(Error::new(Kind::NotAuthorized, format!("the lease {id} belongs to user {}", lease.uid)));
            }
            let base = base_digest(daemon, model)?;
            if lease.base_digest != base {
                return Err(Error::option(format!("the lease {id} is for another model than {model:?}")));
            }
            daemon.catalogue.take_over(&id, job)?;
            Ok((Some(lease.partition), Some(job.to_owned())))
        }
        Rows::Slot(partition, slot) => {
            let base = base_digest(daemon, model)?;
            let lease = daemon.catalogue.lease(&base, &partition, slot, claim)?;
            Ok((Some(Partition { seed: partition.seed, ..lease.partition }), Some(lease.id)))
        }
    }
}

/// Writes the pictures that a client sent into the job's folder.
fn store_pictures(daemon: &Daemon, folder: &Path, sent: &Pictures) -> Result<Vec<(String, Option<String>)>> {
    let Pictures { data, lengths, captions } = sent;
    let io = |e: std::io::Error| Error::io(folder.display(), &e);
    std::fs::create_dir_all(folder).map_err(io)?;
    let mut left = daemon.config().limits.training_data_bytes_max;
    let joined = match (lengths, data.as_slice()) {
        (Some(lengths), [joined]) => Some((read_client_file(joined, left, "data[0]")?, lengths)),
        _ => None,
    };
    let mut rest = match &joined {
        Some((bytes, lengths)) => parts(bytes, lengths)?.into_iter(),
        None => Vec::new().into_iter(),
    };
    let mut pictures = Vec::new();
    for (index, caption) in captions.iter().enumerate() {
        let what = if joined.is_some() { format!("data[0], picture {index}") } else { format!("data[{index}]") };
        let read;
        let bytes = match (rest.next(), data.get(index)) {
            (Some(bytes), _) => bytes,
            (None, Some(fd)) => {
                read = read_client_file(fd, left, &what)?;
                left -= read.len() as u64;
                &read
            }
            (None, None) => return Err(Error::option(format!("{what}: is missing"))),
        };
        let name = format!("{index:05}");
        let path = folder.join(&name);
        let mut file = File::create(&path).map_err(io)?;
        file.write_all(bytes).and_then(|()| file.sync_all()).map_err(io)?;
        // A picture that cannot be read is said now.
        let checked = blocklora_engine::image::Picture::load(&path);
        checked.map_err(|e| Error::option(e.to_string().replace(&path.display().to_string(), &what)))?;
        pictures.push((name, Some(caption.clone()).filter(|c| !c.is_empty())));
    }
    File::open(folder).and_then(|f| f.sync_all()).map_err(io)?;
    Ok(pictures)
}

/// `bytes` cut into pieces of these lengths, which must make up all of it.
fn parts<'a>(bytes: &'a [u8], lengths: &[u64]) -> Result<Vec<&'a [u8]>> {
    let all = lengths.iter().try_fold(0u64, |all, length| all.checked_add(*length));
    if all != Some(bytes.len() as u64) {
        let all = all.map_or_else(|| "more than there can be".to_owned(), |all| all.to_string());
        return Err(Error::option(format!("option \"lengths\": {all} bytes in all, but data[0] has {}", bytes.len())));
    }
    let mut rest = bytes;
    let cut = |length: &u64| {
        let (part, behind) = rest.split_at(*length as usize);
        rest = behind;
        part
    };
    Ok(lengths.iter().map(cut).collect())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_a_training_is_not_told_is_the_folders() {
        let dir = tempfile::tempdir().unwrap();
        let text = r#"{"training": {"one-method": {"steps": 400, "learning_rate": {"unet": 5e-4, "tokens": 0.06}}}}"#;
        std::fs::write(dir.path().join(Defaults::FILE), text).unwrap();
        let defaults = Defaults::of(dir.path()).unwrap();
        let of_training = |id: &str, given| on_top_of(defaults.training.get(id).cloned().unwrap_or_default(), given);
        let given = |text: &str| serde_json::from_str::<Map<_, _>>(text).unwrap();
        let asked = given(r#"{"rank": 8, "learning_rate": {"unet": 1e-3}}"#);
        let both = given(r#"{"rank": 8, "steps": 400, "learning_rate": {"unet": 1e-3, "tokens": 0.06}}"#);
        assert_eq!(of_training("one-method", asked.clone()), both);
        assert_eq!(of_training("another", asked.clone()), asked);
        let null = given(r#"{"learning_rate": null}"#);
        assert_eq!(of_training("one-method", null)["learning_rate"], Value::Null, "what is said counts");
    }

    #[test]
    fn joined_pictures_are_cut_only_where_they_fit() {
        assert_eq!(parts(b"abcde", &[2, 0, 3]).unwrap(), [&b"ab"[..], b"", b"cde"]);
        for wrong in [&[2, 2][..], &[6], &[u64::MAX, 6], &[]] {
            let error = parts(b"abcde", wrong).unwrap_err().to_string();
            assert!(error.contains("lengths") && error.contains("data[0] has 5"), "{error}");
        }
    }
}
