//! `blocklora export`: a concept as a LoRA file for other tools.

use std::path::PathBuf;

use blocklora_spec::{Adapter, export};
use clap::ValueEnum;

use crate::args;
use crate::output::{self, OutputFolder};

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
    if args.format == Format::Peft {
        let folder = OutputFolder::create(&args.output)?;
        export::peft(&adapter, folder.path())?;
        folder.finish()?;
        return announce(&args.output);
    }
    let words = args.output.with_extension(args::WORDS_EXTENSION);
    for path in [&args.output, &words] {
        output::not_the_same(&args.file, path)?;
    }
    output::check_file(&args.output)?;
    match args.format {
        Format::Kohya => export::kohya(&adapter, &args.output)?,
        Format::Diffusers => export::diffusers(&adapter, &args.output)?,
        Format::TextualInversion | Format::Peft => {
            export::textual_inversion(&adapter, &args.output)?;
            return announce(&args.output);
        }
    }
    announce(&args.output)?;
    if adapter.tokens().is_empty() {
        return Ok(());
    }
    if adapter.tokens().iter().all(|t| t.layers == 1) {
        export::textual_inversion(&adapter, &words)?;
        return announce(&words);
    }
    let name = &adapter.manifest().name;
    eprintln!(
        "blocklora: the words of <{name}> have a vector for each layer, which other tools cannot read: train with \
         tokens = \"plain\" for a file of words, too"
    );
    Ok(())
}

fn announce(path: &std::path::Path) -> anyhow::Result<()> {
    output::print(&format!("{}\n", path.display()))?;
    Ok(())
}
