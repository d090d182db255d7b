//! `blocklora train`: teach a concept from a folder of pictures.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, bail};
use blocklora_engine::Error;
use blocklora_engine::train::{Concept, Dataset, Progress, TrainReport, TrainRequest, Trainer, train};
use blocklora_sdk::manifest::PluginKind;
use blocklora_spec::{Adapter, Kind, Partition, Scheme, Storage};
use clap::ValueEnum;
use serde_json::{Value, json};

use crate::args::ModelArgs;
use crate::concepts::Concepts;
use crate::failure::{self, Interrupted};
use crate::{interrupt, methods, output, progress, session};

/// Teach the model a concept from a folder of pictures
///
/// Five to ten pictures of one person, thing, place or style are enough. Captions are optional: `x.txt` beside `x.png`,
/// or a `metadata.jsonl` with lines like {"file_name": "x.png", "text": "a {c} on the beach"}; `{c}` stands for the
/// concept.
///
/// The result is one adapter file. The same pictures, settings and seed give the same file, byte for byte. Ctrl-C saves
/// a checkpoint beside it; the same command with --resume goes on from there.
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
    /// How to train: `blocklora plugin list` shows the trainers
    #[arg(long, value_name = "ID", default_value = "blocklora")]
    method: String,
    /// Settings of the method, as TOML; `blocklora plugin info train-ID` lists them
    #[arg(long, value_name = "FILE.toml")]
    config: Option<PathBuf>,
    /// Which block of rows the concept owns: a number below the partition's capacity, or "none" for all rows [default:
    /// the lowest slot that no adapter in the output's folder has]
    #[arg(long, value_name = "N")]
    slot: Option<Slot>,
    /// Training steps [default: what the settings say]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    steps: Option<u32>,
    /// Decides every random number
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Go on from the checkpoint of an interrupted run
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

/// [`Kind`] as people write it.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum KindArg {
    /// A thing or an animal
    Subject,
    /// A person or a character
    Person,
    /// A place
    Scene,
    /// A manner of drawing
    Style,
}

impl From<KindArg> for Kind {
    fn from(kind: KindArg) -> Self {
        match kind {
            KindArg::Subject => Self::Subject,
            KindArg::Person => Self::Person,
            KindArg::Scene => Self::Scene,
            KindArg::Style => Self::Style,
        }
    }
}

/// [`Storage`] as people write it.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum StorageArg {
    /// 32 bits, as trained
    F32,
    /// 16 bits: half the size, rounded
    F16,
}

