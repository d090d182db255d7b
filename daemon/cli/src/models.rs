//! `blocklora models`: the models that the daemon knows.

use std::path::PathBuf;

use anyhow::{Context, bail};
use blocklora_client::{Load, Model, ModelState};

use crate::args::Precision;
use crate::daemon::{self, Daemon, State, watch};
use crate::output;
use crate::table::{Table, bytes};

/// The models that the daemon knows: list, add, remove, load, unload
#[derive(clap::Subcommand)]
pub enum Command {
    List(List),
    Add(Add),
    /// Forget a model; its files stay
    Remove(Named),
    Load(LoadArgs),
    /// Free a model's memory
    Unload(Named),
}

/// List the models
#[derive(clap::Args)]
pub struct List {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Make a model folder in the diffusers layout known; nothing is copied
#[derive(clap::Args)]
pub struct Add {
    /// The folder
    #[arg(value_name = "DIR")]
    folder: PathBuf,
    /// What to call it [default: the folder's name]
    #[arg(long, value_name = "ID")]
    id: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
pub struct Named {
    /// Its id, as `blocklora models list` shows it
    #[arg(value_name = "ID")]
    id: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Load a model into memory now, not when it is first needed
#[derive(clap::Args)]
pub struct LoadArgs {
    /// Its id, as `blocklora models list` shows it
    #[arg(value_name = "ID")]
    id: String,
    /// Storage type of the weights; a job that needs another loads the model again [default: the daemon's]
    #[arg(long, value_enum)]
    precision: Option<Precision>,
    /// Keep it loaded this long after its last use, seconds [default: the daemon's]
    #[arg(long, value_name = "SECONDS")]
    keep: Option<u64>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(command: &Command, options: &daemon::Options) -> anyhow::Result<()> {
    daemon::run(async {
        let daemon = daemon::connect(options, State::User).await?;
        match command {
            Command::List(args) => list(&daemon, args).await?,
            Command::Add(args) => add(&daemon, args).await?,
            Command::Remove(args) => {
                daemon.client.forget_model(&args.id).await?;
                say(args.json, &serde_json::json!({ "id": args.id }))?;
            }
            Command::Load(args) => load(&daemon, args).await?,
            Command::Unload(args) => {
                find(&daemon, &args.id).await?.unload().await?;
                say(args.json, &serde_json::json!({ "id": args.id }))?;
            }
        }
        daemon.close().await;
        Ok(())
    })
}

fn say(json: bool, value: &serde_json::Value) -> anyhow::Result<()> {
    if json { output::print_json(value) } else { Ok(()) }
}

async fn states(daemon: &Daemon) -> anyhow::Result<Vec<(Model, ModelState)>> {
    let mut states = Vec::new();
    for model in daemon.client.models().await? {
        let state = model.state().await?;
        states.push((model, state));
    }
    Ok(states)
}

async fn find(daemon: &Daemon, id: &str) -> anyhow::Result<Model> {
    let found = states(daemon).await?.into_iter().find(|(_, state)| state.id == id);
    let (model, _) =
        found.with_context(|| format!("there is no model {id:?}: `blocklora models list` shows those that are"))?;
    Ok(model)
}

async fn list(daemon: &Daemon, args: &List) -> anyhow::Result<()> {
    let models: Vec<ModelState> = states(daemon).await?.into_iter().map(|(_, state)| state).collect();
    if args.json {
        return output::print_json(&models);
    }
    let mut table = Table::new(["id", "state", "precision", "memory", "device", "folder"]);
    for m in &models {
        let state = if m.problem.1.is_empty() { m.state.clone() } else { format!("{}: {}", m.state, m.problem.1) };
        table.row([
            m.id.clone(),
            state,
            m.precision.clone(),
            bytes(m.resident_bytes),
            m.device.clone(),
            m.path.clone(),
        ]);
    }
    Ok(output::print(&table.to_string())?)
}

async fn add(daemon: &Daemon, args: &Add) -> anyhow::Result<()> {
    if daemon.is_private() && !args.folder.is_dir() {
        bail!("{}: is not a folder: give the folder of a model in the diffusers layout", args.folder.display());
    }
    let folder = std::path::absolute(&args.folder).with_context(|| args.folder.display().to_string())?;
    let text = folder.to_str().with_context(|| format!("{}: the name is not UTF-8", folder.display()))?;
    let state = daemon.client.register_model(text, args.id.as_deref()).await?.state().await?;
    if args.json {
        return output::print_json(&state);
    }
    Ok(output::print(&format!("{}: {}\n", state.id, state.path))?)
}

async fn load(daemon: &Daemon, args: &LoadArgs) -> anyhow::Result<()> {
    if daemon.is_private() {
        bail!("no daemon runs, and a private one ends with this command: start one (systemctl --user start blocklora)");
    }
    let request = Load {
        precision: args.precision.map(|p| p.name().to_owned()),
        keep_alive_usec: args.keep.map(|seconds| seconds.saturating_mul(1_000_000)),
        ..Load::default()
    };
    let job = daemon.client.load_model(&args.id, &request).await?;
    let loaded = watch::quietly(&job, "loading the model").await?;
    if args.json {
        return output::print_json(&loaded);
    }
    let (size, seconds) = (bytes(loaded.resident_bytes), loaded.usec as f64 / 1e6);
    Ok(output::print(&format!("{}: {size} in {seconds:.1} s\n", args.id))?)
}
