//! org.blocklora.Daemon1.Manager: what starts work.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use blocklora_engine::train::Concept;
use blocklora_spec::{NAME_RULE, Partition, Scheme, Storage, is_name};
use tokio::sync::oneshot;
use zbus::{OwnedFd, OwnedObjectPath, Variant};

use super::call::{Answer, Call, Refusal, no_options};
use super::interfaces::Method;
use super::value::{Dict, Options};
use super::{entries_of, set_of};
use crate::catalogue::{adapters::kind_from_name, scheme_from_name};
use crate::config::Precision;
use crate::daemon::Daemon;
use crate::error::{Error, Kind, Result};
use crate::jobs::queue::Control;
use crate::jobs::work::{Generate, Train, Work};
use crate::jobs::{Job, Lifetime, Owner, Priority, Ticket, now_usec};
use crate::memfd::read_client_file;
use crate::objects::{CompositionObject, Object, object_path, path_of};

/// The partition where a training names none: the paper's blocks, for up to 16 concepts.
pub const PARTITION: Partition = Partition { scheme: Scheme::Contiguous, capacity: 16, seed: 0, slot: 0 };
/// How long a lease lasts by default.
const LEASE_USEC: u64 = 24 * 60 * 60 * 1_000_000;
/// Bytes of a prompt: far more than any text encoder reads, and little enough to be told so at once.
const PROMPT_BYTES_MAX: usize = 64 << 10;
/// Pictures of one training.
const PICTURES_MAX: usize = 10_000;

/// Answers a call, if it is one of these methods.
pub async fn answer(call: &Call, member: &str, method: &Method) -> Result<Option<zbus::Message>, Refusal> {
    let job = match member {
        "Generate" => generate(call).await?,
        "Train" => train(call).await?,
        "Merge" => merge(call).await?,
        "LoadModel" => load_model(call).await?,
        "EmptyJob" => {
            let mut options = Options::new(call.args::<Dict>()?);
            let ticket = call.ticket(&mut options, Priority::Interactive, Lifetime::Connection)?;
            options.finish()?;
            call.daemon.submit(&ticket, Work::Empty)?
        }
        "ValidateLibrary" => {
            let mut options = Options::new(call.args::<Dict>()?);
            let ticket = call.ticket(&mut options, Priority::Normal, Lifetime::Connection)?;
            options.finish()?;
            call.authorize("manage-models").await?;
            call.daemon.submit(&ticket, Work::ValidateLibrary)?
        }
        "ReclaimMemory" => return reclaim(call, method).await.map(Some),
        "Reload" => {
            no_options(call.args::<Dict>()?)?;
            call.authorize("manage-models").await?;
            call.blocking(Daemon::reload).await?;
            return call.reply(method, &()).map(Some);
        }
        "LeaseSlot" => return lease(call, method).await.map(Some),
        "ReleaseSlot" => {
            let (id, options): (String, Dict) = call.args()?;
            no_options(options)?;
            let wanted = id.clone();
            let lease = call.blocking(move |daemon| daemon.catalogue.find_lease(&wanted)).await?;
            call.authorize_owner(lease.uid).await?;
            call.blocking(move |daemon| daemon.catalogue.release(&id)).await?;
            return call.reply(method, &()).map(Some);
        }
        _ => return Ok(None),
    };
    call.reply(method, &object_path(&job.path)).map(Some)
}

/// Sets a property; the only one that can be set.
pub async fn set_property(call: &Call, _name: &str, value: &Variant<'_>) -> Result<(), Refusal> {
    call.authorize("manage-models").await?;
    if let Variant::U64(usec) = value {
        call.daemon.set_idle_unload_usec(*usec);
    }
    Ok(())
}

