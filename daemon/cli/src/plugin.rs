//! `blocklora plugin`: the merge strategies, trainers and samplers that are installed.

use std::path::{Path, PathBuf};

use blocklora_check::Level;
use blocklora_sdk::manifest::PluginKind;
use blocklora_service::plugins::check::Request;
use blocklora_service::plugins::words::shown;
use blocklora_service::plugins::{BY_HAND, Entry, PluginError, State, settings};
use serde_json::json;

use crate::{daemon, interrupt, methods, output};

/// See which merge strategies, trainers and samplers there are
#[derive(clap::Subcommand)]
pub enum Command {
    List(ListArgs),
    Info(InfoArgs),
    Check(CheckArgs),
    New(NewArgs),
    Quarantine(QuarantineArgs),
}

/// Run the conformance tests of a plugin's library, each in a process of its own
///
/// The manifest must lie beside the library. A line that failed says what to do, and how to repeat it.
#[derive(clap::Args)]
pub struct CheckArgs {
    /// The library
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// How much to test: 0 (it loads), 1 (its settings), 2 (its behaviour and numbers), 3 (on many random problems)
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(0..=3))]
    level: u32,
    /// Only this test; may be given several times
    #[arg(long, value_name = "NAME")]
    test: Vec<String>,
    /// The seed that a report names: repeats that run
    #[arg(long, value_name = "SEED", default_value_t = 1)]
    reproduce: u64,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Make a crate for a new plugin in this folder, which passes its tests as it is
