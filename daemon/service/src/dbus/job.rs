//! org.blocklora.Daemon1.Job.

use std::sync::Arc;
use std::time::Duration;

use zbus::OwnedFd;

use super::call::{Answer, Call, Refusal, no_options};
use super::interfaces::Method;
use super::value::{Dict, Options};
use crate::cut::{NAME_BYTES_MAX, cut};
use crate::daemon::Daemon;
use crate::error::{Error, Kind, Result};
use crate::jobs::{Job, Stop};

/// Files of one answer: a message on a system bus carries 16 descriptors and no more, and a bus that gets more of them
/// ends the connection.
const FILES_MAX: usize = 16;
/// The default time between two previews.
const PREVIEW_INTERVAL_USEC: u64 = 500_000;
/// The largest side of a preview: such a picture fits one packet.
const PREVIEW_SIDE_MAX: u32 = 256;

/// Answers a call.
pub async fn answer(call: &Call, job: &Arc<Job>, member: &str, method: &Method) -> Answer {
    match member {
        "Wait" => {
            wait(call, job).await?;
            let reads = call.reads(job.owner.uid).await;
            match job.outcome() {
                Some(Ok(details)) => call.reply(method, &("done", if reads { details } else { Dict::new() })),
                Some(Err(error)) if !reads => {
                    Err(Error::new(error.kind, "what went wrong is told to the job's user only").into())
                }
                Some(Err(error)) => Err(error.into()),
                None => Err(Error::failed("the job ended without a result").into()),
            }
        }
        "Cancel" => {
            let (mode, options): (String, Dict) = call.args()?;
            no_options(options)?;
            let stop = match mode.as_str() {
                "" | "discard" => Stop::Discard,
                "checkpoint" => Stop::Checkpoint,
                other => return Err(Error::option(format!("mode {other:?} is not discard or checkpoint")).into()),
            };
            call.authorize_owner(job.owner.uid).await?;
            let job = job.clone();
            // The end of a training is written to the disk.
            let stopped = move |daemon: &Daemon| {
                daemon.stop_job(&job, stop);
                Ok(())
            };
            call.blocking(stopped).await?;
            call.reply(method, &())
        }
        "TakeResults" => {
            let mut options = Options::new(call.args::<Dict>()?);
            let keep = options.boolean("keep")?.unwrap_or(false);
            let formats = options.strings("formats")?.unwrap_or_default();
            let offset = options.u32("offset")?.unwrap_or(0) as usize;
            options.finish()?;
            if let Some(unknown) = formats.iter().find(|f| !["raw", "png", "artefact"].contains(&f.as_str())) {
                let unknown = cut(unknown, NAME_BYTES_MAX);
                return Err(
                    Error::option(format!("option \"formats\": {unknown:?} is not raw, png or artefact")).into()
                );
            }
            call.authorize_owner(job.owner.uid).await?;
            match job.outcome() {
                None => {
                    let message = "the job has not finished; call Wait first";
                    Err(Error::new(Kind::JobNotFinished, message).into())
                }
                Some(Err(error)) => Err(error.into()),
                Some(Ok(_)) => {
                    let files = job.take_results(keep, &formats, offset, FILES_MAX)?;
                    let files: Vec<(OwnedFd, Dict)> = files.into_iter().map(|(fd, info)| (fd.into(), info)).collect();
                    call.reply(method, &files)
                }
            }
        }
        "OpenPreviews" => {
            let mut options = Options::new(call.args::<Dict>()?);
            let interval = options.u64("interval_usec")?.unwrap_or(PREVIEW_INTERVAL_USEC);
            let side = options.u32("max_side")?.unwrap_or(PREVIEW_SIDE_MAX);
            options.finish()?;
            if !(8..=PREVIEW_SIDE_MAX).contains(&side) {
                return Err(Error::option(format!("max_side = {side}: must be 8 to {PREVIEW_SIDE_MAX}")).into());
            }
            call.authorize_owner(job.owner.uid).await?;
            call.daemon.check_previews()?;
            let fd = job.previews.open(Duration::from_micros(interval), side)?;
            if job.status(|s| s.state.is_final()) {
                job.previews.close();
            }
            call.reply(method, &OwnedFd::from(fd))
        }
        _ => Err(Refusal::bus("UnknownMethod", format!("there is no method {member}"))),
    }
}

/// Waits for the job's end, but no longer than its caller is there: a call that waits keeps the connection open.
async fn wait(call: &Call, job: &Job) -> Result<()> {
    let ended = job.wait();
    tokio::pin!(ended);
    loop {
        // Before the look: what happens after it counts.
        let gone = call.caller.peer.gone();
        call.daemon.check_connected(&call.caller.client)?;
        tokio::select! {
            () = &mut ended => return Ok(()),
            () = gone => {}
        }
    }
}
