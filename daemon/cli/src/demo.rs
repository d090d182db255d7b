//! `blocklora demo`: the bundled concepts, alone and all at once.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context;
use blocklora_client::{Entry as Adapter, Generate, Merge, Merged};
use blocklora_engine::image::{ContactSheet, Picture};
use blocklora_engine::score::PAPER_PREFIX;
use blocklora_spec::{Kind, Manifest};
use indicatif::ProgressBar;
use serde::Serialize;

use crate::args::{self, ModelArgs, Precision, SamplingArgs, SetArgs, WeightedFile};
use crate::concepts::{Concepts, Entry};
use crate::daemon::{self, ChosenModel, Daemon, State, choose_model, watch};
use crate::judge::{Judge, Scores};
use crate::output::{self, OutputFile};
use crate::set::{self, Members};
use crate::table::Table;
use crate::{base, progress};

/// Merge the bundled concepts into the bundled model and draw them alone and together
///
/// Writes one contact sheet: a real picture of each concept, each concept alone, each again with all concepts merged,
/// and pairs of concepts in one picture. Prints how long the merge took, and how well the pictures match the concepts
/// alone and merged.
#[derive(clap::Args)]
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
    set: SetArgs,
    /// Folder of the base model in the diffusers layout [default: $BLOCKLORA_MODEL, or the bundled starter model]
    #[arg(long, value_name = "DIR", help_heading = "Model")]
    base: Option<PathBuf>,
    /// Storage type of the weights [default: the daemon's]
    #[arg(long, value_enum, help_heading = "Model")]
    precision: Option<Precision>,
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

/// A picture to draw.
struct Job {
    prompt: String,
    seed: u64,
}

/// What the daemon did.
struct Drawn {
    /// Pictures of each concept, drawn from it alone.
    alone: Vec<Vec<Picture>>,
    /// The same with all concepts merged.
    merged: Vec<Vec<Picture>>,
    /// Two concepts each, with all concepts merged.
    pairs: Vec<Picture>,
    merge: Merged,
    remove: Merged,
}

/// Runs the command.
pub fn run(args: &Args, options: &daemon::Options) -> anyhow::Result<()> {
    let started = Instant::now();
    let sheet_file = OutputFile::create(&args.output)?;
    let base = base::folder(args.base.as_deref())?;
    let starter = base::starter()?;
    let concepts = Concepts::open(&starter.join("concepts"))?;
    let files = args::adapters_in(args.adapters.as_deref().unwrap_or(&starter.join("adapters")))?;
    let with: Vec<WeightedFile> =
        in_order(files, &concepts).into_iter().map(|path| WeightedFile { path, weight: 1.0 }).collect();
    let manifests = with
        .iter()
        .map(|file| Ok(blocklora_spec::Adapter::open(&file.path)?.manifest().clone()))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let entries = manifests.iter().map(|m| concepts.get(&m.name)).collect::<anyhow::Result<Vec<_>>>()?;
    let judge = Judge::open(&starter.join("clip"), &concepts, PAPER_PREFIX)?;

    let jobs: Vec<Vec<Job>> = entries.iter().map(|e| jobs_of(args, e)).collect();
    let pair_jobs = pair_jobs(args, &manifests);
    // The adapters are those of one model, whatever a daemon that runs has as its default.
    let model_args = ModelArgs { base: Some(base), precision: args.precision };
    let drawn = daemon::run(draw_all(args, options, &model_args, &with, &jobs, &pair_jobs))?;

    let score = |(i, pictures): (usize, &Vec<Picture>)| {
        let prompts: Vec<&str> = jobs[i].iter().map(|j| j.prompt.as_str()).collect();
        judge.score(entries[i], &prompts, pictures)
    };
    let alone_scores = drawn.alone.iter().enumerate().map(score).collect::<anyhow::Result<Vec<_>>>()?;
    let merged_scores = drawn.merged.iter().enumerate().map(score).collect::<anyhow::Result<Vec<_>>>()?;

    let sheet = sheet(&concepts, &entries, &drawn, &pair_jobs)?;
    sheet_file.write(&sheet.to_png(None)?)?;

    let none = "there are no bundled adapters";
    let json = Json {
        sheet: &args.output,
        concepts: entries
            .iter()
            .zip(alone_scores.iter().zip(&merged_scores))
            .map(|(e, (alone, merged))| Line { name: &e.name, alone: *alone, merged: *merged })
            .collect(),
        merge_ms: drawn.merge.usec as f64 / 1e3,
        remove_ms: drawn.remove.usec as f64 / 1e3,
        bytes_written: drawn.merge.bytes_written,
        alone: Scores::mean(&alone_scores).context(none)?,
        merged: Scores::mean(&merged_scores).context(none)?,
        seconds: started.elapsed().as_secs_f64(),
    };
    if args.json { output::print_json(&json) } else { Ok(output::print(&describe(&json))?) }
}

