//! `blocklora score`: how much of each concept survives a merge, by the paper's measures.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use anyhow::Context;
use blocklora_engine::image::Picture;
use blocklora_engine::merge::strategy::{AdapterView, LayerInfo, LayerPlan, MergeStrategy, Plan, Tile};
use blocklora_engine::score::PAPER_PREFIX;
use clap::ValueEnum;
use indicatif::ProgressBar;
use serde::Serialize;

use crate::args::{self, Clash, MergeArgs, OwnModelArgs, SamplingArgs, Strategy};
use crate::concepts::{Concepts, Entry};
use crate::draw::{self, Job};
use crate::judge::{Judge, Scores};
use crate::session::{self, Session};
use crate::table::Table;
use crate::{base, crosstalk, drift, failure, methods, output, progress};

/// Score concepts alone and merged: image alignment, text alignment, identity
///
/// Draws every concept's prompts with 1, 2, 5, ... concepts merged and compares the pictures with the concept's own
/// pictures (image alignment: the mean of max(cosine, 0) over all pairs of CLIP image features), with the prompt in
/// which the class word stands for the concept (text alignment: the mean of 2.5 max(cosine, 0)), and with all concepts
/// (identity: the share of pictures nearest to the right concept).
#[derive(clap::Args)]
pub struct Args {
    /// Adapters to score, a file each in DIR, and the strategies to merge them with; may be given many times [default:
    /// the bundled adapters, with blocklora and blocklora-sum1]
    #[arg(long, value_name = "DIR[=STRATEGY,...]")]
    set: Vec<Set>,
    /// How many concepts are merged
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_values_t = [1, 2, 5, 10, 15])]
    sizes: Vec<usize>,
    /// Prompts for each concept [default: all in concepts.json]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    prompts: Option<u16>,
    /// Pictures for each prompt; their seeds are SEED, SEED + 1, ... for every prompt
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    images: u16,
    /// Folder with concepts.json and the concepts' pictures [default: the bundled one]
    #[arg(long, value_name = "DIR")]
    concepts: Option<PathBuf>,
    /// Folder of the CLIP model that scores [default: the bundled one]
    #[arg(long, value_name = "DIR")]
    clip: Option<PathBuf>,
    /// What to put before a prompt when a picture is scored against it
    #[arg(long, value_name = "TEXT", default_value = PAPER_PREFIX)]
    text_prefix: String,
    /// Print JSON, with the scores of every concept
    #[arg(long)]
    json: bool,
    /// Print instead how strongly other concepts' rows answer to a concept's input: ||dW_j X_i|| / ||dW_i X_i||. Nothing
    /// is drawn or scored for that
    #[arg(long, conflicts_with_all = ["sizes", "prompts", "images", "clip", "text_prefix", "layers", "seed", "steps",
          "guidance", "sampler", "size"])]
    cross_talk: bool,
    /// Print instead how far each concept's class word alone has moved toward it: its prompts with the class word in the
    /// concept's place, drawn by the base model and with only that concept's adapter merged (the paper's figure 3)
    #[arg(long, conflicts_with_all = ["cross_talk", "sizes", "layers"])]
    drift: bool,
    /// Weight of every merged adapter; 1 is as trained, 0 leaves only its words
    #[arg(long, value_name = "W", default_value_t = 1.0, allow_negative_numbers = true)]
    weight: f32,
    /// Merge only into layers whose name starts with PREFIX (unet. or text_encoder.): what each part does to a picture
    #[arg(long, value_name = "PREFIX", default_value = "")]
    layers: String,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    model: OwnModelArgs,
}

/// A strategy on the layers whose name starts with `prefix`; the others stay as they are in the file.
struct OnlyLayers {
    prefix: String,
    fingerprint: String,
    strategy: Arc<dyn MergeStrategy>,
}

impl OnlyLayers {
    fn new(prefix: &str, strategy: Arc<dyn MergeStrategy>) -> Self {
        let fingerprint = format!("{prefix} {}", strategy.fingerprint());
        Self { prefix: prefix.to_owned(), fingerprint, strategy }
    }
}

impl MergeStrategy for OnlyLayers {
    fn id(&self) -> &str {
        self.strategy.id()
    }

    fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    fn plan(&self, layers: &[LayerInfo], adapters: &[&dyn AdapterView]) -> blocklora_engine::Result<Plan> {
        let mut plan = self.strategy.plan(layers, adapters)?;
        let others = plan.iter_mut().zip(layers).filter(|(_, layer)| !layer.name.starts_with(&self.prefix));
        others.for_each(|(plan, _)| *plan = LayerPlan::default());
        Ok(plan)
    }

