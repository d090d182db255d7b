//! Manual pages and shell completions, made from the one table of flags. Packages run these commands; they stand beside
//! the table and not in it, so that neither shows them.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Command, Parser};
use clap_complete::Shell;

use crate::{failure, output};

/// What packages ask for.
#[derive(Parser)]
#[command(name = "blocklora")]
pub enum Request {
    /// Write manual pages into a folder
    #[command(name = "__man")]
    Man {
        /// The folder, which must be there
        #[arg(value_name = "DIR")]
        folder: PathBuf,
    },
    /// Print the completions of a shell
    #[command(name = "__completions")]
    Completions {
        /// Which shell
        #[arg(value_enum)]
        shell: Shell,
    },
}

/// What this program is asked for, if it is one of these.
pub fn requested() -> Option<Result<Request, clap::Error>> {
    let is_one = std::env::args_os().nth(1).is_some_and(|name| name == "__man" || name == "__completions");
    is_one.then(Request::try_parse)
}

/// Does what is asked for, from the table `command`.
pub fn run(request: Result<Request, clap::Error>, command: Command) -> anyhow::Result<()> {
    match request {
        Ok(Request::Man { folder }) => man(&folder, command),
        Ok(Request::Completions { shell }) => completions(shell, command),
        Err(error) => failure::of_parser(&error),
    }
}

/// Writes blocklora.1 and one page for every subcommand, blocklora-generate.1 and so on.
fn man(folder: &Path, command: Command) -> anyhow::Result<()> {
    let mut command = command.disable_help_subcommand(true);
    command.build();
    pages(&command, "blocklora", folder)
}

fn pages(command: &Command, name: &'static str, folder: &Path) -> anyhow::Result<()> {
    let mut page = Vec::new();
    let named = command.clone().name(name).display_name(name);
    clap_mangen::Man::new(named).render(&mut page)?;
    let path = folder.join(format!("{name}.1"));
    std::fs::write(&path, page).with_context(|| path.display().to_string())?;
    for sub in command.get_subcommands() {
        // clap wants names that live as long as the program, which ends here.
        pages(sub, format!("{name}-{}", sub.get_name()).leak(), folder)?;
    }
    Ok(())
}

/// Prints the completions.
fn completions(shell: Shell, mut command: Command) -> anyhow::Result<()> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut command, "blocklora", &mut text);
    Ok(output::print(&String::from_utf8_lossy(&text))?)
}