async fn generate(call: &Call) -> Result<Arc<Job>, Refusal> {
    let (target, params, options): (OwnedObjectPath, Dict, Dict) = call.args()?;
    call.authorize("generate").await?;
    let mut options = Options::new(options);
    let ticket = call.ticket(&mut options, Priority::Interactive, Lifetime::Connection)?;
    let formats = options.strings("formats")?.unwrap_or_else(|| vec!["raw".to_owned(), "png".to_owned()]);
    if let Some(unknown) = formats.iter().find(|f| !["raw", "png"].contains(&f.as_str())) {
        return Err(Error::option(format!("option \"formats\": {unknown:?} is not raw or png")).into());
    }
    options.finish()?;
    let mut params = Options::new(params);
    let prompt = params.required("prompt")?;
    let entries = params.entries("adapters")?;
    let strategy = (params.string("strategy")?, params.object("strategy_config")?);
    let (model, set) = match (target.as_str(), call.daemon.object(target.as_str())) {
        (_, Some(Object::Composition(composition))) => {
            if entries.is_some() || strategy.0.is_some() || strategy.1.is_some() {
                let message = "adapters, strategy and strategy_config belong to the composition that is the target";
                return Err(Error::option(message).into());
            }
            (composition.model.clone(), composition.content().0.clone())
        }
        (path, object) => {
            let model = match object {
                Some(Object::Model(model)) => model.id.clone(),
                _ if path == "/" => default_model(&call.daemon)?,
                _ => return Err(Error::option(format!("target {path}: not a model or composition")).into()),
            };
            let entries = entries_of(call, entries.unwrap_or_default()).await?;
            let set = set_of(call, &model, entries, strategy.0, strategy.1)?;
            (model, set)
        }
    };
    let range = |name: &str, value: u32, most: u32| match value {
        v if (1..=most).contains(&v) => Ok(v as usize),
        v => Err(Error::option(format!("{name} = {v}: must be 1 to {most}"))),
    };
    let work = Generate {
        model,
        set,
        prompt,
        negative_prompt: params.string("negative_prompt")?.unwrap_or_default(),
        steps: range("steps", params.u32("steps")?.unwrap_or(20), 1000)?,
        guidance_scale: params.f64("guidance_scale")?.unwrap_or(7.5) as f32,
        sampler: params.string("sampler")?.unwrap_or_else(|| call.daemon.config().plugins.sampler.clone()),
        sampler_config: params.object("sampler_config")?.unwrap_or_default(),
        seed: params.u64("seed")?.unwrap_or(0),
        width: params.u32("width")?.map(|v| v as usize),
        height: params.u32("height")?.map(|v| v as usize),
        count: range("count", params.u32("count")?.unwrap_or(1), 1000)?,
        raw: formats.iter().any(|f| f == "raw"),
        png: formats.iter().any(|f| f == "png"),
    };
    params.finish()?;
    if !(0.0..=1000.0).contains(&work.guidance_scale) {
        return Err(Error::option(format!(
            "guidance_scale = {}: must be 0 to 1000; 1 is no guidance",
            work.guidance_scale
        ))
        .into());
    }
    for (name, prompt) in [("prompt", &work.prompt), ("negative_prompt", &work.negative_prompt)] {
        if prompt.len() > PROMPT_BYTES_MAX {
            let message = format!("{name}: {} bytes, at most {PROMPT_BYTES_MAX} are allowed; shorten it", prompt.len());
            return Err(Error::option(message).into());
        }
    }
    check_size(&call.daemon, &work)?;
    // A wrong method is said now, not when the job runs.
    call.daemon.methods.sampler(&work.sampler, &work.sampler_config)?;
    Ok(call.daemon.submit(&ticket, Work::Generate(Box::new(work)))?)
}

fn check_size(daemon: &Daemon, work: &Generate) -> Result<()> {
    let model = daemon.model(&work.model)?;
    let (native, multiple) = {
        let state = model.state();
        (state.size, state.size_multiple as usize)
    };
    let (width, height) = (work.width.unwrap_or(native.0 as usize), work.height.unwrap_or(native.1 as usize));
    for (name, asked, pixels) in [("width", work.width, width), ("height", work.height, height)] {
        if asked == Some(0) || (multiple > 0 && pixels % multiple != 0) {
            let multiple = multiple.max(1);
            return Err(Error::option(format!("{name} = {pixels}: must be a multiple of {multiple} for this model")));
        }
    }
    let most = daemon.config().limits.picture_pixels_max;
    if (width as u64).saturating_mul(height as u64) > most {
        let message =
            format!("{width} x {height} pixels are more than the {most} that limits.picture_pixels_max allows");
        return Err(Error::new(Kind::NotSupported, message));
    }
    Ok(())
}