    fn fill(&self, tile: Tile<'_>, delta: &mut [f32]) -> blocklora_engine::Result<()> {
        self.strategy.fill(tile, delta)
    }
}

/// A folder of adapters and how to merge them.
#[derive(Clone, Debug, PartialEq)]
struct Set {
    folder: PathBuf,
    strategies: Vec<Strategy>,
}

impl FromStr for Set {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (folder, strategies) = text.rsplit_once('=').unwrap_or((text, "blocklora"));
        let strategies = strategies.split(',').map(|s| Strategy::from_str(s, false)).collect::<Result<_, _>>()?;
        Ok(Self { folder: folder.into(), strategies })
    }
}

/// The scores of one set, strategy and size.
#[derive(Debug, Serialize)]
struct Row {
    set: PathBuf,
    strategy: String,
    merged: usize,
    /// Mean over concepts.
    mean: Scores,
    /// Standard error of the mean, over all pictures.
    standard_error: Option<Scores>,
    concepts: BTreeMap<String, Scores>,
    /// Every picture's scores: the same prompts and seeds in every row, so that rows can be compared picture by picture.
    pictures: BTreeMap<String, Vec<Scores>>,
}

/// What was asked, beside the results.
#[derive(Debug, Serialize)]
struct Json<'a> {
    base: &'a Path,
    clip: &'a Path,
    prompts_per_concept: usize,
    images_per_prompt: u16,
    steps: u16,
    guidance: f32,
    sampler: &'a str,
    seed: u64,
    weight: f32,
    layers: &'a str,
    text_prefix: &'a str,
    rows: &'a [Row],
}

/// Runs the command.
pub fn run(args: &Args) -> anyhow::Result<()> {
    if args.sizes.contains(&0) {
        return failure::usage("--sizes: at least one concept must be merged");
    }
    let one_strategy =
        |set: &Set| if args.drift { set.strategies.len() == 1 } else { set.strategies == [Strategy::Blocklora] };
    if (args.drift || args.cross_talk) && !args.set.iter().all(one_strategy) {
        return failure::usage(match args.drift {
            true => "--set: with --drift give one strategy for each folder",
            false => "--set: with --cross-talk give folders alone, which are merged by blocklora",
        });
    }
    let concepts = Concepts::open(&folder_or(args.concepts.as_deref(), "concepts")?)?;
    let clip = folder_or(args.clip.as_deref(), "clip")?;
    let sets = if args.set.is_empty() { vec![bundled_set()?] } else { args.set.clone() };
    for set in &sets {
        args::adapters_in(&set.folder)?;
    }
    if args.cross_talk {
        return cross_talk(args, &sets, &concepts);
    }
    let judge = Judge::open(&clip, &concepts, &args.text_prefix)?;
    if args.drift {
        return drift(args, &sets, &concepts, &judge);
    }
    let mut rows = Vec::new();
    let mut prompts = 0;
    for set in &sets {
        let files = args::adapters_in(&set.folder)?;
        let mut session = Session::new(session::open_model(&args.model)?, &files)?;
        let entries = entries_of(&session, &concepts)?;
        let longest = entries.iter().map(|e| e.prompts.len()).max().unwrap_or(0);
        prompts = args.prompts.map_or(longest, usize::from);
        for (strategy, size) in plan(set, &args.sizes, entries.len()) {
            rows.push(score_one(args, set, strategy, size, &mut session, &entries, &judge)?);
        }
    }
    if args.json {
        let folder = base::folder(args.model.base.as_deref())?;
        return output::print_json(&Json {
            base: &folder,
            clip: &clip,
            prompts_per_concept: prompts,
            images_per_prompt: args.images,
            steps: args.sampling.steps,
            guidance: draw::guidance(&args.sampling, &folder)?,
            sampler: &args.sampling.sampler,
            seed: args.sampling.seed,
            weight: args.weight,
            layers: &args.layers,
            text_prefix: &args.text_prefix,
            rows: &rows,
        });
    }
    output::print(&table(&rows).to_string())?;
    Ok(())
}

