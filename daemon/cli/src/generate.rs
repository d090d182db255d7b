//! `blocklora generate`: draw a prompt.

use std::path::{Path, PathBuf};

use blocklora_engine::image::AdapterUse;

use crate::args::{MergeArgs, ModelArgs, SamplingArgs, WeightedFile};
use crate::draw::{self, Job};
use crate::output::{self, OutputFile};
use crate::{progress, session};

/// Draw a prompt, with any number of concepts merged into the model
///
/// The prompt names a concept in angle brackets: "<milo> and <zuko> on the beach". Every PNG holds the settings that
/// made it; the same settings give the same picture.
#[derive(clap::Args)]
pub struct Args {
    /// What to draw
    prompt: String,
    /// An adapter file to merge, and how strongly (1 is as trained); may be given many times
    #[arg(long, value_name = "FILE[=WEIGHT]")]
    with: Vec<WeightedFile>,
    /// What to steer away from
    #[arg(long, value_name = "PROMPT", default_value = "")]
    negative: String,
    /// Pictures to draw; picture i has the seed SEED + i
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1000))]
    count: u16,
    /// The PNG file to write; with --count N > 1, FILE-1.png to FILE-N.png
    #[arg(short, long, value_name = "FILE.png")]
    output: PathBuf,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    merge: MergeArgs,
    #[command(flatten)]
    model: ModelArgs,
}

/// Runs the command.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let paths = numbered(&args.output, args.count);
    let files = paths.iter().map(|p| OutputFile::create(p)).collect::<anyhow::Result<Vec<_>>>()?;
    let (session, _) = session::open_merged(&args.model, &args.merge, &args.with)?;
    session::check_prompt(&args.prompt, &session)?;
    session::check_prompt(&args.negative, &session)?;
    let settings = draw::Settings::new(&args.sampling, &session.model)?;
    let job = |i: u16| Job {
        prompt: args.prompt.clone(),
        negative: args.negative.clone(),
        seed: args.sampling.seed.wrapping_add(u64::from(i)),
    };
    let jobs: Vec<Job> = (0..args.count).map(job).collect();
    let bar = progress::bar("drawing", jobs.len() * settings.steps);
    // One by one, so that picture 3 of 4 is the one that its own seed gives.
    let pictures = draw::draw(&session, &jobs, &settings, 1, &bar)?;
    bar.finish_and_clear();
    let used: Vec<AdapterUse> = session
        .adapters
        .iter()
        .zip(&args.with)
        .map(|(a, w)| AdapterUse { name: a.manifest().name.clone(), digest: a.digest().to_owned(), weight: w.weight })
        .collect();
    let mut contents = Vec::new();
    for (job, picture) in jobs.iter().zip(&pictures) {
        let request = settings.request(job, &session.concepts);
        contents.push(picture.to_png(Some(&request.parameters(&session.model, 0, &used)))?);
    }
    output::write_all(files.into_iter().zip(contents).collect())
}

/// `path`, or `path` with -1 to -count before its extension.
fn numbered(path: &Path, count: u16) -> Vec<PathBuf> {
    if count == 1 {
        return vec![path.to_path_buf()];
    }
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let extension = path.extension().map(|e| format!(".{}", e.to_string_lossy())).unwrap_or_default();
    (1..=count).map(|i| path.with_file_name(format!("{stem}-{i}{extension}"))).collect()
}
