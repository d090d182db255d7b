//! `blocklora train`: teach a concept from a folder of pictures.

mod checkpoint;
mod rows;
mod settings;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, bail};
use blocklora_client::{CancelMode, ResultFile, Train, Trained};
use blocklora_engine::train::Dataset;
use blocklora_sdk::manifest::PluginKind;
use blocklora_spec::{Adapter, Kind};

use crate::args::{KindArg, ModelArgs, StorageArg};
use crate::concepts::Concepts;
use crate::daemon::{self, Daemon, State, choose_model, watch};
use crate::failure::Interrupted;
use crate::output::{self, OutputFile};
use crate::words::Words;
use crate::{interrupt, methods};
use rows::Rows;

/// Teach the model a concept from a folder of pictures
///
/// Five to ten pictures of one person, thing, place or style are enough. Captions are optional: `x.txt` beside `x.png`,
/// or a `metadata.jsonl` with lines like {"file_name": "x.png", "text": "a {c} on the beach"}; `{c}` stands for the
/// concept.
///
/// The result is one adapter file. The same pictures, settings and seed give the same file, byte for byte. Ctrl-C saves
/// a checkpoint, and every so many steps one is saved; the same command with --resume goes on from there.
#[derive(clap::Args)]
pub struct Args {
    /// Folder with the pictures (PNG, JPEG or WebP)
    #[arg(long, value_name = "DIR")]
    images: PathBuf,
    /// The word for what it is, known to the model: man, dog, house, painting
    #[arg(long, value_name = "WORD")]
    class: String,
    /// What to call it: a prompt names it as <NAME>
    #[arg(long)]
    name: String,
    /// What kind of thing it is; decides the sentences that pictures are captioned with
    #[arg(long, value_enum, default_value = "subject")]
    kind: KindArg,
    /// How to train: blocklora (own rows and output erasure), ed-lora (all rows), or another trainer of `blocklora plugin
    /// list`
    #[arg(long, value_name = "NAME", default_value = "blocklora")]
    method: String,
    /// Settings of the method, as TOML; `blocklora plugin info train-ID` lists them
    #[arg(long, value_name = "FILE.toml")]
    config: Option<PathBuf>,
    /// Which block of rows the concept owns: a number below the partition's capacity, or "none" for all rows [default:
    /// the lowest slot that no adapter or unfinished training in the output's folder has, nor one of the daemon's library]
    #[arg(long, value_name = "N")]
    slot: Option<Slot>,
    /// Training steps [default: what the settings say]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    steps: Option<u32>,
    /// Decides every random number; concepts of one seed start apart, by their names
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Go on from the checkpoint of an interrupted run; an error where there is none
    #[arg(long)]
    resume: bool,
    /// The licence to state in the file, e.g. CC-BY-4.0
    #[arg(long)]
    licence: Option<String>,
    /// Type of the numbers in the file
    #[arg(long, value_enum, default_value = "f32")]
    storage: StorageArg,
    /// The adapter file to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    model: ModelArgs,
}

/// Which slot is asked for.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Slot {
    /// All rows.
    None,
    /// This one.
    Number(u32),
}

impl FromStr for Slot {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "none" => Ok(Self::None),
            _ => text.parse().map(Self::Number).map_err(|_| "give a number or \"none\"".to_owned()),
        }
    }
}

/// Runs the command.
pub fn run(args: &Args, options: &daemon::Options) -> anyhow::Result<()> {
    let settings = settings::read(args.config.as_deref(), args.steps)?;
    output::check_file(&args.output)?;
    let has_slots = methods::plugins().has_setting(PluginKind::Train, &args.method, "partition")?;
    let rows = Rows::asked_for(args.slot, &args.method, has_slots, settings.partition.as_ref())?;
    let pictures = pictures(&args.images)?;
    // All pictures and captions are read here once, so that what is wrong is said at once and by the file's name.
    Dataset::from_files(&pictures)?;
    let (trained, rows, mut files, private) = daemon::run(teach(args, options, &settings, rows, &pictures))?;
    let artefacts = output::artefacts(&args.output, &mut files)?;
    let Some(file) = files.pop() else { bail!("the daemon gave no adapter") };
    OutputFile::create(&args.output)?.write(&file.bytes)?;
    if private {
        checkpoint::remove(&args.output)?;
    }
    finish(args, &trained, &rows, &artefacts)
}

/// The pictures of `folder` with their captions; those of `concepts.json` if they are a bundled concept's.
fn pictures(folder: &Path) -> anyhow::Result<Vec<(PathBuf, Option<String>)>> {
    if !folder.is_dir() {
        bail!("{}: is not a folder: give the folder with the concept's pictures", folder.display());
    }
    let bundled =
        folder.parent().filter(|p| p.join("concepts.json").is_file() && !folder.join("metadata.jsonl").exists());
    if let (Some(parent), Some(name)) = (bundled, folder.file_name().and_then(|n| n.to_str())) {
        let concepts = Concepts::open(parent)?;
        if let Some(entry) = concepts.entries.iter().find(|e| e.name == name) {
            return Ok(concepts.pictures(entry));
        }
    }
    Ok(Dataset::list_folder(folder)?)
}

