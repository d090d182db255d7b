//! `blocklora export`: a concept as a LoRA file for other tools.

use std::path::PathBuf;

use anyhow::bail;
use blocklora_spec::{Adapter, export};
use clap::ValueEnum;
use serde_json::json;

use crate::output::{self, OutputFile, OutputFolder};
use crate::words::Words;

/// Write a concept as a LoRA for other tools
///
/// The LoRA is exactly equivalent to the concept's change. Its words are exported beside it, as a textual-inversion
/// file, if they have one vector each (`tokens = "plain"` in training); layer-wise words exist only here.
#[derive(clap::Args)]
pub struct Args {
    /// The adapter file
    file: PathBuf,
    /// What to write
    #[arg(long, value_enum)]
    format: Format,
    /// The file to write; for peft, the folder
    #[arg(short, long, value_name = "PATH")]
    output: PathBuf,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// One file as kohya's scripts write it: A1111, Forge, ComfyUI, InvokeAI
    Kohya,
    /// One file as diffusers' scripts write it
    Diffusers,
    /// A folder for PEFT
    Peft,
    /// The words alone, as a textual-inversion file
    TextualInversion,
}

impl From<Format> for blocklora_spec::Format {
    fn from(format: Format) -> Self {
        match format {
            Format::Kohya => Self::Kohya,
            Format::Diffusers => Self::Diffusers,
            Format::Peft => Self::Peft,
            Format::TextualInversion => Self::TextualInversion,
        }
    }
}

/// Runs the command.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let adapter = Adapter::open(&args.file)?;
    let format = blocklora_spec::Format::from(args.format);
    let words = match args.format {
        Format::TextualInversion => Words::None,
        Format::Kohya | Format::Diffusers | Format::Peft => Words::of(adapter.tokens().iter().map(|t| t.layers)),
    };
    let embedding = words.file(&args.output);
    let mut outputs = Vec::new();
    output::not_the_same(&args.file, &args.output)?;
    if let Some(path) = &embedding {
        output::not_the_same(&args.file, path)?;
        outputs.push((OutputFile::create(path)?, blocklora_spec::Format::TextualInversion));
    }
    let mut folder = None;
    if args.format == Format::Peft {
        let folder = folder.insert(OutputFolder::create(&args.output)?);
        export::peft(&adapter, folder.path())?;
    } else {
        outputs.push((OutputFile::create(&args.output)?, format));
    }
    for (output, format) in &mut outputs {
        let [file] = &export::files(&adapter, *format)?[..] else { bail!("{format} is a format of several files") };
        output.fill_with(|out| file.write_to(out))?;
    }
    folder.map_or(Ok(()), OutputFolder::finish)?;
    outputs.into_iter().try_for_each(|(output, _)| output.publish())?;
    if args.json {
        output::print_json(&json!({ "path": args.output, "format": format, "embedding": embedding }))?;
    } else {
        for path in std::iter::once(&args.output).chain(&embedding) {
            output::print(&format!("{}\n", path.display()))?;
        }
    }
    words.note_what_is_left(&adapter.manifest().name);
    Ok(())
}