/// Prints the cross-talk of every set.
fn cross_talk(args: &Args, sets: &[Set], concepts: &Concepts) -> anyhow::Result<()> {
    let mut rows = Vec::new();
    for set in sets {
        let mut session = Session::new(session::open_model(&args.model)?, &args::adapters_in(&set.folder)?)?;
        let entries = entries_of(&session, concepts)?;
        let strategy = methods::strategy(&MergeArgs { strategy: Strategy::Blocklora, on_clash: Clash::Mean })?;
        let merge = |session: &mut Session, i: usize| session.merge(&[(i, args.weight)], &strategy).map(drop);
        rows.push((set.folder.display().to_string(), crosstalk::measure(&mut session, concepts, &entries, merge)?));
    }
    if args.json {
        return output::print_json(&rows);
    }
    Ok(output::print(&crosstalk::table(&rows).to_string())?)
}

/// Prints how far class words have moved in every set.
fn drift(args: &Args, sets: &[Set], concepts: &Concepts, judge: &Judge) -> anyhow::Result<()> {
    let mut rows = Vec::new();
    for set in sets {
        let mut session = Session::new(session::open_model(&args.model)?, &args::adapters_in(&set.folder)?)?;
        let entries = entries_of(&session, concepts)?;
        let settings = draw::Settings::new(&args.sampling, &session.model)?;
        let strategy = methods::strategy(&MergeArgs { strategy: set.strategies[0], on_clash: Clash::Mean })?;
        let jobs: Vec<Vec<Job>> = entries.iter().map(|e| jobs_of(args, e, &e.class)).collect();
        let bar = progress::bar("drawing", 2 * jobs.iter().map(Vec::len).sum::<usize>() * settings.steps);
        bar.set_message(set.folder.display().to_string());
        let measured =
            drift::measure(&mut session, &entries, &jobs, (&settings, args.weight), (&strategy, judge), &bar)?;
        bar.finish_and_clear();
        rows.push((set.folder.display().to_string(), measured));
    }
    if args.json {
        return output::print_json(&rows);
    }
    Ok(output::print(&drift::table(&rows).to_string())?)
}

fn bundled_set() -> anyhow::Result<Set> {
    let folder = base::starter()?.join("adapters");
    Ok(Set { folder, strategies: vec![Strategy::Blocklora, Strategy::BlockloraSum1] })
}

fn folder_or(chosen: Option<&Path>, bundled: &str) -> anyhow::Result<PathBuf> {
    chosen.map_or_else(|| Ok(base::starter()?.join(bundled)), |c| Ok(c.to_path_buf()))
}

/// The concept of each adapter, in the order of the adapters.
pub fn entries_of<'a>(session: &Session, concepts: &'a Concepts) -> anyhow::Result<Vec<&'a Entry>> {
    session.adapters.iter().map(|a| concepts.get(&a.manifest().name)).collect()
}

/// What to score: every strategy with every possible size; alone, all strategies are the same.
fn plan(set: &Set, sizes: &[usize], count: usize) -> Vec<(Strategy, usize)> {
    let mut sizes: Vec<usize> = sizes.iter().copied().filter(|&s| s <= count).collect();
    sizes.sort_unstable();
    sizes.dedup();
    let of_strategy = |(i, &strategy): (usize, &Strategy)| {
        let wanted = sizes.iter().filter(move |&&size| size > 1 || i == 0);
        wanted.map(move |&size| (strategy, size)).collect::<Vec<_>>()
    };
    set.strategies.iter().enumerate().flat_map(of_strategy).collect()
}

/// Scores every concept merged with the `size - 1` that follow it, round the list.
fn score_one(
    args: &Args,
    set: &Set,
    strategy: Strategy,
    size: usize,
    session: &mut Session,
    entries: &[&Entry],
    judge: &Judge,
) -> anyhow::Result<Row> {
    let settings = draw::Settings::new(&args.sampling, &session.model)?;
    let merge = methods::strategy(&MergeArgs { strategy, on_clash: Clash::Mean })?;
    let merge: Arc<dyn MergeStrategy> = Arc::new(OnlyLayers::new(&args.layers, merge));
    let jobs: Vec<Vec<Job>> = entries.iter().map(|e| jobs_of(args, e, &format!("<{}>", e.name))).collect();
    let pictures: usize = jobs.iter().map(Vec::len).sum();
    let bar = progress::bar("drawing", pictures * settings.steps);
    bar.set_message(format!("{} {}, {size} merged", set.folder.display(), name_of(strategy)));
    let drawn = if size == entries.len() {
        draw_together(session, &jobs, &settings, args.weight, &merge, &bar)?
    } else {
        draw_apart(session, &jobs, &settings, size, args.weight, &merge, &bar)?
    };
    bar.finish_and_clear();
    let mut pictures = BTreeMap::new();
    for ((entry, jobs), drawn) in entries.iter().zip(&jobs).zip(&drawn) {
        let prompts: Vec<&str> = jobs.iter().map(|j| j.prompt.as_str()).collect();
        pictures.insert(entry.name.clone(), judge.score_each(entry, &prompts, drawn)?);
    }
    let none = "there are no adapters to score";
    let mean = |(name, each): (&String, &Vec<Scores>)| Ok((name.clone(), Scores::mean(each).context(none)?));
    let scores: BTreeMap<String, Scores> = pictures.iter().map(mean).collect::<anyhow::Result<_>>()?;
    Ok(Row {
        set: set.folder.clone(),
        strategy: name_of(strategy),
        merged: size,
        mean: Scores::mean(scores.values()).context(none)?,
        standard_error: Scores::standard_error(pictures.values().flatten()),
        concepts: scores,
        pictures,
    })
}

