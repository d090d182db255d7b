//! `blocklora bench`: how fast this machine merges and trains.

mod merge;
mod step;

use std::num::NonZeroUsize;

/// Measure how fast this machine merges and trains
#[derive(clap::Subcommand)]
pub enum Command {
    Merge(merge::Args),
    Step(step::Args),
}

/// Runs the command.
pub fn run(command: &Command, threads: Option<NonZeroUsize>) -> anyhow::Result<()> {
    match command {
        Command::Merge(args) => merge::run(args, threads),
        Command::Step(args) => step::run(args),
    }
}
