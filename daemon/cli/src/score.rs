//! `blocklora score`: how much of each concept survives a merge, by the paper's measures.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::Context;
use blocklora_engine::score::PAPER_PREFIX;
use clap::ValueEnum;
use serde::Serialize;

use crate::args::{self, Clash, MergeArgs, ModelArgs, SamplingArgs, Strategy};
use crate::concepts::{Concepts, Entry};
use crate::draw::{self, Job};
use crate::judge::{Judge, Scores};
use crate::session::{self, Session};
use crate::table::Table;
use crate::{base, output, progress};

/// Score concepts alone and merged: image alignment, text alignment, identity
///
/// Draws every concept's prompts with 1, 2, 5, ... concepts merged and compares the pictures with the concept's own
/// pictures (image alignment: the mean of max(cosine, 0) over all pairs of CLIP image features), with the prompt in
/// which the class word stands for the concept (text alignment: the mean of 2.5 max(cosine, 0)), and with all concepts
/// (identity: the share of pictures nearest to the right concept).
#[derive(clap::Args)]
// The bundled model is small: more guidance than this burns its colours.
#[command(mut_arg("guidance", |arg| arg.default_value("4")))]
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
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    model: ModelArgs,
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
    concepts: BTreeMap<String, Scores>,
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
    text_prefix: &'a str,
    rows: &'a [Row],
}

/// Runs the command.
pub fn run(args: &Args) -> anyhow::Result<()> {
    if args.sizes.contains(&0) {
        return crate::failure::usage("--sizes: at least one concept must be merged");
    }
    let concepts = Concepts::open(&folder_or(args.concepts.as_deref(), "concepts")?)?;
    let clip = folder_or(args.clip.as_deref(), "clip")?;
    let sets = if args.set.is_empty() { vec![bundled_set()?] } else { args.set.clone() };
    for set in &sets {
        args::adapters_in(&set.folder)?;
    }
    let mut rows = Vec::new();
    let judge = Judge::open(&clip, &concepts, &args.text_prefix)?;
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
        return output::print_json(&Json {
            base: &base::folder(args.model.base.as_deref())?,
            clip: &clip,
            prompts_per_concept: prompts,
            images_per_prompt: args.images,
            steps: args.sampling.steps,
            guidance: args.sampling.guidance,
            sampler: &args.sampling.sampler,
            seed: args.sampling.seed,
            text_prefix: &args.text_prefix,
            rows: &rows,
        });
    }
    output::print(&table(&rows).to_string())?;
    Ok(())
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
    let merge = session::strategy(&MergeArgs { strategy, on_clash: Clash::Mean });
    let jobs: Vec<Vec<Job>> = entries.iter().map(|e| jobs_of(args, e)).collect();
    let pictures: usize = jobs.iter().map(Vec::len).sum();
    let bar = progress::bar("drawing", pictures * settings.steps);
    bar.set_message(format!("{} {}, {size} merged", set.folder.display(), name_of(strategy)));
    let mut scores = BTreeMap::new();
    for (i, (entry, jobs)) in entries.iter().zip(&jobs).enumerate() {
        let merged: Vec<(usize, f32)> = (0..size).map(|k| ((i + k) % entries.len(), 1.0)).collect();
        session.merge(&merged, merge.as_ref())?;
        let pictures = draw::draw(session, jobs, &settings, settings.batch(), &bar)?;
        let prompts: Vec<&str> = jobs.iter().map(|j| j.prompt.as_str()).collect();
        scores.insert(entry.name.clone(), judge.score(entry, &prompts, &pictures)?);
    }
    bar.finish_and_clear();
    Ok(Row {
        set: set.folder.clone(),
        strategy: name_of(strategy),
        merged: size,
        mean: Scores::mean(scores.values()).context("there are no adapters to score")?,
        concepts: scores,
    })
}

fn jobs_of(args: &Args, entry: &Entry) -> Vec<Job> {
    let count = args.prompts.map_or(entry.prompts.len(), usize::from);
    let prompts = entry.prompts.iter().take(count).map(|p| entry.prompt(p));
    let seeds = |prompt: String| {
        let job = move |i: u16| Job {
            prompt: prompt.clone(),
            negative: String::new(),
            seed: args.sampling.seed.wrapping_add(u64::from(i)),
        };
        (0..args.images).map(job)
    };
    prompts.flat_map(seeds).collect()
}

fn name_of(strategy: Strategy) -> String {
    strategy.to_possible_value().map(|v| v.get_name().to_owned()).unwrap_or_default()
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new(["adapters", "strategy", "merged", "image", "text", "identity"]);
    for row in rows {
        let Scores { image_alignment, text_alignment, identity } = row.mean;
        table.row([
            row.set.display().to_string(),
            if row.merged == 1 { "(alone)".to_owned() } else { row.strategy.clone() },
            row.merged.to_string(),
            format!("{image_alignment:.4}"),
            format!("{text_alignment:.4}"),
            format!("{:.1} %", 100.0 * identity),
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
