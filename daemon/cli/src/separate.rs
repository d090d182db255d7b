//! `blocklora separate`: adapters that answer to their own concepts, so that many strong ones can be merged.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, bail};
use blocklora_engine::image::Picture;
use blocklora_engine::merge::AdapterFactors;
use blocklora_engine::merge::strategy::MergeStrategy;
use blocklora_engine::score::answers;
use blocklora_engine::separate::{NewA, Separation};
use blocklora_spec::{Adapter, AdapterBuilder, Kind, Layer, Manifest, Storage};
use serde::Serialize;
use serde_json::{Value, json};

use crate::args::{self, Clash, MergeArgs, OwnModelArgs, SamplingArgs, StorageArg, Strategy};
use crate::crosstalk::{all_others_by_own, median};
use crate::draw::{self, Job};
use crate::output::{self, OutputFolder};
use crate::session::{self, Session};
use crate::table::Table;
use crate::{interrupt, methods, progress};

/// Stands for the concept in prompts.
const PLACE: &str = "{}";
/// By what concepts are drawn: with what they will be drawn with, too, or it would count as their own.
const OF_THINGS: [&str; 6] =
    ["a {}", "a {} on the beach", "a {} in the snow", "a {} in the city", "a {} in a room", "a {} on a red background"];
const OF_SCENES: [&str; 6] =
    ["the {}", "a man in the {}", "a woman in the {}", "a dog in the {}", "a car in the {}", "a house in the {}"];
const OF_STYLES: [&str; 6] = ["a man, {}", "a woman, {}", "a dog, {}", "a cat, {}", "a house, {}", "a car, {}"];
/// The key in `algorithm.config` that says how a file was made of another.
const KEY: &str = "separated";

/// Make concepts answer to themselves alone, so that many strong ones can be merged
///
/// Concepts in different slots change different rows, but each row answers to every input, also where another concept is
/// drawn. That is felt once many concepts that have learned much are merged. `separate` draws each concept by itself, looks
/// at what enters the model's layers meanwhile, and chooses the factor A of each layer anew, in closed form: as it was
/// for its own concept's inputs, silent for those of the others as far as they differ. Nothing is trained.
///
/// The new files stand for the old ones, with the same names, words, rows and B, and any of them can be merged. What
/// concepts have in common is lost to each: alone, one is drawn a little better with its old file. A concept that joins
/// later is not known to them: separate all again, from the old files.
#[derive(clap::Args)]
pub struct Args {
    /// The concepts' adapter files, at least two, or folders of them
    #[arg(required = true, value_name = "FILE_OR_FOLDER")]
    adapters: Vec<PathBuf>,
    /// The folder to write the new files to, under the names of the old ones
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// A prompt to draw each concept by, {} for the concept; may be given many times. What it will be drawn with should
    /// be in them [default: six, such as "a {} on the beach", "a dog in the {}" for scenes and "a dog, {}" for styles]
    #[arg(long = "prompt", value_name = "PROMPT")]
    prompts: Vec<String>,
    /// Pictures for each prompt; their seeds are SEED, SEED + 1, ...
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=1000))]
    images: u16,
    /// How little an adapter is to answer to what none of the concepts showed: smaller is more selective, larger quieter
    #[arg(long, value_name = "R", default_value_t = 0.01, value_parser = ridge)]
    ridge: f64,
    /// Type of the numbers in the files
    #[arg(long, value_enum, default_value = "f32")]
    storage: StorageArg,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    model: OwnModelArgs,
}

fn ridge(text: &str) -> Result<f64, String> {
    let number = text.parse::<f64>().ok().filter(|r| (1e-6..=1e6).contains(r));
    number.ok_or_else(|| format!("{text:?} is not a number from 1e-6 to 1e6"))
}

