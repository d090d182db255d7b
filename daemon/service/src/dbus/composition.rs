//! org.blocklora.Daemon1.Composition.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use blocklora_engine::merge::conflicts;
use rustix::fs::{FileType, OFlags, fcntl_getfl, fstat};
use zbus::{OwnedObjectPath, Variant};

use super::call::{Answer, Call, Refusal};
use super::interfaces::Method;
use super::sets::{check_plan, clashes, load_factors};
use super::value::{Dict, Options, dict, own, strings};
use super::{entries_of, set_of};
use crate::daemon::Daemon;
use crate::error::{Error, Kind, Result};
use crate::jobs::work::{Set, Work};
use crate::jobs::{Lifetime, Priority};
use crate::objects::{CompositionObject, Object, object_path};

/// Answers a call.
pub async fn answer(call: &Call, composition: &Arc<CompositionObject>, member: &str, method: &Method) -> Answer {
    match member {
        "Swap" => {
            let (list, generation, options): (Vec<(OwnedObjectPath, Dict)>, u64, Dict) = call.args()?;
            call.authorize_owner(composition.owner.uid).await?;
            let mut options = Options::new(options);
            let (strategy, config) = (options.string("strategy")?, options.object("strategy_config")?);
            options.finish()?;
            let list = list.into_iter().map(|(path, o)| (path.as_str().to_owned(), Options::new(o))).collect();
            let entries = entries_of(call, list).await?;
            // Settings are a strategy's: without one, they are given for the one that is there.
            let (strategy, config) = match (strategy, config) {
                (None, config) => {
                    let before = composition.content().0.clone();
                    (Some(before.strategy), Some(config.unwrap_or(before.strategy_config)))
                }
                given => given,
            };
            let set = set_of(call, &composition.model, entries, strategy, config).await?;
            let checked = set.clone();
            call.blocking(move |daemon| check_plan(daemon, &checked)).await?;
            let generation = change(composition, Some(generation), set)?;
            call.daemon.touch(&composition.path);
            call.reply(method, &generation)
        }
        "SetWeights" => {
            let (weights, options): (Vec<(OwnedObjectPath, f64)>, Dict) = call.args()?;
            call.authorize_owner(composition.owner.uid).await?;
            let mut options = Options::new(options);
            let wanted = options.u64("if_generation")?;
            options.finish()?;
            let (mut set, before) = composition.content().clone();
            let mut joins = false;
            for (at, (path, weight)) in weights.iter().enumerate() {
                if weights[..at].iter().any(|(other, _)| other == path) {
                    return Err(Error::option(format!("{} is given twice; give it once", path.as_str())).into());
                }
                let Some(Object::Adapter(adapter)) = call.daemon.object(path.as_str()) else {
                    return Err(Error::option(format!("{} is not an adapter", path.as_str())).into());
                };
                let digest = &adapter.entry.digest;
                let Some(entry) = set.entries.iter_mut().find(|entry| entry.digest == *digest) else {
                    let message = format!("adapter {:?} is not in this composition", adapter.entry.name);
                    return Err(Error::option(message).into());
                };
                // One that counted for nothing was not planned for.
                joins |= entry.weight == 0.0 && *weight as f32 != 0.0;
                entry.weight = *weight as f32;
                if !entry.weight.is_finite() {
                    return Err(Error::option(format!("weight {weight} of {:?}: must be finite", entry.name)).into());
                }
            }
            if joins {
                let checked = set.clone();
                call.blocking(move |daemon| check_plan(daemon, &checked)).await?;
            }
            let generation = change(composition, Some(wanted.unwrap_or(before)), set)?;
            call.daemon.touch(&composition.path);
            call.reply(method, &generation)
        }
        "Explain" => {
            let mut options = Options::new(call.args::<Dict>()?);
            call.authorize("generate").await?;
            let layers = options.boolean("layers")?.unwrap_or(false);
            options.finish()?;
            let set = composition.content().0.clone();
            let report = call.blocking(move |daemon| explain(daemon, &set, layers)).await?;
            call.reply(method, &report)
        }
        "Bake" => {
            let (out, options): (zbus::OwnedFd, Dict) = call.args()?;
            call.authorize("generate").await?;
            let mut options = Options::new(options);
            let ticket = call.ticket(&mut options, Priority::Normal, Lifetime::Connection)?;
            if let Some(other) = options.string("precision")?.filter(|p| p != "f32") {
                let message = format!("option \"precision\": {other:?}: merging for a file is done in f32");
                return Err(Error::new(Kind::NotSupported, message).into());
            }
            options.finish()?;
            let out = writable(out.into())?;
            let set = composition.content().0.clone();
            let work = Work::Bake { model: composition.model.clone(), set, out };
            let job = call.daemon.submit(&ticket, work)?;
            call.reply(method, &object_path(&job.path))
        }
        "Close" => {
            call.authorize_owner(composition.owner.uid).await?;
            call.daemon.remove_object(&composition.path);
            call.reply(method, &())
        }
        _ => Err(Refusal::bus("UnknownMethod", format!("there is no method {member}"))),
    }
}

