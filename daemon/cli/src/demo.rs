//! `blocklora demo`: the bundled concepts, alone and all at once.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context;
use blocklora_engine::image::{ContactSheet, Picture};
use blocklora_engine::score::PAPER_PREFIX;
use blocklora_spec::Kind;
use serde::Serialize;

use crate::args::{self, MergeArgs, ModelArgs, SamplingArgs};
use crate::concepts::{Concepts, Entry};
use crate::draw::{self, Job};
use crate::judge::{Judge, Scores};
use crate::output::{self, OutputFile};
use crate::session::{self, Session};
use crate::table::Table;
use crate::{base, methods, progress, score};

/// Merge the bundled concepts into the bundled model and draw them alone and together
///
/// Writes one contact sheet: a real picture of each concept, each concept alone, each again with all concepts merged,
/// and pairs of concepts in one picture. Prints how long the merge took, and how well the pictures match the concepts
/// alone and merged.
#[derive(clap::Args)]
// The bundled model is small: more guidance than this burns its colours.
#[command(mut_arg("guidance", |arg| arg.default_value("4")))]
pub struct Args {
    /// The contact sheet to write
    #[arg(short, long, value_name = "FILE.png", default_value = "blocklora-demo.png")]
    output: PathBuf,
    /// Pictures of each concept that are scored; the first is on the sheet
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=100))]
    images: u16,
    /// Folder with the adapters to show, of concepts in the bundled concepts.json [default: the bundled adapters]
    #[arg(long, value_name = "DIR")]
    adapters: Option<PathBuf>,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    merge: MergeArgs,
    #[command(flatten)]
    model: ModelArgs,
}

#[derive(Serialize)]
struct Json<'a> {
    sheet: &'a PathBuf,
    concepts: Vec<Line<'a>>,
    merge_ms: f64,
    remove_ms: f64,
    bytes_written: u64,
    alone: Scores,
    merged: Scores,
    seconds: f64,
}

#[derive(Serialize)]
struct Line<'a> {
    name: &'a str,
    alone: Scores,
    merged: Scores,
}

/// Pictures a row of the sheet has.
const COLUMNS: usize = 15;
/// Pixels that a picture's side has on the sheet, at least.
const SIDE: usize = 96;

/// Runs the command.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let started = Instant::now();
    let sheet_file = OutputFile::create(&args.output)?;
    base::folder(args.model.base.as_deref())?;
    let starter = base::starter()?;
    let files = args::adapters_in(args.adapters.as_deref().unwrap_or(&starter.join("adapters")))?;
    let concepts = Concepts::open(&starter.join("concepts"))?;
    let mut session = Session::new(session::open_model(&args.model)?, &in_order(files, &concepts))?;
    let judge = Judge::open(&starter.join("clip"), &concepts, PAPER_PREFIX)?;
    let entries = score::entries_of(&session, &concepts)?;
    let settings = draw::Settings::new(&args.sampling, &session.model)?;
    let strategy = methods::strategy(&args.merge)?;

    let jobs: Vec<Vec<Job>> = entries.iter().map(|e| jobs_of(args, e)).collect();
    let pair_jobs = pair_jobs(args, &session);
    let total = 2 * jobs.iter().map(Vec::len).sum::<usize>() + pair_jobs.len();
    let bar = progress::bar("drawing", total * settings.steps);
    let all: Vec<(usize, f32)> = (0..entries.len()).map(|i| (i, 1.0)).collect();

    let mut alone = Vec::new();
    for (i, jobs) in jobs.iter().enumerate() {
        session.merge(&[(i, 1.0)], &strategy)?;
        alone.push(draw::draw(&session, jobs, &settings, settings.batch(), &bar)?);
    }
    let removed = session.merge(&[], &strategy)?;
    let report = session.merge(&all, &strategy)?;
    let mut merged = Vec::new();
    for jobs in &jobs {
        merged.push(draw::draw(&session, jobs, &settings, settings.batch(), &bar)?);
    }
    let pairs = draw::draw(&session, &pair_jobs, &settings, settings.batch(), &bar)?;
    bar.finish_and_clear();

    let score = |(i, pictures): (usize, &Vec<Picture>)| {
        let prompts: Vec<&str> = jobs[i].iter().map(|j| j.prompt.as_str()).collect();
        judge.score(entries[i], &prompts, pictures)
    };
    let alone_scores = alone.iter().enumerate().map(score).collect::<anyhow::Result<Vec<_>>>()?;
    let merged_scores = merged.iter().enumerate().map(score).collect::<anyhow::Result<Vec<_>>>()?;

    let sheet = sheet(&concepts, &entries, &alone, &merged, &pair_jobs, pairs)?;
    sheet_file.write(&sheet.to_png(None)?)?;

    let none = "there are no bundled adapters";
    let json = Json {
        sheet: &args.output,
        concepts: entries
            .iter()
            .zip(alone_scores.iter().zip(&merged_scores))
            .map(|(e, (alone, merged))| Line { name: &e.name, alone: *alone, merged: *merged })
            .collect(),
        merge_ms: 1e3 * report.seconds,
        remove_ms: 1e3 * removed.seconds,
        bytes_written: report.bytes_written,
        alone: Scores::mean(&alone_scores).context(none)?,
        merged: Scores::mean(&merged_scores).context(none)?,
        seconds: started.elapsed().as_secs_f64(),
    };
    if args.json { output::print_json(&json) } else { Ok(output::print(&describe(&json))?) }
}