/// What became of one concept, as medians over its layers.
#[derive(Serialize)]
struct Report {
    name: String,
    file: PathBuf,
    digest: String,
    /// ||dW_i' X_i|| / ||dW_i X_i||: how much of its own change is left.
    own: f64,
    /// ||dW_j X_i|| / ||dW_i X_i||, the root of its mean square over the other concepts j: how strongly another answers
    /// where this one is drawn.
    others_before: f64,
    /// The same of the new ones.
    others_after: f64,
}

/// Runs the command.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let files = files(&args.adapters)?;
    check_prompts(&args.prompts)?;
    let folder = OutputFolder::create(&args.output)?;
    let mut session = Session::new(session::open_model(&args.model)?, &files)?;
    // Of one adapter every strategy makes the same.
    let strategy = methods::strategy(&MergeArgs { strategy: Strategy::Blocklora, on_clash: Clash::Mean })?;
    let shown = draw_each(args, &mut session, &strategy)?;

    // Each concept twice: to separate, and to see what came of it.
    let bar = progress::bar("looking", 2 * shown.len());
    let mut separation = Separation::new(&session.model, session.factors());
    for (i, pictures) in shown.iter().enumerate() {
        interrupt::check()?;
        session.merge(&[(i, 1.0)], &strategy)?;
        let factors = session.factors().nth(i).context("every adapter has factors")?;
        separation.add(&session.model, factors, &session.concepts, pictures)?;
        bar.inc(1);
    }
    let new_a = separation.separate(args.ridge)?;
    let digests: Vec<&str> = session.adapters.iter().map(Adapter::digest).collect();
    let made = json!({"among": digests, "ridge": args.ridge});
    let mut new = Vec::new();
    for ((adapter, new_a), file) in session.adapters.iter().zip(&new_a).zip(&files) {
        let path = folder.path().join(file.file_name().context("a file has a name")?);
        builder(adapter, new_a, &made, args.storage.into()).write(&path)?;
        new.push(AdapterFactors::from_adapter(&Adapter::open(&path)?)?);
    }
    let mut reports = Vec::new();
    for ((i, pictures), file) in shown.iter().enumerate().zip(&files) {
        interrupt::check()?;
        session.merge(&[(i, 1.0)], &strategy)?;
        let file = args.output.join(file.file_name().context("a file has a name")?);
        reports.push(report(&session, i, &new, pictures, file)?);
        bar.inc(1);
    }
    bar.finish_and_clear();
    folder.finish()?;
    if args.json {
        return output::print_json(&reports);
    }
    Ok(output::print(&table(&reports).to_string())?)
}

/// The adapter files that `given` names, at least two, no two of one name.
fn files(given: &[PathBuf]) -> anyhow::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for path in given {
        files.extend(if path.is_dir() { args::adapters_in(path)? } else { vec![path.clone()] });
    }
    let mut names = BTreeSet::new();
    for file in &files {
        if !names.insert(file.file_name()) {
            bail!("{}: another file is called so, too: give one of them another name", file.display());
        }
    }
    match &files[..] {
        [] | [_] => bail!("{} concept: two are needed to tell them apart: give more files", files.len()),
        _ => Ok(files),
    }
}

fn check_prompts(prompts: &[String]) -> anyhow::Result<()> {
    match prompts.iter().find(|prompt| !prompt.contains(PLACE)) {
        Some(prompt) => bail!("--prompt {prompt:?}: write {PLACE} where the concept is to stand"),
        None => Ok(()),
    }
}

/// Draws every concept by itself; its pictures and their prompts.
fn draw_each(
    args: &Args,
    session: &mut Session,
    strategy: &Arc<dyn MergeStrategy>,
) -> anyhow::Result<Vec<Vec<(Picture, String)>>> {
    let settings = draw::Settings::new(&args.sampling, &session.model)?;
    let jobs: Vec<Vec<Job>> = session.adapters.iter().map(|adapter| jobs(args, adapter.manifest())).collect();
    let bar = progress::bar("drawing", jobs.iter().map(Vec::len).sum::<usize>() * settings.steps);
    let mut shown = Vec::new();
    for (i, jobs) in jobs.iter().enumerate() {
        session.merge(&[(i, 1.0)], strategy)?;
        let pictures = draw::draw(session, jobs, &settings, settings.batch(), &bar)?;
        shown.push(pictures.into_iter().zip(jobs.iter().map(|job| job.prompt.clone())).collect());
    }
    bar.finish_and_clear();
    Ok(shown)
}