impl From<StorageArg> for Storage {
    fn from(storage: StorageArg) -> Self {
        match storage {
            StorageArg::F32 => Self::F32,
            StorageArg::F16 => Self::F16,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Slot {
    None,
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

/// The partition where neither settings nor options name one: the paper's blocks, for up to 16 concepts.
const PARTITION: Partition = Partition { scheme: Scheme::Contiguous, capacity: 16, seed: 0, slot: 0 };

/// The sampler that draws pictures of the class, for methods that learn them along.
const CLASS_SAMPLER: &str = "ddim";

/// Runs the command.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let mut settings = read_settings(args.config.as_deref())?;
    if let Some(steps) = args.steps {
        settings["steps"] = json!(steps);
    }
    output::check_file(&args.output)?;
    let partition = choose_rows(args, &mut settings)?;
    let trainer = methods::plugins().trainer(&args.method, &settings)?;
    let dataset = dataset(&args.images)?;
    let model = session::open_model(&args.model)?;
    let concept = Concept { name: args.name.clone(), class_word: args.class.clone(), kind: args.kind.into() };
    let steps = trainer.plan(&concept)?.steps;
    let request = TrainRequest {
        concept,
        seed: args.seed,
        output: args.output.clone(),
        resume: args.resume,
        storage: args.storage.into(),
        licence: args.licence.clone(),
        created: None,
        sampler: methods::sampler(CLASS_SAMPLER).ok(),
    };
    let report = run_training(&model, &dataset, trainer.as_ref(), &request, steps)?;
    finish(args, partition, &report)
}

fn read_settings(path: Option<&Path>) -> anyhow::Result<Value> {
    let Some(path) = path else { return Ok(json!({})) };
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    toml::from_str(&text).with_context(|| format!("{}: not valid training settings", path.display()))
}

/// Decides which rows the concept owns, if the method has a say in that, and puts them into its settings.
fn choose_rows(args: &Args, settings: &mut Value) -> anyhow::Result<Option<Partition>> {
    if !methods::plugins().has_setting(PluginKind::Train, &args.method, "partition")? {
        if let Some(Slot::Number(_)) = args.slot {
            return failure::usage(format!(
                "--slot: {} owns all rows; leave it out or use --method blocklora",
                args.method
            ));
        }
        return Ok(None);
    }
    let chosen: Option<Partition> = match settings.get("partition") {
        None | Some(Value::Null) => None,
        Some(partition) => Some(serde_json::from_value(partition.clone()).context("partition")?),
    };
    let partition = chosen.unwrap_or(PARTITION);
    let partition = match args.slot {
        Some(Slot::None) => None,
        Some(Slot::Number(slot)) if slot < partition.capacity => Some(Partition { slot, ..partition }),
        Some(Slot::Number(slot)) => {
            return failure::usage(format!(
                "--slot {slot}: the partition has the slots 0 to {}",
                partition.capacity - 1
            ));
        }
        // The settings chose a slot themselves.
        None if chosen.is_some() => Some(partition),
        None => Some(Partition { slot: free_slot(&args.output, &partition)?, ..partition }),
    };
    settings["partition"] = serde_json::to_value(partition)?;
    Ok(partition)
}

/// The lowest slot of `partition` that no other adapter beside `output` has.
fn free_slot(output: &Path, partition: &Partition) -> anyhow::Result<u32> {
    let folder = output.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut taken = BTreeSet::new();
    for entry in folder.read_dir().with_context(|| folder.display().to_string())? {
        let path = entry.with_context(|| folder.display().to_string())?.path();
        let candidate = path.extension().is_some_and(|e| e == "safetensors") && path.file_name() != output.file_name();
        // Other safetensors files may lie there, too: what is not an adapter owns no slot.
        if candidate && let Ok(adapter) = Adapter::open(&path) {
            let same = |p: &Partition| Partition { slot: 0, ..*p } == Partition { slot: 0, ..*partition };
            taken.extend(adapter.manifest().partition.filter(same).map(|p| p.slot));
        }
    }
    match (0..partition.capacity).find(|slot| !taken.contains(slot)) {
        Some(slot) => Ok(slot),
        None => bail!(
            "{}: its adapters have all {} slots: choose one with --slot, or settings with a larger capacity",
            folder.display(),
            partition.capacity
        ),
    }
}

/// The pictures of `folder`, with the captions of `concepts.json` if they are a bundled concept's.
fn dataset(folder: &Path) -> anyhow::Result<Dataset> {
    if !folder.is_dir() {
        bail!("{}: is not a folder: give the folder with the concept's pictures", folder.display());
    }
    let bundled =
        folder.parent().filter(|p| p.join("concepts.json").is_file() && !folder.join("metadata.jsonl").exists());
    if let (Some(parent), Some(name)) = (bundled, folder.file_name().and_then(|n| n.to_str())) {
        let concepts = Concepts::open(parent)?;
        if let Some(entry) = concepts.entries.iter().find(|e| e.name == name) {
            return Ok(Dataset::from_files(&concepts.pictures(entry))?);
        }
    }
    Ok(Dataset::from_folder(folder)?)
}

fn run_training(
    model: &blocklora_engine::model::Model,
    dataset: &Dataset,
    trainer: &dyn Trainer,
    request: &TrainRequest,
    steps: usize,
) -> anyhow::Result<TrainReport> {
    let bar = progress::bar("training", steps);
    let mut at = 0;
    let mut started = false;
    let mut mean = None;
    let mut step_done = |p: Progress| {
        if !started {
            // A resumed run begins in the middle: speed and ETA count from there.
            bar.set_position(p.step.saturating_sub(1) as u64);
            bar.reset_eta();
            started = true;
        }
        at = p.step;
        // One step's loss says little: its timestep decides most of it.
        let smooth = mean.map_or(p.loss, |m: f32| 0.98 * m + 0.02 * p.loss);
        mean = Some(smooth);
        bar.set_position(p.step as u64);
        bar.set_message(format!("loss {smooth:.4}"));
        interrupt::check()
    };
    let result = train(model, dataset, trainer, request, &mut step_done);
    bar.finish_and_clear();
    match result {
        Err(Error::Cancelled) => Err(Interrupted(format!(
            "step {at} of {steps} is saved in {}; the same command with --resume goes on from there",
            request.checkpoint_path().display()
        ))
        .into()),
        result => Ok(result?),
    }
}

fn finish(args: &Args, partition: Option<Partition>, report: &TrainReport) -> anyhow::Result<()> {
    let adapter = Adapter::open(&args.output)?;
    // Words of one vector are what other tools can read.
    let is_plain = adapter.tokens().iter().all(|token| token.layers == 1) && !adapter.tokens().is_empty();
    let embedding = match is_plain {
        false => None,
        true => {
            let path = args.output.with_extension("embedding.safetensors");
            blocklora_spec::export::textual_inversion(&adapter, &path)?;
            Some(path)
        }
    };
    if args.json {
        return output::print_json(&serde_json::json!({
            "file": args.output,
            "embedding": embedding,
            "digest": report.digest,
            "parameters": report.parameters,
            "seconds": report.seconds,
            "slot": partition.map(|p| p.slot),
        }));
    }
    let rows = match partition {
        Some(p) => format!("slot {} of {}", p.slot, p.capacity),
        None => "all rows".to_owned(),
    };
    let mut text = format!(
        "{}: <{}>, {rows}, {} numbers, trained in {:.0} s\n",
        args.output.display(),
        args.name,
        report.parameters,
        report.seconds
    );
    if let Some(path) = embedding {
        text += &format!("{}: its words for other tools\n", path.display());
    }
    output::print(&text)?;
    Ok(())
}