async fn draw_all(
    args: &Args,
    options: &daemon::Options,
    model_args: &ModelArgs,
    with: &[WeightedFile],
    jobs: &[Vec<Job>],
    pair_jobs: &[Job],
) -> anyhow::Result<Drawn> {
    let daemon = daemon::connect(options, State::Temporary).await?;
    let model = choose_model(&daemon, model_args).await?;
    let members = Members::new(&daemon, &model, with).await?;
    members.check_model(&model)?;
    let adapters = members.entries();
    let merge = async |adapters: &[Adapter]| {
        let (strategy, strategy_config) = set::strategy(&args.set)?;
        let strategy = strategy.unwrap_or_default();
        let (model, precision) = (Some(model.state.id.clone()), model_args.precision_name());
        let adapters = adapters.to_vec();
        let request = Merge { strategy, strategy_config, adapters, model, precision, ..Merge::default() };
        let job = daemon.client.merge(&request).await?;
        watch::quietly(&job, "merging").await
    };
    let pictures = 2 * jobs.iter().map(Vec::len).sum::<usize>() + pair_jobs.len();
    let bar = progress::bar("drawing", pictures * usize::from(args.sampling.steps));
    let mut artist = Artist { daemon: &daemon, template: template(args, &model, model_args)?, bar };

    let mut alone = Vec::new();
    for (adapter, jobs) in adapters.iter().zip(jobs) {
        alone.push(artist.draw(std::slice::from_ref(adapter), jobs).await?);
    }
    let remove = merge(&[]).await?;
    let merge = merge(&adapters).await?;
    let mut merged = Vec::new();
    for jobs in jobs {
        merged.push(artist.draw(&adapters, jobs).await?);
    }
    let pairs = artist.draw(&adapters, pair_jobs).await?;
    artist.bar.finish_and_clear();
    daemon.close().await;
    Ok(Drawn { alone, merged, pairs, merge, remove })
}

/// What all pictures have in common.
fn template(args: &Args, model: &ChosenModel, model_args: &ModelArgs) -> anyhow::Result<Generate> {
    let (strategy, strategy_config) = set::strategy(&args.set)?;
    let sampling = &args.sampling;
    Ok(Generate {
        target: Some(model.model.path().clone().into()),
        precision: model_args.precision_name(),
        steps: Some(u32::from(sampling.steps)),
        guidance_scale: sampling.guidance.map(f64::from),
        sampler: Some(sampling.sampler.clone()),
        width: sampling.size.map(|size| size.width),
        height: sampling.size.map(|size| size.height),
        strategy,
        strategy_config,
        formats: vec!["png".into()],
        ..Generate::default()
    })
}

/// Draws by a daemon, one picture after another, with one bar for all.
struct Artist<'a> {
    daemon: &'a Daemon,
    template: Generate,
    bar: ProgressBar,
}

impl Artist<'_> {
    /// The pictures of `jobs` with `adapters` merged.
    async fn draw(&mut self, adapters: &[Adapter], jobs: &[Job]) -> anyhow::Result<Vec<Picture>> {
        let mut pictures = Vec::new();
        for Job { prompt, seed } in jobs {
            let (prompt, seed) = (prompt.clone(), Some(*seed));
            let request = Generate { prompt, seed, adapters: adapters.to_vec(), ..self.template.clone() };
            let job = self.daemon.client.generate(&request).await?;
            watch::count_on(&job, &self.bar, u64::from(request.steps.unwrap_or(0))).await?;
            let file = job.take_results(false).await?.into_iter().next().context("the daemon gave no picture")?;
            pictures.push(Picture::decode("the daemon's picture", &file.bytes)?);
        }
        Ok(pictures)
    }
}

fn jobs_of(args: &Args, entry: &Entry) -> Vec<Job> {
    let prompts = entry.prompts.iter().cycle().take(usize::from(args.images));
    let job = |(p, i): (&String, u64)| Job { prompt: entry.prompt(p), seed: args.sampling.seed.wrapping_add(i) };
    prompts.zip(0..).map(job).collect()
}

/// `files` in the order of the bundled concepts, which puts like beside like.
fn in_order(mut files: Vec<PathBuf>, concepts: &Concepts) -> Vec<PathBuf> {
    let position =
        |file: &PathBuf| concepts.entries.iter().position(|e| file.file_stem().is_some_and(|s| *s == *e.name));
    files.sort_by_key(|file| position(file).unwrap_or(usize::MAX));
    files
}

/// People and things two by two, then each place and style with one of them.
fn pair_jobs(args: &Args, manifests: &[Manifest]) -> Vec<Job> {
    let is_thing = |m: &&Manifest| matches!(m.kind, Kind::Person | Kind::Subject);
    let (things, others): (Vec<_>, Vec<_>) = manifests.iter().partition(is_thing);
    let next = |i: usize| &things[(i + 1) % things.len()].name;
    let two = things.iter().enumerate().map(|(i, m)| format!("a <{}> and a <{}> on the beach", m.name, next(i)));
    let with_other = things.iter().step_by(2).zip(&others).map(|(thing, other)| match other.kind {
        Kind::Style => format!("a <{}> on the beach, <{}>", thing.name, other.name),
        _ => format!("a <{}> in the <{}>", thing.name, other.name),
    });
    let two = two.take(if things.len() > 1 { things.len() } else { 0 });
    two.chain(with_other).map(|prompt| Job { prompt, seed: args.sampling.seed }).collect()
}

fn sheet(concepts: &Concepts, entries: &[&Entry], drawn: &Drawn, pair_jobs: &[Job]) -> anyhow::Result<Picture> {
    let Drawn { alone, merged, pairs, .. } = drawn;
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
        for (picture, job) in pairs.iter().zip(pair_jobs) {
            sheet.cell(picture.clone(), job.prompt.replace(['<', '>'], ""));
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