fn jobs_of(args: &Args, entry: &Entry) -> Vec<Job> {
    let prompts = entry.prompts.iter().cycle().take(usize::from(args.images));
    prompts
        .zip(0..)
        .map(|(p, i)| Job {
            prompt: entry.prompt(p),
            negative: String::new(),
            seed: args.sampling.seed.wrapping_add(i),
        })
        .collect()
}

/// `files` in the order of the bundled concepts, which puts like beside like.
fn in_order(mut files: Vec<PathBuf>, concepts: &Concepts) -> Vec<PathBuf> {
    let position =
        |file: &PathBuf| concepts.entries.iter().position(|e| file.file_stem().is_some_and(|s| *s == *e.name));
    files.sort_by_key(|file| position(file).unwrap_or(usize::MAX));
    files
}

/// People and things two by two, then each place and style with one of them.
fn pair_jobs(args: &Args, session: &Session) -> Vec<Job> {
    let manifests = || session.adapters.iter().map(|a| a.manifest());
    let (things, others): (Vec<_>, Vec<_>) = manifests().partition(|m| matches!(m.kind, Kind::Person | Kind::Subject));
    let next = |i: usize| &things[(i + 1) % things.len()].name;
    let two = things.iter().enumerate().map(|(i, m)| format!("a <{}> and a <{}> on the beach", m.name, next(i)));
    let with_other = things.iter().step_by(2).zip(&others).map(|(thing, other)| match other.kind {
        Kind::Style => format!("a <{}> on the beach, <{}>", thing.name, other.name),
        _ => format!("a <{}> in the <{}>", thing.name, other.name),
    });
    let two = two.take(if things.len() > 1 { things.len() } else { 0 });
    let job = |prompt| Job { prompt, negative: String::new(), seed: args.sampling.seed };
    two.chain(with_other).map(job).collect()
}

fn sheet(
    concepts: &Concepts,
    entries: &[&Entry],
    alone: &[Vec<Picture>],
    merged: &[Vec<Picture>],
    pair_jobs: &[Job],
    pairs: Vec<Picture>,
) -> anyhow::Result<Picture> {
    let side = alone.iter().flatten().map(Picture::width).next().unwrap_or(SIDE);
    let mut sheet = ContactSheet::new(entries.len().min(COLUMNS), SIDE.div_ceil(side));
    sheet.heading("Real pictures of the concepts");
    for entry in entries {
        let (path, _) = concepts.pictures(entry).into_iter().next().context("a concept has no picture")?;
        let picture = Picture::load(&path)?.resized(side, side, blocklora_engine::image::Filter::Bicubic)?;
        sheet.cell(picture, &entry.name);
    }
    for (title, pictures) in [("Each concept alone", alone), ("Each concept with all of them merged", merged)] {
        sheet.heading(title);
        for (picture, entry) in pictures.iter().zip(entries) {
            let picture = picture.first().context("a concept has no picture")?;
            sheet.cell(picture.clone(), entry.prompts.first().map_or("", String::as_str).replace("{c}", "<>"));
        }
    }
    if !pairs.is_empty() {
        sheet.heading("Two concepts in one picture, all of them merged");
        for (picture, job) in pairs.into_iter().zip(pair_jobs) {
            sheet.cell(picture, job.prompt.replace(['<', '>'], ""));
        }
    }
    Ok(sheet.compose()?)
}

fn describe(json: &Json) -> String {
    let mut table = Table::new(["concept", "image alone", "image merged", "identity alone", "identity merged"]);
    let row = |name: &str, alone: &Scores, merged: &Scores| {
        [
            name.to_owned(),
            format!("{:.3}", alone.image_alignment),
            format!("{:.3}", merged.image_alignment),
            format!("{:.0} %", 100.0 * alone.identity),
            format!("{:.0} %", 100.0 * merged.identity),
        ]
    };
    json.concepts.iter().for_each(|l| table.row(row(l.name, &l.alone, &l.merged)));
    table.row(row("mean", &json.alone, &json.merged));
    format!(
        "{table}\n{} concepts merged in {:.1} ms ({:.1} MiB of weights written), taken out again in {:.1} ms\n\
         The picture is {} ({:.0} s in all)\n",
        json.concepts.len(),
        json.merge_ms,
        json.bytes_written as f64 / f64::from(1 << 20),
        json.remove_ms,
        json.sheet.display(),
        json.seconds
    )
}
