//! `blocklora merge`: a model folder with concepts built in.

use std::path::PathBuf;
use std::time::Instant;

use blocklora_engine::DType;
use blocklora_engine::bake::bake;
use blocklora_spec::Adapter;

use crate::args::{MergeArgs, WeightedFile};
use crate::output::{self, OutputFolder, cannot_write};
use crate::session::{self, Session};
use crate::{base, interrupt, methods, progress};

/// Write a model folder with concepts built in, for diffusers and every tool that reads its layout
///
/// In such a folder the words `<milo>` and `<milo>_1` stand for the concept; diffusers expands `<milo>` to both by
/// itself. Layer-wise words (the default of `train`) work fully here and, by their mean, nearly as well elsewhere;
/// train with `tokens = "plain"` where they must be exact in other tools.
#[derive(clap::Args)]
pub struct Args {
    /// Adapter files, and how strongly each is merged (1 is as trained)
    #[arg(required = true, value_name = "FILE[=WEIGHT]")]
    files: Vec<WeightedFile>,
    /// The folder to write; it must not be there yet, or be empty
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Folder of the base model in the diffusers layout [default: the bundled starter model]
    #[arg(long, value_name = "DIR", help_heading = "Model")]
    base: Option<PathBuf>,
    #[command(flatten)]
    merge: MergeArgs,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let folder = OutputFolder::create(&args.output)?;
    let files: Vec<&PathBuf> = args.files.iter().map(|w| &w.path).collect();
    for file in &files {
        Adapter::open(file)?;
    }
    let base = base::folder(args.base.as_deref())?;
    // Merged in f32 and rounded once, to the type in which the base model stores each weight.
    let mut session = Session::new(session::load_model(&base, DType::F32)?, &files)?;
    let set: Vec<(usize, f32)> = args.files.iter().enumerate().map(|(i, w)| (i, w.weight)).collect();
    let report = session.merge(&set, &methods::strategy(&args.merge)?)?;
    interrupt::check()?;

    let started = Instant::now();
    let spinner = progress::spinner("writing the model");
    let written = bake(&session.model, &session.concepts, folder.path());
    spinner.finish_and_clear();
    written.map_err(|e| match e {
        // The folder that the error names is a temporary one, which the user has never seen.
        blocklora_engine::Error::Io { path, source } if !path.starts_with(&base) => cannot_write(&args.output, source),
        e => e.into(),
    })?;
    interrupt::check()?;
    folder.finish()?;
    if args.json {
        return output::print_json(&serde_json::json!({
            "folder": args.output,
            "merge": report,
            "write_seconds": started.elapsed().as_secs_f64(),
        }));
    }
    output::print(&format!(
        "{}: {} merged in {:.0} ms ({} rows of {} layers), written in {:.1} s\n",
        args.output.display(),
        if files.len() == 1 { "1 concept".to_owned() } else { format!("{} concepts", files.len()) },
        1e3 * report.seconds,
        report.rows_rewritten,
        report.layers_touched,
        started.elapsed().as_secs_f64()
    ))?;
    Ok(())
}
