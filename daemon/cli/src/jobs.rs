//! `blocklora jobs`: what the daemon does and did.

use anyhow::{Context, bail};
use blocklora_client::{CancelMode, Job, JobEntry, Options as Filter, Path};
use serde_json::{Map, Value};

use crate::daemon::{self, Daemon, State, watch};
use crate::output;
use crate::table::{Table, date};

/// The daemon's jobs: list, watch, cancel
#[derive(clap::Subcommand)]
pub enum Command {
    List(List),
    Watch(Watch),
    Cancel(Cancel),
}

/// List jobs, newest first
#[derive(clap::Args)]
pub struct List {
    /// Only jobs in this state: queued, running, done, failed or cancelled
    #[arg(long, value_name = "STATE")]
    state: Option<String>,
    /// Only jobs of this kind: generate, train, merge, bake, load-model, validate
    #[arg(long, value_name = "KIND")]
    kind: Option<String>,
    /// Only jobs that have not ended
    #[arg(long)]
    active: bool,
    /// At most this many
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=1000))]
    limit: u32,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Follow a job until it ends
///
/// Ctrl-C ends the watching, not the job. The exit code is 0 if the job ends well.
#[derive(clap::Args)]
pub struct Watch {
    /// Its id, as `blocklora jobs list` shows it
    #[arg(value_name = "JOB")]
    job: String,
    /// Print every change of its state as a line of JSON
    #[arg(long)]
    json: bool,
}

/// End a job within one denoising or training step
#[derive(clap::Args)]
pub struct Cancel {
    /// Its id, as `blocklora jobs list` shows it
    #[arg(value_name = "JOB")]
    job: String,
    /// Keep nothing of a training; without this its checkpoint stays, and the same training goes on from there
    #[arg(long)]
    discard: bool,
    /// Print the job's last state as JSON
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(command: &Command, options: &daemon::Options) -> anyhow::Result<()> {
    daemon::run(async {
        let daemon = daemon::connect(options, State::User).await?;
        match command {
            Command::List(args) => list(&daemon, args).await?,
            Command::Watch(args) => follow(&daemon, args).await?,
            Command::Cancel(args) => cancel(&daemon, args).await?,
        }
        daemon.close().await;
        Ok(())
    })
}

async fn list(daemon: &Daemon, args: &List) -> anyhow::Result<()> {
    let filter = Filter::new()
        .maybe("state", args.state.clone())
        .maybe("kind", args.kind.clone())
        .maybe("active", args.active.then_some(true));
    let jobs = daemon.client.jobs(filter, 0, args.limit).await?;
    if args.json {
        return output::print_json(&jobs);
    }
    let mut table = Table::new(["id", "kind", "state", "progress", "queued", "uid", "about"]);
    jobs.iter().for_each(|job| table.row(row(job)));
    Ok(output::print(&table.to_string())?)
}

fn row(job: &JobEntry) -> [String; 7] {
    let progress = match job.state.as_str() {
        "queued" => format!("number {}", job.queue_position),
        "running" if job.progress_valid => format!("{:.0} %", 100.0 * job.progress),
        "running" => job.stage.replace('-', " "),
        "failed" => job.message.clone(),
        _ => String::new(),
    };
    let id = job.id.clone();
    [
        id,
        job.kind.clone(),
        job.state.clone(),
        progress,
        date(job.created_usec),
        job.uid.to_string(),
        job.description.clone(),
    ]
}

/// The job called `id`, if the daemon still has it.
async fn find(daemon: &Daemon, id: &str) -> anyhow::Result<Job<Map<String, Value>>> {
    let mut offset = 0;
    loop {
        let page = daemon.client.jobs(Filter::new(), offset, 1000).await?;
        if let Some(entry) = page.iter().find(|job| job.id == id) {
            if entry.path == "/" {
                bail!("job {id} ended long ago: {} at {}", entry.state, date(entry.finished_usec));
            }
            let path = Path::try_from(entry.path.clone()).context("the daemon gave no object path")?;
            return Ok(daemon.client.job(path).await?);
        }
        if page.len() < 1000 {
            bail!("there is no job {id:?}: `blocklora jobs list` shows those that are");
        }
        offset += 1000;
    }
}

async fn follow(daemon: &Daemon, args: &Watch) -> anyhow::Result<()> {
    use futures_util::StreamExt;
    let job = find(daemon, &args.job).await?;
    if args.json {
        let mut states = job.progress().await?;
        while let Some(state) = watch::unless_interrupted(states.next(), "the job goes on").await? {
            output::print(&(serde_json::to_string(&state)? + "\n"))?;
        }
        watch::unless_interrupted(job.wait(), "the job goes on").await??;
        return Ok(());
    }
    watch::look_on(&job, "working").await?;
    Ok(output::print(&format!("{}: {}\n", args.job, job.state().await?.state))?)
}

async fn cancel(daemon: &Daemon, args: &Cancel) -> anyhow::Result<()> {
    let job = find(daemon, &args.job).await?;
    job.cancel(if args.discard { CancelMode::Discard } else { CancelMode::Checkpoint }).await?;
    // Cancelled is what was asked for; any other end is in the state.
    let _ = watch::unless_interrupted(job.wait(), "the job is told to end").await?;
    let state = job.state().await?;
    if args.json {
        return output::print_json(&state);
    }
    Ok(output::print(&format!("{}: {}\n", args.job, state.state))?)
}