/// The id of the model that is used where none is named.
pub fn default_model(daemon: &Daemon) -> Result<String> {
    let none = || Error::new(Kind::ModelNotFound, "there is no model: register one with Manager.RegisterModel");
    daemon.default_model().ok_or_else(none)
}

async fn merge(call: &Call) -> Result<Arc<Job>, Refusal> {
    let (strategy, parts, options): (String, Vec<(OwnedObjectPath, Dict)>, Dict) = call.args()?;
    call.authorize("generate").await?;
    let mut options = Options::new(options);
    let ticket = call.ticket(&mut options, Priority::Interactive, Lifetime::Connection)?;
    let model = options.string("model")?.map_or_else(|| default_model(&call.daemon), Ok)?;
    let config = options.object("strategy_config")?;
    let lifetime = options.string("composition_lifetime")?;
    let lifetime = lifetime.map_or(Ok(Lifetime::Connection), |l| Lifetime::from_name("composition_lifetime", &l))?;
    options.finish()?;
    call.daemon.model(&model)?;
    let parts = parts.into_iter().map(|(path, options)| (path.as_str().to_owned(), Options::new(options))).collect();
    let entries = entries_of(call, parts).await?;
    let set = set_of(call, &model, entries, Some(strategy), config)?;
    let composition = path_of("composition", &call.daemon.new_id());
    let object = CompositionObject {
        path: composition.clone(),
        model: model.clone(),
        owner: call.caller.owner(),
        lifetime,
        content: std::sync::Mutex::new((set.clone(), 1)),
    };
    call.daemon.add_object(&composition, Object::Composition(Arc::new(object)));
    let work = Work::Merge { model, set, composition: composition.clone() };
    let job = call.daemon.submit(&ticket, work);
    if job.is_err() {
        call.daemon.remove_object(&composition);
    }
    Ok(job?)
}

async fn load_model(call: &Call) -> Result<Arc<Job>, Refusal> {
    let (id, options): (String, Dict) = call.args()?;
    call.authorize("generate").await?;
    let mut options = Options::new(options);
    let ticket = call.ticket(&mut options, Priority::Normal, Lifetime::Connection)?;
    let precision = options.string("precision")?;
    let unknown = |name: &str| Error::option(format!("option \"precision\": {name:?} is not f32, f16 or bf16"));
    let precision = precision.map(|name| Precision::from_name(&name).ok_or_else(|| unknown(&name))).transpose()?;
    let own = &call.daemon.device.name;
    if let Some(device) = options.string("device")?.filter(|device| device != own) {
        return Err(Error::new(Kind::NotSupported, format!("there is no device {device:?}; there is {own}")).into());
    }
    let keep_alive = options.u64("keep_alive_usec")?;
    options.finish()?;
    let model = call.daemon.model(&id)?;
    if let Some(usec) = keep_alive {
        model.state().keep_alive_usec = usec;
        call.daemon.touch(&model.object_path());
    }
    Ok(call.daemon.submit(&ticket, Work::LoadModel { model: id, precision })?)
}

async fn reclaim(call: &Call, method: &Method) -> Answer {
    let (device, bytes, options): (String, u64, Dict) = call.args()?;
    no_options(options)?;
    call.authorize("manage-models").await?;
    let own = &call.daemon.device.name;
    if !device.is_empty() && device != *own {
        return Err(Error::option(format!("there is no device {device:?}; there is {own}")).into());
    }
    let (reply, freed) = oneshot::channel();
    call.daemon.queue.control(Control::Reclaim { bytes, reply });
    let freed = freed.await.map_err(|_| Error::new(Kind::ShuttingDown, "the daemon is stopping"))?;
    call.reply(method, &freed)
}

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