#[derive(clap::Args)]
pub struct NewArgs {
    /// Its id: lower-case letters, digits and '-'
    #[arg(value_name = "ID")]
    id: String,
    /// What it does: merge, train or sample
    #[arg(long, value_name = "KIND", value_parser = ["merge", "train", "sample"])]
    kind: String,
    /// The folder of the SDK to build with [default: that of the source tree that this command was built from]
    #[arg(long, value_name = "DIR")]
    sdk: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// List the plugins
#[derive(clap::Args)]
pub struct ListArgs {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Show what a plugin is and what its settings are
#[derive(clap::Args)]
pub struct InfoArgs {
    /// Its kind and id, as `list` shows them: merge-blocklora
    #[arg(value_name = "KIND-ID")]
    plugin: Name,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Keep a plugin from being loaded, or lift that
///
/// A plugin that crashes or hangs is quarantined by itself; the quarantine ends when its file changes. A daemon that runs
/// is told, too.
#[derive(clap::Args)]
pub struct QuarantineArgs {
    /// Its kind and id, as `list` shows them: merge-blocklora
    #[arg(value_name = "KIND-ID")]
    plugin: Name,
    /// Lift the quarantine
    #[arg(long)]
    lift: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// `<kind>-<id>`.
#[derive(Clone, Debug)]
struct Name {
    kind: PluginKind,
    id: String,
}

impl std::str::FromStr for Name {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let kinds = [PluginKind::Merge, PluginKind::Train, PluginKind::Sample];
        let (kind, id) = text.split_once('-').unwrap_or((text, ""));
        match kinds.into_iter().find(|k| k.as_str() == kind) {
            Some(kind) if !id.is_empty() => Ok(Self { kind, id: id.to_owned() }),
            _ => Err("give a kind (merge, train or sample) and an id, such as merge-blocklora".to_owned()),
        }
    }
}

/// Runs the command.
pub fn run(command: &Command, options: &daemon::Options) -> anyhow::Result<()> {
    match command {
        Command::List(args) => list(args),
        Command::Info(args) => info(args),
        Command::Check(args) => check(args),
        Command::New(args) => new(args),
        Command::Quarantine(args) => quarantine(args, options),
    }
}

fn check(args: &CheckArgs) -> anyhow::Result<()> {
    let level = Level::from_number(args.level).unwrap_or(Level::Behaviour);
    let request = Request { level, only: args.test.clone(), seed: args.reproduce, is_cancelled: &interrupt::requested };
    let report = blocklora_service::plugins::check::check(&args.file, request)?;
    // What was not tested has not passed.
    interrupt::check()?;
    if args.json {
        output::print_json(&report)?;
    } else {
        output::print(&report.to_text())?;
    }
    anyhow::ensure!(!report.tests.is_empty(), "no test was run: there are, with their levels, {}", all_tests());
    anyhow::ensure!(report.passed, "{}: the plugin does not conform", args.file.display());
    Ok(())
}

/// All tests by name and level.
fn all_tests() -> String {
    let of_level = |(name, level, _): (&str, Level, _)| format!("{name} ({})", level.number());
    blocklora_check::list().map(of_level).collect::<Vec<_>>().join(", ")
}

fn new(args: &NewArgs) -> anyhow::Result<()> {
    let kinds = [PluginKind::Merge, PluginKind::Train, PluginKind::Sample];
    let kind = kinds.into_iter().find(|kind| kind.as_str() == args.kind).unwrap_or(PluginKind::Merge);
    let folder = blocklora_check::new_plugin(&args.id, kind, Path::new("."), args.sdk.as_deref())?;
    if args.json {
        return output::print_json(&json!({"folder": folder}));
    }
    Ok(output::print(&format!(
        "{}: build it with cargo build, put its manifest beside the library, and then: blocklora plugin check LIBRARY\n",
        folder.display()
    ))?)
}

fn state(entry: &Entry) -> (&'static str, &str) {
    match &entry.state {
        State::Ready => ("ready", ""),
        State::Missing(reason) => ("missing", reason),
        State::Quarantined(reason) => ("quarantined", reason),
    }
}

fn json_of(entry: &Entry) -> serde_json::Value {
    let (state, reason) = state(entry);
    json!({
        "kind": entry.found.manifest.kind,
        "id": entry.found.manifest.id,
        "version": entry.found.manifest.version,
        "abi": entry.found.manifest.abi,
        "summary": entry.found.manifest.summary,
        "manifest": entry.found.path,
        "library": entry.found.library,
        "digest": entry.digest,
        "state": state,
        "reason": reason,
        "crashes": entry.crashes,
    })
}

fn list(args: &ListArgs) -> anyhow::Result<()> {
    let (entries, broken) = methods::plugins().list();
    if args.json {
        let broken: Vec<_> = broken.iter().map(|b| json!({"manifest": b.path, "reason": b.reason})).collect();
        let plugins: Vec<_> = entries.iter().map(json_of).collect();
        return output::print_json(&json!({"plugins": plugins, "broken": broken}));
    }
    let width = entries.iter().map(|e| e.found.manifest.full_name().len()).max().unwrap_or(0);
    let mut text = String::new();
    for entry in &entries {
        let manifest = &entry.found.manifest;
        let (state, reason) = state(entry);
        let said = if reason.is_empty() { &manifest.summary } else { reason };
        let mark = if state == "ready" { String::new() } else { format!("{state}: ") };
        text += &format!("{:<width$}  {}  {mark}{}\n", manifest.full_name(), shown(&manifest.version), shown(said));
    }
    output::print(&text)?;
    for broken in broken {
        eprintln!("blocklora: {}: {}", broken.path.display(), shown(&broken.reason));
    }
    Ok(())
}

fn info(args: &InfoArgs) -> anyhow::Result<()> {
    let info = methods::plugins().info(args.plugin.kind, &args.plugin.id)?;
    let mut json = json_of(&info.entry);
    if args.json {
        json["schema"] = info.schema;
        json["defaults"] = info.defaults;
        return output::print_json(&json);
    }
    let manifest = &info.entry.found.manifest;
    let (version, summary) = (shown(&manifest.version), shown(&manifest.summary));
    let mut text = format!("{} {version}: {summary}\n", manifest.full_name());
    let facts = [
        ("licence", manifest.licence.clone()),
        ("reference", manifest.reference.clone().unwrap_or_default()),
        ("ABI", manifest.abi.clone()),
        ("library", info.entry.found.library.display().to_string()),
        ("SHA-256", info.entry.digest.clone()),
        ("memory", format!("{} MiB at most", manifest.memory_mib)),
        ("deterministic", if manifest.deterministic { "yes" } else { "not promised" }.to_owned()),
    ];
    for (name, value) in facts.into_iter().filter(|(_, value)| !value.is_empty()) {
        text += &format!("  {name:<14}{}\n", shown(&value));
    }
    text += "settings:\n";
    let properties = info.schema.get("properties").and_then(|p| p.as_object());
    for (key, property) in properties.into_iter().flatten() {
        let default = info.defaults.get(key).map(ToString::to_string).unwrap_or_default();
        let described = property.get("description").and_then(|d| d.as_str()).unwrap_or_default().replace('\n', " ");
        let (described, allowed) = (shown(&described), settings::range(&info.schema, property));
        text += &format!("  {key} = {default}{allowed}\n      {described}\n");
    }
    for (alias, settings) in &manifest.aliases {
        text += &format!("  {alias} is {} with {settings}\n", manifest.id);
    }
    output::print(&text)?;
    Ok(())
}

fn quarantine(args: &QuarantineArgs, options: &daemon::Options) -> anyhow::Result<()> {
    let Name { kind, id } = &args.plugin;
    let told = daemon::run(tell_daemon(args, options))?;
    let reason = (!args.lift).then_some(BY_HAND);
    match methods::plugins().set_quarantine(*kind, id, reason) {
        // The machine's daemon may have plugins that this user's commands do not find.
        Err(PluginError::Unknown { .. }) if told => {}
        result => result?,
    }
    if args.json {
        return output::print_json(&json!({"kind": kind, "id": id, "quarantined": !args.lift}));
    }
    let now = if args.lift { "is no longer quarantined" } else { "is quarantined" };
    output::print(&format!("{kind}-{id} {now}\n"))?;
    Ok(())
}

/// Quarantines the plugin, or lifts that, in the daemon that runs; whether there is one that has the plugin.
async fn tell_daemon(args: &QuarantineArgs, options: &daemon::Options) -> anyhow::Result<bool> {
    let Some(daemon) = daemon::running(options).await? else { return Ok(false) };
    let name = format!("{}-{}", args.plugin.kind, args.plugin.id);
    for plugin in daemon.client.plugins().await? {
        if plugin.state().await?.id == name {
            plugin.set_state(if args.lift { "cleared" } else { "disabled" }).await?;
            return Ok(true);
        }
    }
    Ok(false)
}