/// Makes `set` the content if nobody was faster.
fn change(composition: &CompositionObject, if_generation: Option<u64>, set: Set) -> Result<u64> {
    let mut content = composition.content();
    if let Some(wanted) = if_generation.filter(|wanted| *wanted != content.1) {
        let message = format!("the composition has generation {}, not {wanted}: read it again", content.1);
        return Err(Error::new(Kind::GenerationConflict, message));
    }
    *content = (set, content.1 + 1);
    Ok(content.1)
}

/// The file that an archive goes to, if it can be written.
fn writable(out: OwnedFd) -> Result<File> {
    let fail = |e: rustix::io::Errno| Error::option(format!("out: {}", std::io::Error::from(e)));
    let kind = FileType::from_raw_mode(fstat(&out).map_err(fail)?.st_mode);
    if !matches!(kind, FileType::RegularFile | FileType::Fifo | FileType::Socket) {
        return Err(Error::option("out: the file descriptor is not a file, pipe or socket"));
    }
    let flags = fcntl_getfl(&out).map_err(fail)?;
    if !flags.intersects(OFlags::WRONLY | OFlags::RDWR) {
        return Err(Error::option("out: the file descriptor is not open for writing"));
    }
    Ok(out.into())
}

fn explain(daemon: &Daemon, set: &Set, with_layers: bool) -> Result<Dict> {
    let factors = load_factors(daemon, set)?;
    let factors: Vec<_> = factors.iter().map(|factors| &**factors).collect();
    let report = conflicts::conflicts(&factors)?;
    let known = set.entries.iter().map(|e| daemon.find_adapter(&e.digest)).collect::<Result<Vec<_>>>()?;
    let pair = |p: &conflicts::Pair| (p.one as u32, p.other as u32, p.cosine, p.sign_conflicts, p.shared_rows as u64);
    let pairs: Vec<(u32, u32, f64, f64, u64)> = report.overall.pairs.iter().map(pair).collect();
    let mut info = dict([
        ("adapters", strings(&report.adapters)),
        ("norms", own(Variant::from(report.overall.norms.clone()))),
        ("pairs", own(Variant::from(pairs))),
        ("sign_conflicts", own(report.overall.sign_conflicts)),
        ("clashes", own(Variant::from(clashes(&known)))),
    ]);
    if with_layers {
        let layer = |l: &conflicts::Conflicts| (l.layer.clone(), l.norms.clone(), l.sign_conflicts);
        let layers: Vec<(String, Vec<f64>, f64)> = report.layers.iter().map(layer).collect();
        info.insert("layers".to_owned(), own(Variant::from(layers)));
    }
    Ok(info)
}
