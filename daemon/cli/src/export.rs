//! `blocklora export`: a concept as a LoRA file for other tools.

use std::path::{Path, PathBuf};

use blocklora_spec::{Adapter, export};
use clap::ValueEnum;

use crate::output::{self, OutputFolder};
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

/// Runs the command.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let adapter = Adapter::open(&args.file)?;
    let words = match args.format {
        Format::TextualInversion => Words::None,
        Format::Kohya | Format::Diffusers | Format::Peft => Words::of(adapter.tokens().iter().map(|t| t.layers)),
    };
    let embedding = words.file(&args.output);
    output::not_the_same(&args.file, &args.output)?;
    if let Some(path) = &embedding {
        output::not_the_same(&args.file, path)?;
        output::check_file(path)?;
    }
    if args.format == Format::Peft {
        let folder = OutputFolder::create(&args.output)?;
        export::peft(&adapter, folder.path())?;
        folder.finish()?;
    } else {
        output::check_file(&args.output)?;
    }
    match args.format {
        Format::Kohya => export::kohya(&adapter, &args.output)?,
        Format::Diffusers => export::diffusers(&adapter, &args.output)?,
        Format::TextualInversion => export::textual_inversion(&adapter, &args.output)?,
        Format::Peft => {}
    }
    announce(&args.output)?;
    if let Some(path) = &embedding {
        export::textual_inversion(&adapter, path)?;
        announce(path)?;
    }
    words.note_what_is_left(&adapter.manifest().name);
    Ok(())
}

fn announce(path: &Path) -> anyhow::Result<()> {
    output::print(&format!("{}\n", path.display()))?;
    Ok(())
}