/// What is drawn of a concept.
fn jobs(args: &Args, concept: &Manifest) -> Vec<Job> {
    let usual = match concept.kind {
        Kind::Subject | Kind::Person => &OF_THINGS,
        Kind::Scene => &OF_SCENES,
        Kind::Style => &OF_STYLES,
    };
    let given: Vec<&str> = args.prompts.iter().map(String::as_str).collect();
    let prompts = if given.is_empty() { &usual[..] } else { &given };
    let name = format!("<{}>", concept.name);
    draw::jobs(prompts.iter().map(|prompt| prompt.replace(PLACE, &name)), args.images, args.sampling.seed)
}

/// `adapter` with another A in each layer; its manifest says how it was made.
fn builder(adapter: &Adapter, new_a: &NewA, made: &Value, storage: Storage) -> AdapterBuilder {
    let mut manifest = adapter.manifest().clone();
    let mut made = made.clone();
    made["from"] = adapter.digest().into();
    // The reader lets none but objects through.
    if let Some(config) = manifest.algorithm.config.as_object_mut() {
        config.insert(KEY.to_owned(), made);
    }
    let mut builder = AdapterBuilder::new(&manifest, storage);
    for (name, &outputs) in &manifest.outputs {
        builder = match adapter.layers().iter().find(|layer| layer.name == *name) {
            Some(layer) => {
                // What nothing enters has nothing to answer to.
                let a = new_a.get(name).cloned().unwrap_or_else(|| layer.a());
                builder.layer(Layer { name, outputs, a: &a, b: &layer.b() })
            }
            // Its slot owns no row there.
            None => builder.layer(Layer { name, outputs, a: &[], b: &[] }),
        };
    }
    adapter.tokens().iter().fold(builder, AdapterBuilder::token)
}

/// Shows the i-th concept's pictures, with it merged, to see what the old adapters and the `new` ones answer.
fn report(
    session: &Session,
    i: usize,
    new: &[AdapterFactors],
    pictures: &[(Picture, String)],
    file: PathBuf,
) -> anyhow::Result<Report> {
    let both: Vec<&AdapterFactors> = session.factors().chain(new).collect();
    let answers = answers(&session.model, &both, &session.concepts, pictures)?;
    // Of the layers in which it changes something.
    let layers: Vec<(&[f64], &[f64])> =
        answers.iter().map(|answer| answer.deltas.split_at(new.len())).filter(|(old, _)| old[i] > 0.0).collect();
    let others = (new.len() - 1) as f64;
    let of_layers = |value: &dyn Fn(&[f64], &[f64]) -> f64| {
        median(layers.iter().map(|(old, new)| value(old, new)).collect()).unwrap_or_default()
    };
    Ok(Report {
        name: new[i].name().to_owned(),
        file,
        digest: new[i].digest().to_owned(),
        own: of_layers(&|old, new| (new[i] / old[i]).sqrt()),
        others_before: of_layers(&|old, _| all_others_by_own(old, i) / others.sqrt()),
        others_after: of_layers(&|_, new| all_others_by_own(new, i) / others.sqrt()),
    })
}

fn table(reports: &[Report]) -> Table {
    let mut table = Table::new(["concept", "own change kept", "others felt, before", "after", "file"]);
    for r in reports {
        let percent = |part: f64| format!("{:.0} %", 100.0 * part);
        let (own, before, after) = (percent(r.own), percent(r.others_before), percent(r.others_after));
        table.row([format!("<{}>", r.name), own, before, after, r.file.display().to_string()]);
    }
    table
}
