//! Manual pages and shell completions, made from the one table of flags. Packages run these hidden commands.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Command;
use clap_complete::Shell;

use crate::output;

/// Write manual pages into a folder
#[derive(clap::Args)]
pub struct ManArgs {
    /// The folder, which must be there
    #[arg(value_name = "DIR")]
    folder: PathBuf,
}

/// Print the completions of a shell
#[derive(clap::Args)]
pub struct CompletionsArgs {
    /// Which shell
    #[arg(value_enum)]
    shell: Shell,
}

/// Writes blocklora.1 and one page for every subcommand, blocklora-generate.1 and so on.
pub fn man(args: &ManArgs, command: Command) -> anyhow::Result<()> {
    let mut command = command.disable_help_subcommand(true);
    command.build();
    pages(&command, "blocklora", &args.folder)
}

fn pages(command: &Command, name: &'static str, folder: &Path) -> anyhow::Result<()> {
    let mut page = Vec::new();
    let named = command.clone().name(name).display_name(name);
    clap_mangen::Man::new(named).render(&mut page)?;
    let path = folder.join(format!("{name}.1"));
    std::fs::write(&path, page).with_context(|| path.display().to_string())?;
    for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set()) {
        // clap wants names that live as long as the program, which ends here.
        pages(sub, format!("{name}-{}", sub.get_name()).leak(), folder)?;
    }
    Ok(())
}

/// Prints the completions.
pub fn completions(args: &CompletionsArgs, mut command: Command) -> anyhow::Result<()> {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut command, "blocklora", &mut text);
    Ok(output::print(&String::from_utf8_lossy(&text))?)
}