/// The pictures of each concept's jobs, drawn with all concepts merged: one composition, so all jobs in one go.
fn draw_together(
    session: &mut Session,
    jobs: &[Vec<Job>],
    settings: &draw::Settings,
    weight: f32,
    merge: &Arc<dyn MergeStrategy>,
    bar: &ProgressBar,
) -> anyhow::Result<Vec<Vec<Picture>>> {
    let merged: Vec<(usize, f32)> = (0..jobs.len()).map(|i| (i, weight)).collect();
    session.merge(&merged, merge)?;
    let mut drawn = draw::draw(session, &jobs.concat(), settings, settings.batch(), bar)?.into_iter();
    Ok(jobs.iter().map(|jobs| drawn.by_ref().take(jobs.len()).collect()).collect())
}

/// The pictures of each concept's jobs, drawn with it and the `size - 1` concepts that follow it merged.
fn draw_apart(
    session: &mut Session,
    jobs: &[Vec<Job>],
    settings: &draw::Settings,
    size: usize,
    weight: f32,
    merge: &Arc<dyn MergeStrategy>,
    bar: &ProgressBar,
) -> anyhow::Result<Vec<Vec<Picture>>> {
    let count = jobs.len();
    let mut draw_one = |(i, jobs): (usize, &Vec<Job>)| {
        let merged: Vec<(usize, f32)> = (0..size).map(|k| ((i + k) % count, weight)).collect();
        session.merge(&merged, merge)?;
        draw::draw(session, jobs, settings, settings.batch(), bar)
    };
    jobs.iter().enumerate().map(&mut draw_one).collect()
}

/// The entry's prompts with `word` in the concept's place, each with the seeds that `args` ask for.
fn jobs_of(args: &Args, entry: &Entry, word: &str) -> Vec<Job> {
    let count = args.prompts.map_or(entry.prompts.len(), usize::from);
    let prompts = entry.prompts.iter().take(count).map(|p| p.replace("{c}", word));
    draw::jobs(prompts, args.images, args.sampling.seed)
}

fn name_of(strategy: Strategy) -> String {
    strategy.to_possible_value().map(|v| v.get_name().to_owned()).unwrap_or_default()
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new(["adapters", "strategy", "merged", "image", "text", "identity"]);
    for row in rows {
        let mean = row.mean;
        let shown = |value: f32, error: Option<f32>| match error {
            Some(error) => format!("{value:.4} ± {error:.4}"),
            None => format!("{value:.4}"),
        };
        let error = row.standard_error;
        let identity = match error {
            Some(e) => format!("{:.1} ± {:.1} %", 100.0 * mean.identity, 100.0 * e.identity),
            None => format!("{:.1} %", 100.0 * mean.identity),
        };
        table.row([
            row.set.display().to_string(),
            if row.merged == 1 { "(alone)".to_owned() } else { row.strategy.clone() },
            row.merged.to_string(),
            shown(mean.image_alignment, error.map(|e| e.image_alignment)),
            shown(mean.text_alignment, error.map(|e| e.text_alignment)),
            identity,
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_names_its_strategies() {
        let set: Set = "a=b/c=average,blocklora-sum1".parse().unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(set.folder, Path::new("a=b/c"));
        assert_eq!(set.strategies, [Strategy::Average, Strategy::BlockloraSum1]);
        assert!("a=nonsense".parse::<Set>().is_err());
    }

    #[test]
    fn alone_is_scored_once() {
        let set = Set { folder: "x".into(), strategies: vec![Strategy::Blocklora, Strategy::Average] };
        let plan = plan(&set, &[5, 1, 2, 2, 9], 5);
        let [b, a] = [Strategy::Blocklora, Strategy::Average];
        assert_eq!(plan, [(b, 1), (b, 2), (b, 5), (a, 2), (a, 5)]);
    }
}
