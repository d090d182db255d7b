//! `blocklora status`: what the daemon is and does.

use blocklora_client::{JobEntry, ModelState, Options as Filter, Status};
use blocklora_service::plugins::words::shown;

use crate::daemon::{self, State};
use crate::output;
use crate::table::{bytes, date};

/// Show what the daemon is, what it has in memory, and what it does
#[derive(clap::Args)]
pub struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(serde::Serialize)]
struct Json {
    place: String,
    private: bool,
    daemon: Status,
    models: Vec<ModelState>,
    adapters: u64,
    jobs: Vec<JobEntry>,
}

/// Runs the command.
pub fn run(args: &Args, options: &daemon::Options) -> anyhow::Result<()> {
    let json = daemon::run(async {
        let daemon = daemon::connect(options, State::User).await?;
        let client = &daemon.client;
        let mut models = Vec::new();
        for model in client.models().await? {
            models.push(model.state().await?);
        }
        let json = Json {
            place: client.place().map_or("a private daemon, for this command".to_owned(), ToString::to_string),
            private: daemon.is_private(),
            daemon: client.status().await?,
            models,
            adapters: client
                .manager()
                .await?
                .count_library(&Default::default())
                .await
                .map_err(blocklora_client::Error::from)?,
            jobs: client.jobs(Filter::new().with("active", true), 0, 1000).await?,
        };
        daemon.close().await;
        Ok(json)
    })?;
    if args.json { output::print_json(&json) } else { Ok(output::print(&describe(&json))?) }
}

fn describe(json: &Json) -> String {
    let d = &json.daemon;
    let mut text = if json.private {
        "No daemon runs; this is what a private one says.\n".to_owned()
    } else {
        format!("blocklorad {} on {}, since {}\n", d.version, json.place, date(d.started_usec))
    };
    for device in &d.devices {
        let memory = if device.memory_bytes > 0 { format!(", {}", bytes(device.memory_bytes)) } else { String::new() };
        let reason = if device.reason.is_empty() { String::new() } else { format!(": {}", device.reason) };
        text += &format!("device    {} ({}{memory}) {}{reason}\n", device.id, device.name, device.state);
    }
    for model in &json.models {
        let default = if model.id == d.default_model { ", default" } else { "" };
        let memory =
            if model.resident_bytes > 0 { format!(", {}", bytes(model.resident_bytes)) } else { String::new() };
        text += &format!("model     {} ({}{memory}{default})\n", model.id, model.state);
    }
    text += &format!("adapters  {}\n", json.adapters);
    text += &format!("samplers  {}\n", d.samplers.join(", "));
    text += &format!("merging   {}\n", d.strategies.join(", "));
    text += &format!("training  {}\n", d.trainers.join(", "));
    text += &format!("queue     {} of {}\n", d.queue_length, d.queue_limit);
    for job in &json.jobs {
        let progress = if job.progress_valid { format!(" {:.0} %", 100.0 * job.progress) } else { String::new() };
        text += &format!("job       {} {} {}{progress}  {}\n", job.id, job.kind, job.state, shown(&job.description));
    }
    text
}
