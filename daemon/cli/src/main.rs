//! The command `blocklora`: teach an image model concepts, merge them, draw them.

// The docs of the argument structs are help texts, in which <name> is what a user types.
#![allow(rustdoc::invalid_html_tags)]

mod args;
mod base;
mod failure;
mod interrupt;
mod output;
mod plot;
mod progress;
mod table;

mod concepts;
mod crosstalk;
mod draw;
mod judge;
mod methods;
mod session;

mod bench;
mod demo;
mod export;
mod generate;
mod inspect;
mod merge;
mod plugin;
mod score;
mod train;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Pages freed by one denoising step are wanted by the next; the default allocator gives them back to the system.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const EXIT_CODES: &str = "\
Exit codes:
  0    done
  1    failed; one line on stderr says what and what to do
  2    wrong usage
  130  interrupted by Ctrl-C

Environment:
  BLOCKLORA_MODEL  the model folder to use where --base is not given";

/// Teach an image model new concepts, merge any number of them exactly, and draw them.
///
/// A concept is one adapter file made by `train`. A prompt names a concept in angle brackets: "<milo> on the beach".
#[derive(Parser)]
#[command(name = "blocklora", version, after_help = EXIT_CODES, arg_required_else_help = true)]
struct Cli {
    /// Threads to compute with [default: one per core]
    #[arg(long, global = true, value_name = "N", help_heading = "Global options")]
    threads: Option<std::num::NonZeroUsize>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Demo(demo::Args),
    Train(train::Args),
    Generate(generate::Args),
    Merge(merge::Args),
    Inspect(inspect::Args),
    Export(export::Args),
    Score(score::Args),
    #[command(subcommand)]
    Plugin(plugin::Command),
    #[command(subcommand)]
    Bench(bench::Command),
}

fn run(cli: Cli) -> anyhow::Result<()> {
    if let Some(threads) = cli.threads {
        rayon::ThreadPoolBuilder::new().num_threads(threads.get()).build_global()?;
    }
    interrupt::install()?;
    match cli.command {
        Command::Demo(args) => demo::run(&args),
        Command::Train(args) => train::run(&args),
        Command::Generate(args) => generate::run(&args),
        Command::Merge(args) => merge::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Export(args) => export::run(&args),
        Command::Score(args) => score::run(&args),
        Command::Plugin(command) => plugin::run(&command),
        Command::Bench(command) => bench::run(&command, cli.threads),
    }
}

fn main() -> ExitCode {
    let result = match Cli::try_parse() {
        Ok(cli) => run(cli),
        Err(error) => failure::of_parser(&error),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failure::report(&error),
    }
}
