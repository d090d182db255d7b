//! `blocklora separate`: adapters that answer to their own concepts, so that many strong ones can be merged.

use std::collections::BTreeSet;
use std::path::PathBuf;

use anyhow::{Context, bail};
use blocklora_engine::image::Picture;
use blocklora_engine::merge::{AdapterFactors, AdapterLayer};
use blocklora_engine::score::answers;
use blocklora_engine::separate::{NewA, Separation};
use blocklora_spec::{Adapter, AdapterBuilder, Kind, Layer, Manifest, Storage};
use indicatif::ProgressBar;
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::args::{self, Clash, MergeArgs, OwnModelArgs, SamplingArgs, StorageArg, Strategy};
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
    let shown = draw_each(args, &mut session)?;

    // Each concept twice: to separate, and to see what came of it.
    let bar = progress::bar("looking", 2 * shown.len());
    let mut separation = Separation::new(&session.model);
    for (i, pictures) in shown.iter().enumerate() {
        interrupt::check()?;
        merge_alone(&mut session, i)?;
        let factors: Vec<&AdapterFactors> = session.factors().collect();
        separation.add(&session.model, &factors, &session.concepts, pictures)?;
        bar.inc(1);
    }
    let new_a = separation.separate(args.ridge)?;
    let digests: Vec<&str> = session.adapters.iter().map(Adapter::digest).collect();
    let made = json!({"among": digests, "ridge": args.ridge});
    let mut written = Vec::new();
    for ((adapter, new_a), file) in session.adapters.iter().zip(&new_a).zip(&files) {
        let name = file.file_name().context("a file has a name")?;
        let path = folder.path().join(name);
        let digest = builder(adapter, new_a, &made, args.storage.into()).write(&path)?;
        written.push((args.output.join(name), digest));
    }
    let reports = measure(&mut session, &new_a, &shown, written, &bar)?;
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

fn merge_alone(session: &mut Session, i: usize) -> anyhow::Result<()> {
    let strategy = methods::strategy(&MergeArgs { strategy: Strategy::Blocklora, on_clash: Clash::Mean })?;
    session.merge(&[(i, 1.0)], &strategy).map(drop)
}

/// Draws every concept by itself; its pictures and their prompts.
fn draw_each(args: &Args, session: &mut Session) -> anyhow::Result<Vec<Vec<(Picture, String)>>> {
    let settings = draw::Settings::new(&args.sampling, &session.model)?;
    let jobs: Vec<Vec<Job>> = session.adapters.iter().map(|adapter| jobs(args, adapter.manifest())).collect();
    let bar = progress::bar("drawing", jobs.iter().map(Vec::len).sum::<usize>() * settings.steps);
    let mut shown = Vec::new();
    for (i, jobs) in jobs.iter().enumerate() {
        merge_alone(session, i)?;
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
    let job = |prompt: &str, image: u16| Job {
        prompt: prompt.replace(PLACE, &format!("<{}>", concept.name)),
        negative: String::new(),
        seed: args.sampling.seed.wrapping_add(u64::from(image)),
    };
    prompts.iter().flat_map(|prompt| (0..args.images).map(|image| job(prompt, image))).collect()
}

/// `adapter` with another A in each layer; its manifest says how it was made.
fn builder(adapter: &Adapter, new_a: &NewA, made: &Value, storage: Storage) -> AdapterBuilder {
    let mut manifest = adapter.manifest().clone();
    let mut made = made.clone();
    made["from"] = adapter.digest().into();
    match &mut manifest.algorithm.config {
        Value::Object(config) => drop(config.insert(KEY.to_owned(), made)),
        // The reader lets none but objects through.
        other => *other = Value::Object(Map::from_iter([(KEY.to_owned(), made)])),
    }
    let mut builder = AdapterBuilder::new(&manifest, storage);
    for (name, &outputs) in &manifest.outputs {
        builder = match adapter.layers().iter().find(|layer| layer.name == *name) {
            Some(layer) => {
                let a = new_a.get(name).cloned().unwrap_or_else(|| layer.a());
                builder.layer(Layer { name, outputs, a: &a, b: &layer.b() })
            }
            // Its slot owns no row there.
            None => builder.layer(Layer { name, outputs, a: &[], b: &[] }),
        };
    }
    adapter.tokens().iter().fold(builder, AdapterBuilder::token)
}

/// Shows every concept's pictures again, to see what the old and the new adapters answer.
fn measure(
    session: &mut Session,
    new_a: &[NewA],
    shown: &[Vec<(Picture, String)>],
    written: Vec<(PathBuf, String)>,
    bar: &ProgressBar,
) -> anyhow::Result<Vec<Report>> {
    let of_new = |(old, new_a): (&AdapterFactors, &NewA)| {
        let layer = |layer: &AdapterLayer| {
            let a = new_a.get(&layer.name).unwrap_or(&layer.a).clone();
            AdapterLayer { a, ..layer.clone() }
        };
        AdapterFactors::new(old.name(), old.scale(), old.layers().map(layer).collect())
    };
    let new = session.factors().zip(new_a).map(of_new).collect::<Result<Vec<_>, _>>()?;
    let count = new.len();
    let mut reports = Vec::new();
    for ((i, pictures), (file, digest)) in shown.iter().enumerate().zip(written) {
        interrupt::check()?;
        merge_alone(session, i)?;
        let both: Vec<&AdapterFactors> = session.factors().chain(&new).collect();
        let answers = answers(&session.model, &both, &session.concepts, pictures)?;
        // Of the layers in which it changes something.
        let layers: Vec<(&[f64], &[f64])> =
            answers.iter().map(|answer| answer.deltas.split_at(count)).filter(|(old, _)| old[i] > 0.0).collect();
        let others = |of: &[f64]| ((of.iter().sum::<f64>() - of[i]) / (count - 1) as f64 / of[i]).sqrt();
        reports.push(Report {
            name: session.adapters[i].manifest().name.clone(),
            file,
            digest,
            own: median(layers.iter().map(|(old, new)| (new[i] / old[i]).sqrt())),
            others_before: median(layers.iter().map(|(old, _)| others(old))),
            others_after: median(layers.iter().map(|(_, new)| others(new))),
        });
        bar.inc(1);
    }
    Ok(reports)
}

/// 0 of nothing.
fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
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
