//! org.blocklora.Daemon1.Adapter.

use std::sync::Arc;

use blocklora_spec::{Adapter, Format, export};
use zbus::{OwnedFd, Variant};

use super::call::{Answer, Call, Refusal, no_options};
use super::interfaces::Method;
use super::value::{Dict, Options, dict, own};
use crate::daemon::Daemon;
use crate::error::{Error, Kind, Result};
use crate::memfd;
use crate::objects::AdapterObject;

/// Answers a call.
pub async fn answer(call: &Call, adapter: &Arc<AdapterObject>, member: &str, method: &Method) -> Answer {
    let digest = adapter.entry.digest.clone();
    match member {
        "Inspect" => {
            no_options(call.args::<Dict>()?)?;
            call.authorize("generate").await?;
            let opened = call.blocking(move |daemon| daemon.open_adapter(&digest)).await?;
            call.reply(method, &inspect(&opened, adapter)?)
        }
        "Export" => {
            let (format, options): (String, Dict) = call.args()?;
            no_options(options)?;
            call.authorize("generate").await?;
            let files = call
                .blocking(move |daemon| {
                    let files = export_files(daemon, &digest, &format);
                    files.map_err(|error| without_path(daemon, &digest, error))
                })
                .await?;
            call.reply(method, &files)
        }
        "Unregister" => {
            let mut options = Options::new(call.args::<Dict>()?);
            let remove = options.boolean("remove")?.unwrap_or(false);
            options.finish()?;
            let of_others = adapter.users().iter().any(|uid| *uid != call.caller.uid);
            if remove || of_others {
                call.authorize("manage-models").await?;
            }
            if remove {
                call.remembering(move |daemon| daemon.catalogue.remove_adapter(&digest)).await?;
            }
            call.daemon.hide_adapter(&adapter.entry.digest, &call.caller.client);
            call.reply(method, &())
        }
        _ => Err(Refusal::bus("UnknownMethod", format!("there is no method {member}"))),
    }
}

/// An error that calls the adapter by its name: where the daemon has the file is nobody else's matter.
fn without_path(daemon: &Daemon, digest: &str, error: Error) -> Error {
    let path = daemon.catalogue.adapter_path(digest).display().to_string();
    let name = daemon.find_adapter(digest).map_or_else(|_| digest.to_owned(), |entry| entry.name);
    Error { message: error.message.replace(&path, &format!("adapter {name:?}")), ..error }
}

fn inspect(opened: &Adapter, adapter: &AdapterObject) -> Result<Dict> {
    let manifest = serde_json::to_string(opened.manifest()).map_err(|e| Error::failed(e.to_string()))?;
    let layers: Vec<(String, u32, u32, u32)> = opened
        .layers()
        .iter()
        .map(|l| (l.name.clone(), l.outputs as u32, l.columns as u32, l.rows.len() as u32))
        .collect();
    let tokens: Vec<(String, u32, u32)> =
        opened.tokens().iter().map(|t| (t.name.clone(), t.layers as u32, t.width as u32)).collect();
    Ok(dict([
        ("manifest", own(manifest)),
        ("layers", own(Variant::from(layers))),
        ("tokens", own(Variant::from(tokens))),
        ("size", own(adapter.entry.size)),
        ("added_usec", own(adapter.entry.added_usec)),
    ]))
}

fn export_files(daemon: &Daemon, digest: &str, format: &str) -> Result<Vec<(OwnedFd, Dict)>> {
    let format = match format {
        "blocklora" => return Ok(vec![own_file(daemon, digest)?]),
        id => Format::from_id(id).ok_or_else(|| {
            let known = "blocklora, kohya, diffusers, peft or textual-inversion";
            Error::new(Kind::NotSupported, format!("format {id:?} is not {known}"))
        })?,
    };
    let adapter = daemon.open_adapter(digest)?;
    let files = export::files(&adapter, format)?;
    files
        .iter()
        .map(|file| {
            let fd = memfd::sealed_with(file.name(), |out| file.write_to(out))?;
            Ok(described(fd, file.name(), file.size()))
        })
        .collect()
}

/// The adapter's own file.
fn own_file(daemon: &Daemon, digest: &str) -> Result<(OwnedFd, Dict)> {
    let name = format!("{}.safetensors", daemon.open_adapter(digest)?.manifest().name);
    let bytes = daemon.read_adapter(digest)?;
    Ok(described(memfd::sealed(&name, &bytes)?, &name, bytes.len() as u64))
}

/// A file in a reply.
fn described(fd: std::os::fd::OwnedFd, name: &str, size: u64) -> (OwnedFd, Dict) {
    let media_type = if name.ends_with(".json") { "application/json" } else { "application/vnd.safetensors" };
    let info = dict([("name", own(name.to_owned())), ("media_type", own(media_type)), ("size", own(size))]);
    (fd.into(), info)
}
