//! org.blocklora.Daemon1.Manager: what starts work.

use std::sync::Arc;

use blocklora_engine::model::Defaults;
use tokio::sync::oneshot;
use zbus::{OwnedObjectPath, Variant};

use super::call::{Answer, Call, Refusal, no_options};
use super::interfaces::Method;
use super::value::{Dict, Options};
use super::{entries_of, set_of, slots, training};
use crate::config::Precision;
use crate::daemon::Daemon;
use crate::error::{Error, Kind, Result};
use crate::jobs::queue::Control;
use crate::jobs::work::{Generate, Work};
use crate::jobs::{Job, Lifetime, Priority};
use crate::objects::{CompositionObject, Object, object_path, path_of};

/// Bytes of a prompt: far more than any text encoder reads, and little enough to be told so at once.
const PROMPT_BYTES_MAX: usize = 64 << 10;

/// Answers a call, if it is one of these methods.
pub async fn answer(call: &Call, member: &str, method: &Method) -> Result<Option<zbus::Message>, Refusal> {
    let job = match member {
        "Generate" => generate(call).await?,
        "Train" => training::train(call).await?,
        "Merge" => merge(call).await?,
        "LoadModel" => load_model(call).await?,
        "EmptyJob" => {
            let mut options = Options::new(call.args::<Dict>()?);
            call.authorize("generate").await?;
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
        "LeaseSlot" => return slots::lease(call, method).await.map(Some),
        "ReleaseSlot" => return slots::release(call, method).await.map(Some),
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
            let set = set_of(call, &model, entries, strategy.0, strategy.1).await?;
            (model, set)
        }
    };
    let range = |name: &str, value: u32, most: u32| match value {
        v if (1..=most).contains(&v) => Ok(v as usize),
        v => Err(Error::option(format!("{name} = {v}: must be 1 to {most}"))),
    };
    let guidance_scale = match params.f64("guidance_scale")? {
        Some(scale) => scale as f32,
        None => {
            let folder = call.daemon.model(&model)?.path.clone();
            call.blocking(move |_| Ok(Defaults::of(&folder)?)).await?.guidance_scale
        }
    };
    let work = Generate {
        model,
        precision: precision_of(&call.daemon, &mut params)?,
        set,
        prompt,
        negative_prompt: params.string("negative_prompt")?.unwrap_or_default(),
        steps: range("steps", params.u32("steps")?.unwrap_or(20), 1000)?,
        guidance_scale,
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
    let submit = move |daemon: &Daemon| {
        // A wrong method is said now, not when the job runs. It may be scanned first, which takes a while.
        daemon.methods.sampler(&work.sampler, &work.sampler_config)?;
        daemon.submit(&ticket, Work::Generate(Box::new(work)))
    };
    Ok(call.blocking(submit).await?)
}

/// How a job needs the model's weights held: as its caller says, else as is configured when it is asked for. What others
/// have loaded does not count, so that the same request gives the same result.
pub fn precision_of(daemon: &Daemon, options: &mut Options) -> Result<Precision> {
    let Some(name) = options.string("precision")? else { return Ok(daemon.config().models.precision) };
    let unknown = || Error::option(format!("option \"precision\": {name:?} is not f32, f16 or bf16"));
    Precision::from_name(&name).ok_or_else(unknown)
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
    let precision = precision_of(&call.daemon, &mut options)?;
    let config = options.object("strategy_config")?;
    let lifetime = options.string("composition_lifetime")?;
    let lifetime = lifetime.map_or(Ok(Lifetime::Connection), |l| Lifetime::from_name("composition_lifetime", &l))?;
    options.finish()?;
    call.daemon.model(&model)?;
    let parts = parts.into_iter().map(|(path, options)| (path.as_str().to_owned(), Options::new(options))).collect();
    let entries = entries_of(call, parts).await?;
    let set = set_of(call, &model, entries, Some(strategy), config).await?;
    let composition = path_of("composition", &call.daemon.new_id());
    let object = CompositionObject {
        path: composition.clone(),
        model: model.clone(),
        owner: call.caller.owner(),
        lifetime,
        content: std::sync::Mutex::new((set.clone(), 1)),
    };
    call.daemon.add_owned(&composition, Object::Composition(Arc::new(object)))?;
    let work = Work::Merge { model, precision, set, composition: composition.clone() };
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
    let precision = precision_of(&call.daemon, &mut options)?;
    let own = &call.daemon.device.name;
    if let Some(device) = options.string("device")?.filter(|device| device != own) {
        return Err(Error::new(Kind::NotSupported, format!("there is no device {device:?}; there is {own}")).into());
    }
    let keep_alive = options.u64("keep_alive_usec")?;
    options.finish()?;
    if keep_alive.is_some() {
        // As Model.SetKeepAlive: it decides how long the memory is taken, also from others.
        call.authorize("manage-models").await?;
    }
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