async fn teach(
    args: &Args,
    options: &daemon::Options,
    settings: &settings::Settings,
    rows: Rows,
    pictures: &[(PathBuf, Option<String>)],
) -> anyhow::Result<(Trained, Rows, Vec<ResultFile>, bool)> {
    // A private daemon keeps its checkpoints where they were always kept: beside the output.
    let state = State::Folder(checkpoint::folder(&args.output)?);
    let asked = settings::fingerprint(args, settings, &rows, pictures)?;
    let (daemon, resume) = match daemon::running(options).await? {
        Some(daemon) => {
            checkpoint::fails_if_there(&args.output)?;
            (daemon, args.resume)
        }
        None => {
            let resume = checkpoint::begin(&args.output, &asked, args.resume)?;
            if let Some(adapter) = checkpoint::finished(&args.output) {
                let (trained, rows, file) = checkpoint::trained(&adapter, args)?;
                return Ok((trained, rows, vec![file], true));
            }
            (daemon::start(options, state).await?, resume)
        }
    };
    let result = teach_with(&daemon, args, settings, rows, pictures, resume).await;
    let private = daemon.is_private();
    daemon.close().await;
    match result {
        Ok((trained, rows, files)) => Ok((trained, rows, files, private)),
        // Nothing is worth keeping of a training that did not come to a checkpoint.
        Err(error) if private && !checkpoint::is_there(&args.output) => {
            checkpoint::remove(&args.output)?;
            Err(error)
        }
        Err(error) if private && !error.is::<Interrupted>() => {
            let shown = checkpoint::shown(&args.output);
            Err(error.context(format!("{shown} is kept, and the same command with --resume goes on from there")))
        }
        Err(error) => Err(error),
    }
}

async fn teach_with(
    daemon: &Daemon,
    args: &Args,
    settings: &settings::Settings,
    rows: Rows,
    pictures: &[(PathBuf, Option<String>)],
    resume: bool,
) -> anyhow::Result<(Trained, Rows, Vec<ResultFile>)> {
    let model = choose_model(daemon, &args.model).await?;
    let rows = rows.decided(&args.output, daemon, &model.state.digest).await?;
    let mut request = Train {
        kind: Some(Kind::from(args.kind).name().into()),
        captions: pictures.iter().map(|(_, caption)| caption.clone().unwrap_or_default()).collect(),
        model: Some(model.state.id.clone()),
        precision: args.model.precision_name(),
        seed: Some(args.seed),
        storage: Some(args.storage.name().into()),
        licence: args.licence.clone(),
        resume: resume.then_some(true),
        ..Train::new(&args.name, &args.class)
    };
    rows.apply(&mut request);
    if daemon.is_private() {
        request.job.lifetime = Some("connection".into());
    }
    let open = |(path, _): &(PathBuf, _)| File::open(path).with_context(|| path.display().to_string());
    let files = pictures.iter().map(open).collect::<anyhow::Result<Vec<_>>>()?;
    let job = daemon.client.train(&args.method, &settings.config, &files, &request).await?;
    let look = watch::Look {
        on_interrupt: CancelMode::Checkpoint,
        ..watch::Look::bar("training", settings.steps.unwrap_or(0))
    };
    let trained = match watch::follow(&job, look).await {
        // Somebody else may cancel it, too, and need not keep anything.
        Err(error) if watch::is_cancelled(&error) && interrupt::requested() => {
            let kept = if daemon.is_private() {
                format!("saved in {}", checkpoint::shown(&args.output))
            } else {
                "saved by the daemon".to_owned()
            };
            let text = match job.state().await.ok().filter(|state| state.loss().is_some()).map(|state| state.step) {
                Some((at, of)) => {
                    format!("step {at} of {of} is {kept}; the same command with --resume goes on from there")
                }
                // Its pictures were being read or drawn: those can be had again.
                None => "no step was trained yet, so that there is nothing new to keep".to_owned(),
            };
            return Err(Interrupted(text).into());
        }
        result => result?,
    };
    Ok((trained, rows, job.take_results(true).await?))
}

fn finish(args: &Args, trained: &Trained, rows: &Rows, artefacts: &[PathBuf]) -> anyhow::Result<()> {
    let adapter = Adapter::open(&args.output)?;
    let embedding = Words::of(adapter.tokens().iter().map(|t| t.layers)).file(&args.output);
    if let Some(path) = &embedding {
        blocklora_spec::export::textual_inversion(&adapter, path)?;
    }
    let seconds = trained.usec as f64 / 1e6;
    if args.json {
        return output::print_json(&serde_json::json!({
            "file": args.output,
            "embedding": embedding,
            "artefacts": artefacts,
            "digest": trained.digest,
            "parameters": trained.parameters,
            "seconds": seconds,
            "slot": adapter.manifest().partition.map(|p| p.slot),
            "steps": trained.steps,
            "resumed_at": trained.resumed_at,
        }));
    }
    let mut text = format!(
        "{}: <{}>, {rows}, {} numbers, trained in {seconds:.0} s\n",
        args.output.display(),
        args.name,
        trained.parameters
    );
    if let Some(path) = embedding {
        text += &format!("{}: its words for other tools\n", path.display());
    }
    for path in artefacts {
        text += &format!("{}: handed over by the trainer\n", path.display());
    }
    output::print(&text)?;
    Ok(())
}
