//! `blocklora adapters`: the daemon's library of adapters.

use std::path::{Path, PathBuf};

use anyhow::bail;
use blocklora_client::{LibraryEntry, Options as Filter, ResultFile};
use blocklora_service::plugins::words::shown;

use crate::daemon::{self, Daemon, State};
use crate::output::{self, OutputFile, OutputFolder};
use crate::table::{Table, bytes, date};
use crate::words::Words;

/// Keep a library of adapters: add, list, show, remove, export
#[derive(clap::Subcommand)]
pub enum Command {
    Add(Add),
    List(List),
    Show(Show),
    Remove(Remove),
    Export(Export),
    Check(Check),
}

/// Check adapter files and add them to the library
///
/// A file is copied into the library; the same file twice is one entry. Prompts, `generate --with` and `merge` can then
/// name the adapter by its name or by the first digits of its digest.
#[derive(clap::Args)]
pub struct Add {
    /// Adapter files
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Print the entries as JSON
    #[arg(long)]
    json: bool,
}

/// List the library's adapters
#[derive(clap::Args)]
pub struct List {
    /// Only adapters with this text in name, class word or digest
    #[arg(value_name = "TEXT")]
    text: Option<String>,
    /// Only this kind: subject, person, scene or style
    #[arg(long, value_name = "KIND")]
    kind: Option<String>,
    /// Only adapters trained on the model with this digest
    #[arg(long, value_name = "DIGEST")]
    base_digest: Option<String>,
    /// Only adapters of this trainer
    #[arg(long, value_name = "NAME")]
    algorithm: Option<String>,
    /// Only adapters in this state: ok, missing or corrupt
    #[arg(long, value_name = "STATE")]
    state: Option<String>,
    /// Only adapters in this slot of their partition
    #[arg(long, value_name = "N")]
    slot: Option<u32>,
    /// By name, added or size; with - in front from the largest
    #[arg(long, value_name = "ORDER", default_value = "name", allow_hyphen_values = true)]
    sort: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Show everything that an adapter says of itself
#[derive(clap::Args)]
pub struct Show {
    /// Its name, its digest, or the first 8 or more digits of that
    #[arg(value_name = "ADAPTER")]
    adapter: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Remove adapters from the library
#[derive(clap::Args)]
pub struct Remove {
    /// Their names, their digests, or the first 8 or more digits of those
    #[arg(required = true, value_name = "ADAPTER")]
    adapters: Vec<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Write an adapter of the library as files for other tools
///
/// Beside a LoRA (kohya, diffusers, peft) its words are exported as a textual-inversion file, if they have one vector
/// each; layer-wise words exist only here.
#[derive(clap::Args)]
pub struct Export {
    /// Its name, its digest, or the first 8 or more digits of that
    #[arg(value_name = "ADAPTER")]
    adapter: String,
    /// blocklora (the file itself), kohya, diffusers, peft or textual-inversion
    #[arg(long, value_name = "FORMAT", default_value = "blocklora")]
    format: String,
    /// The file to write; for a format of several files, the folder
    #[arg(short, long, value_name = "PATH")]
    output: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Read every file of the library again and compare digests
#[derive(clap::Args)]
pub struct Check {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(command: &Command, options: &daemon::Options) -> anyhow::Result<()> {
    daemon::run(async {
        let daemon = daemon::connect(options, State::User).await?;
        match command {
            Command::Add(args) => add(&daemon, args).await?,
            Command::List(args) => list(&daemon, args).await?,
            Command::Show(args) => show(&daemon, args).await?,
            Command::Remove(args) => remove(&daemon, args).await?,
            Command::Export(args) => export(&daemon, args).await?,
            Command::Check(args) => check(&daemon, args).await?,
        }
        daemon.close().await;
        Ok(())
    })
}

async fn add(daemon: &Daemon, args: &Add) -> anyhow::Result<()> {
    // All are checked before the first is added.
    for file in &args.files {
        blocklora_spec::Adapter::open(file)?;
    }
    let mut states = Vec::new();
    for file in &args.files {
        states.push(daemon.client.register_adapter(file).await?.state().await?);
    }
    if args.json {
        return output::print_json(&states);
    }
    let lines = args.files.iter().zip(&states);
    let text: String =
        lines.map(|(file, s)| format!("{}: {} {}\n", file.display(), s.name, short(&s.digest))).collect();
    Ok(output::print(&text)?)
}

async fn list(daemon: &Daemon, args: &List) -> anyhow::Result<()> {
    let filter = Filter::new()
        .maybe("text", args.text.clone())
        .maybe("kind", args.kind.clone())
        .maybe("base_digest", args.base_digest.clone())
        .maybe("algorithm", args.algorithm.clone())
        .maybe("state", args.state.clone())
        .maybe("slot", args.slot)
        .with("sort", args.sort.clone());
    let entries = daemon.client.library(filter).await?;
    if args.json {
        return output::print_json(&entries);
    }
    let mut table = Table::new(["name", "digest", "class", "kind", "by", "slot", "rank", "size", "added", "state"]);
    entries.iter().for_each(|e| table.row(row(e)));
    Ok(output::print(&table.to_string())?)
}

fn row(entry: &LibraryEntry) -> [String; 10] {
    let slot = match (&entry.partition, entry.slot) {
        (Some(partition), Some(slot)) => format!("{slot} of {}", partition.capacity),
        _ => "all".to_owned(),
    };
    let state =
        if entry.problem.is_empty() { entry.state.clone() } else { format!("{}: {}", entry.state, entry.problem) };
    [
        entry.name.clone(),
        short(&entry.digest).to_owned(),
        entry.class_word.clone(),
        entry.kind.clone(),
        entry.algorithm.clone(),
        slot,
        entry.rank.to_string(),
        bytes(entry.size),
        date(entry.added_usec),
        state,
    ]
}

fn short(digest: &str) -> &str {
    digest.get(..12).unwrap_or(digest)
}

async fn show(daemon: &Daemon, args: &Show) -> anyhow::Result<()> {
    let adapter = daemon.client.open_adapter(&args.adapter).await?;
    let (state, mut info) = (adapter.state().await?, adapter.inspect().await?);
    // The manifest is a text in the file; its content is what is of interest.
    if let Some(serde_json::Value::String(text)) = info.get("manifest") {
        let manifest = serde_json::from_str(text)?;
        info.insert("manifest".into(), manifest);
    }
    if args.json {
        return output::print_json(&serde_json::json!({ "adapter": state, "info": info }));
    }
    let count = |key: &str| info.get(key).and_then(|v| v.as_array()).map_or(0, Vec::len);
    let rows = match (state.partition.get("slot"), state.partition.get("capacity")) {
        (Some(slot), Some(capacity)) => format!("slot {slot} of {capacity}"),
        _ => "all".to_owned(),
    };
    let mut text = format!(
        "{}  ({}, {:?})\n  digest      {}\n  base        {} {}\n  trained by  {} {}\n  factors     {} layers, rank {}\n  \
         rows        {rows}\n  words       {}\n  size        {}\n",
        state.name,
        state.kind,
        state.class_word,
        state.digest,
        shown(&state.architecture),
        short(&state.base_digest),
        state.algorithm,
        shown(&state.producer.0),
        count("layers"),
        state.rank,
        count("tokens"),
        bytes(state.size_bytes)
    );
    for (name, message) in &state.problems {
        text += &format!("  problem     {} ({name})\n", shown(message));
    }
    Ok(output::print(&text)?)
}

async fn remove(daemon: &Daemon, args: &Remove) -> anyhow::Result<()> {
    // All must be there before the first is removed.
    let mut adapters = Vec::new();
    for name in &args.adapters {
        adapters.push(daemon.client.open_adapter(name).await?);
    }
    let mut removed = Vec::new();
    for adapter in adapters {
        let state = adapter.state().await?;
        adapter.unregister(true).await?;
        removed.push(serde_json::json!({ "name": state.name, "digest": state.digest }));
    }
    if args.json { output::print_json(&removed) } else { Ok(()) }
}

async fn export(daemon: &Daemon, args: &Export) -> anyhow::Result<()> {
    let adapter = daemon.client.open_adapter(&args.adapter).await?;
    // A LoRA is half of a concept: its words go along.
    let words = match args.format.as_str() {
        "kohya" | "diffusers" | "peft" => Words::of(vectors(&adapter.inspect().await?)),
        _ => Words::None,
    };
    let mut outputs = Vec::new();
    let embedding = words.file(&args.output);
    if let Some(path) = &embedding {
        let file = OutputFile::create(path)?;
        let [exported] = &mut adapter.export("textual-inversion").await?[..] else {
            bail!("the daemon gave something other than one file of words");
        };
        outputs.push((file, std::mem::take(&mut exported.bytes)));
    }
    // A format of several files gives a folder; which formats do, the daemon knows.
    let mut files = adapter.export(&args.format).await?;
    let count = files.len();
    if let [file] = &mut files[..] {
        outputs.push((OutputFile::create(&args.output)?, std::mem::take(&mut file.bytes)));
    } else {
        write_folder(&args.output, &files)?;
    }
    output::write_all(outputs)?;
    if args.json {
        output::print_json(&serde_json::json!({
            "path": args.output, "format": args.format, "files": count, "embedding": embedding,
        }))?;
    } else {
        for path in std::iter::once(&args.output).chain(&embedding) {
            output::print(&format!("{}\n", path.display()))?;
        }
    }
    words.note_what_is_left(&adapter.state().await?.name);
    Ok(())
}

/// The numbers of vectors of the tokens that `Inspect` lists: name, vectors, width.
fn vectors(info: &serde_json::Map<String, serde_json::Value>) -> Vec<usize> {
    let tokens = info.get("tokens").and_then(serde_json::Value::as_array);
    let vectors = |token: &serde_json::Value| token.get(1).and_then(serde_json::Value::as_u64).unwrap_or_default();
    tokens.into_iter().flatten().map(|token| vectors(token) as usize).collect()
}

fn write_folder(output: &Path, files: &[ResultFile]) -> anyhow::Result<()> {
    let folder = OutputFolder::create(output)?;
    for file in files {
        let name = Path::new(&file.name);
        let plain = name.components().all(|c| matches!(c, std::path::Component::Normal(_)));
        if !plain || file.name.is_empty() {
            bail!("the daemon names a file {:?}, which is no place in a folder", file.name);
        }
        let path = folder.path().join(name);
        let parent = path.parent().map_or(Ok(()), std::fs::create_dir_all);
        parent.and_then(|()| std::fs::write(&path, &file.bytes)).map_err(|e| output::cannot_write(output, e))?;
    }
    folder.finish()
}

async fn check(daemon: &Daemon, args: &Check) -> anyhow::Result<()> {
    let path = daemon.client.manager().await?.validate_library(&Default::default()).await?;
    let job = daemon.client.job::<serde_json::Map<String, serde_json::Value>>(path).await?;
    let look = daemon::watch::Look::bar("checking", 0);
    let found = daemon::watch::follow(&job, look).await?;
    let problems = found.get("problems").and_then(|p| p.as_array()).cloned().unwrap_or_default();
    if args.json {
        output::print_json(&found)?;
    } else {
        let checked = found.get("checked").and_then(serde_json::Value::as_u64).unwrap_or_default();
        let mut text = format!("{checked} adapters checked, {} with problems\n", problems.len());
        for problem in &problems {
            let field = |i: usize| problem.get(i).and_then(serde_json::Value::as_str).unwrap_or_default();
            text += &format!("{}  {}: {}\n", short(field(0)), field(1), field(2));
        }
        output::print(&text)?;
    }
    if problems.is_empty() { Ok(()) } else { bail!("{} adapters of the library are not sound", problems.len()) }
}
