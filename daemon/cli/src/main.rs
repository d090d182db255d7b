//! The command `blocklora`: teach an image model concepts, merge them, draw them.

// The docs of the argument structs are help texts, in which <name> is what a user types.
#![allow(rustdoc::invalid_html_tags)]

mod args;
mod base;
mod daemon;
mod failure;
mod held;
mod interrupt;
mod like;
mod output;
mod plot;
mod progress;
mod set;
mod settings;
mod table;
mod terminal;
mod words;

mod concepts;
mod crosstalk;
mod draw;
mod drift;
mod judge;
mod methods;
mod session;

mod adapters;
mod bench;
mod demo;
mod doctor;
mod export;
mod generate;
mod import;
mod inspect;
mod jobs;
mod manual;
mod merge;
mod models;
mod plugin;
mod score;
mod separate;
mod slots;
mod status;
mod train;

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

/// Pages freed by one denoising step are wanted by the next; the default allocator gives them back to the system.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const EXIT_CODES: &str = "\
Exit codes:
  0    done
  1    failed; one line on stderr says what and what to do
  2    wrong usage
  3    no daemon could be reached or started
  130  interrupted by Ctrl-C

Environment:
  BLOCKLORA_DAEMON             the daemon to use where --daemon is not given
  BLOCKLORA_MODEL              the model folder to use where --base is not given
  BLOCKLORA_PLUGIN_PATH        folders with plugins, separated by colons, before the usual ones
  BLOCKLORA_PLUGIN_ISOLATION   in-process or worker: where plugins run, instead of what the configuration says

Files:
  $XDG_RUNTIME_DIR/blocklora/bus, /run/blocklora/bus   sockets of the user's and of the machine's daemon
  $XDG_STATE_HOME/blocklora                            the user's library (~/.local/state/blocklora by default)

With no daemon running, a command starts one for itself, which ends with it.";

/// Teach an image model new concepts, merge any number of them exactly, and draw them.
///
/// A concept is one adapter file made by `train`. A prompt names a concept in angle brackets: "<milo> on the beach".
#[derive(Parser)]
#[command(name = "blocklora", version, after_help = EXIT_CODES, arg_required_else_help = true)]
struct Cli {
    /// Threads that this command, or the private daemon that it starts, computes with; a daemon that runs has its own
    /// [default: one per core]
    #[arg(long, global = true, value_name = "N", help_heading = "Global options")]
    threads: Option<std::num::NonZeroUsize>,
    /// Which daemon to use: auto (one that runs, else a private one), private, session, system, or a socket's path
    /// [default: $BLOCKLORA_DAEMON, or auto]
    #[arg(long, global = true, value_name = "WHERE", help_heading = "Global options")]
    daemon: Option<daemon::Choice>,
    #[command(subcommand)]
    command: Command,
}

impl Cli {
    /// Which daemon to use.
    fn daemon(&self) -> anyhow::Result<daemon::Options> {
        const VARIABLE: &str = "BLOCKLORA_DAEMON";
        let choice = match (&self.daemon, std::env::var(VARIABLE)) {
            (Some(choice), _) => choice.clone(),
            (None, Ok(text)) if !text.is_empty() => match text.parse() {
                Ok(choice) => choice,
                Err(reason) => return failure::usage(format!("${VARIABLE}: {reason}")),
            },
            (None, _) => daemon::Choice::Auto,
        };
        Ok(daemon::Options { choice, threads: self.threads })
    }
}

#[derive(Subcommand)]
enum Command {
    Demo(demo::Args),
    Train(train::Args),
    Generate(generate::Args),
    Merge(merge::Args),
    Inspect(inspect::Args),
    Export(export::Args),
    Import(import::Args),
    Score(score::Args),
    Separate(separate::Args),
    #[command(subcommand)]
    Adapters(adapters::Command),
    #[command(subcommand)]
    Models(models::Command),
    Slots(slots::Args),
    #[command(subcommand)]
    Jobs(jobs::Command),
    #[command(subcommand)]
    Plugin(plugin::Command),
    Status(status::Args),
    Doctor(doctor::Args),
    #[command(subcommand)]
    Bench(bench::Command),
}

fn run(cli: Cli) -> anyhow::Result<()> {
    if let Some(threads) = cli.threads {
        rayon::ThreadPoolBuilder::new().num_threads(threads.get()).build_global()?;
    }
    interrupt::install()?;
    let daemon = cli.daemon()?;
    match cli.command {
        Command::Demo(args) => demo::run(&args, &daemon),
        Command::Train(args) => train::run(&args, &daemon),
        Command::Generate(args) => generate::run(&args, &daemon),
        Command::Merge(args) => merge::run(&args, &daemon),
        Command::Inspect(args) => inspect::run(&args),
        Command::Export(args) => export::run(&args),
        Command::Import(args) => import::run(&args),
        Command::Score(args) => score::run(&args),
        Command::Separate(args) => separate::run(&args),
        Command::Adapters(command) => adapters::run(&command, &daemon),
        Command::Models(command) => models::run(&command, &daemon),
        Command::Slots(args) => slots::run(&args, &daemon),
        Command::Jobs(command) => jobs::run(&command, &daemon),
        Command::Plugin(command) => plugin::run(&command, &daemon),
        Command::Status(args) => status::run(&args, &daemon),
        Command::Doctor(args) => doctor::run(&args, &daemon),
        Command::Bench(command) => bench::run(&command, cli.threads),
    }
}

fn main() -> ExitCode {
    let result = match manual::requested() {
        Some(request) => manual::run(request, Cli::command()),
        None => match Cli::try_parse() {
            Ok(cli) => run(cli),
            Err(error) => failure::of_parser(&error),
        },
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failure::report(&error),
    }
}