/// The digest of a model's weights, which slots are counted by. A model that was never loaded is read for it.
fn base_digest(daemon: &Daemon, id: &str) -> Result<String> {
    let model = daemon.model(id)?;
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

async fn lease(call: &Call, method: &Method) -> Answer {
    let (partition, options): (Dict, Dict) = call.args()?;
    call.authorize("train").await?;
    let partition = partition_of(Options::new(partition))?;
    let mut options = Options::new(options);
    let slot = options.u32("slot")?;
    let model = options.string("model")?.map_or_else(|| default_model(&call.daemon), Ok)?;
    let name = options.string("name")?.unwrap_or_default();
    let span = options.u64("expires_usec")?.unwrap_or(LEASE_USEC);
    options.finish()?;
    check_slot(&partition, slot)?;
    let expires = if span == 0 { 0 } else { now_usec().saturating_add(span).min(i64::MAX as u64) };
    let uid = call.caller.uid;
    let lease = call
        .blocking(move |daemon| {
            let base = base_digest(daemon, &model)?;
            daemon.catalogue.lease(&base, &partition, slot, &name, uid, expires)
        })
        .await?;
    call.reply(method, &(lease.id, lease.partition.slot))
}

fn check_slot(partition: &Partition, slot: Option<u32>) -> Result<()> {
    match slot {
        Some(slot) if slot >= partition.capacity => {
            Err(Error::option(format!("slot = {slot}: must be 0 to {}", partition.capacity - 1)))
        }
        _ => Ok(()),
    }
}

/// Which rows a training asks for.
enum Rows {
    All,
    Lease(String),
    Slot(Partition, Option<u32>),
}

async fn train(call: &Call) -> Result<Arc<Job>, Refusal> {
    let (plugin, config, data, options): (String, Dict, Vec<OwnedFd>, Dict) = call.args()?;
    call.authorize("train").await?;
    let mut options = Options::new(options);
    let ticket = call.ticket(&mut options, Priority::Background, Lifetime::Daemon)?;
    let name = options.required("name")?;
    if !is_name(&format!("{name}-1")) {
        return Err(Error::option(format!("option \"name\": {name:?}: with -1 behind it, it {NAME_RULE}")).into());
    }
    let class_word = options.required("class_word")?;
    let kind = options.string("kind")?.unwrap_or_else(|| "subject".to_owned());
    let unknown = || Error::option(format!("option \"kind\": {kind:?} is not subject, person, scene or style"));
    let kind = kind_from_name(&kind).ok_or_else(unknown)?;
    let captions = options.strings("captions")?;
    let model = options.string("model")?.map_or_else(|| default_model(&call.daemon), Ok)?;
    let rows = rows_of(call, &plugin, &mut options)?;
    let storage = match options.string("storage")?.as_deref() {
        None | Some("f32") => Storage::F32,
        Some("f16") => Storage::F16,
        Some(other) => return Err(Error::option(format!("option \"storage\": {other:?} is not f32 or f16")).into()),
    };
    let seed = options.u64("seed")?.unwrap_or(0);
    let (licence, created) = (options.string("licence")?, options.string("created")?);
    options.finish()?;
    if data.is_empty() || data.len() > PICTURES_MAX {
        return Err(Error::option(format!("data: {} pictures; 1 to {PICTURES_MAX} are needed", data.len())).into());
    }
    let captions = captions.unwrap_or_else(|| vec![String::new(); data.len()]);
    if captions.len() != data.len() {
        let message = format!("option \"captions\": {} for {} pictures; give one for each", captions.len(), data.len());
        return Err(Error::option(message).into());
    }
    call.daemon.model(&model)?;
    let config = Options::new(config).into_json()?;
    let concept = Concept { name: name.clone(), class_word: class_word.clone(), kind };
    // Wrong settings are said now, not when the job runs; which slot it will be does not matter for that.
    let tried = if matches!(rows, Rows::All) { None } else { Some(PARTITION) };
    let trainer = call.daemon.methods.trainer(&plugin, &config, tried)?;
    trainer.plan(&concept).map_err(Error::from)?;

    let uid = call.caller.uid;
    let job = call
        .blocking(move |daemon| {
            let id = daemon.new_id();
            let folder = daemon.catalogue.folder().join("jobs").join(&id);
            let pictures = store_pictures(daemon, &folder, &data, &captions);
            let work = pictures.and_then(|pictures| {
                let (partition, lease) = take_rows(daemon, rows, &model, &name, uid)?;
                Ok(Train {
                    model,
                    trainer: plugin,
                    config,
                    partition,
                    lease,
                    name,
                    class_word,
                    kind,
                    pictures,
                    seed,
                    storage,
                    licence,
                    created,
                    folder: folder.clone(),
                })
            });
            let lease = work.as_ref().ok().and_then(|work| work.lease.clone());
            let job = work.and_then(|work| daemon.submit_as(id, &ticket, Work::Train(Box::new(work))));
            if job.is_err() {
                // What could not be queued leaves nothing behind; the first error is the one to report.
                let _ = std::fs::remove_dir_all(&folder);
                if let Some(lease) = lease {
                    let _ = daemon.catalogue.release(&lease);
                }
            }
            job
        })
        .await?;
    Ok(job)
}

fn rows_of(call: &Call, plugin: &str, options: &mut Options) -> Result<Rows> {
    let in_slots = call.daemon.methods.trains_in_slots(plugin)?;
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

/// Leases the rows for a training; none: all rows.
fn take_rows(
    daemon: &Daemon,
    rows: Rows,
    model: &str,
    name: &str,
    uid: u32,
) -> Result<(Option<Partition>, Option<String>)> {
    match rows {
        Rows::All => Ok((None, None)),
        Rows::Lease(id) => {
            let lease = daemon.catalogue.find_lease(&id)?;
            if lease.uid != uid && uid != 0 && uid != daemon.uid {
                return Err(Error::new(Kind::NotAuthorized, format!("the lease {id} belongs to user {}", lease.uid)));
            }
            let base = base_digest(daemon, model)?;
            if lease.base_digest != base {
                return Err(Error::option(format!("the lease {id} is for another model than {model:?}")));
            }
            Ok((Some(lease.partition), Some(id)))
        }
        Rows::Slot(partition, slot) => {
            let base = base_digest(daemon, model)?;
            let lease = daemon.catalogue.lease(&base, &partition, slot, name, uid, 0)?;
            Ok((Some(Partition { seed: partition.seed, ..lease.partition }), Some(lease.id)))
        }
    }
}

/// Writes the pictures that a client sent into the job's folder.
fn store_pictures(
    daemon: &Daemon,
    folder: &Path,
    data: &[OwnedFd],
    captions: &[String],
) -> Result<Vec<(String, Option<String>)>> {
    let io = |e: std::io::Error| Error::io(folder.display(), &e);
    std::fs::create_dir_all(folder).map_err(io)?;
    let mut left = daemon.config().limits.training_data_bytes_max;
    let mut pictures = Vec::new();
    for (index, (fd, caption)) in data.iter().zip(captions).enumerate() {
        let what = format!("data[{index}]");
        let bytes = read_client_file(fd, left, &what)?;
        left -= bytes.len() as u64;
        let name = format!("{index:05}");
        let path = folder.join(&name);
        let mut file = File::create(&path).map_err(io)?;
        file.write_all(&bytes).and_then(|()| file.sync_all()).map_err(io)?;
        // A picture that cannot be read is said now.
        let checked = blocklora_engine::image::Picture::load(&path);
        checked.map_err(|e| Error::option(e.to_string().replace(&path.display().to_string(), &what)))?;
        pictures.push((name, Some(caption.clone()).filter(|c| !c.is_empty())));
    }
    File::open(folder).and_then(|f| f.sync_all()).map_err(io)?;
    Ok(pictures)
}

impl Daemon {
    /// Queues a training that an earlier daemon left unfinished.
    pub fn resume_training(self: &Arc<Self>, id: String, uid: u32, priority: &str, work: Train) -> Result<Arc<Job>> {
        let ticket = Ticket {
            owner: Owner { client: String::new(), uid },
            priority: Priority::from_name(priority)?,
            lifetime: Lifetime::Daemon,
            token: None,
            timeout: None,
        };
        self.submit_as(id, &ticket, Work::Train(Box::new(work)))
    }
}
