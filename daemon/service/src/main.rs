//! `blocklorad`, the BlockLoRA daemon.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use blocklora_service::config::{Bus, Config};
use blocklora_service::life::run::{Options, run};
use blocklora_service::methods::Methods;
use blocklora_service::plugins::{Isolation, Options as PluginOptions, Plugins, serve_hidden_command};
use clap::{Parser, ValueEnum};

/// Pages that were freed are kept for the next step: candle allocates a tensor for every operation.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The BlockLoRA daemon: keeps a model in memory and serves it over D-Bus and on a socket
#[derive(Parser)]
#[command(name = "blocklorad", version)]
struct Args {
    /// A configuration file to read instead of the standard ones; of several, later ones win
    #[arg(long, value_name = "FILE")]
    config: Vec<PathBuf>,
    /// Which message bus to be on [default: as configured]
    #[arg(long, value_enum)]
    bus: Option<BusArg>,
    /// The socket to listen on, or "none" [default: as configured]
    #[arg(long, value_name = "PATH")]
    socket: Option<String>,
    /// The folder for catalogue, adapters and checkpoints [default: as configured]
    #[arg(long, value_name = "DIR")]
    state: Option<String>,
    /// End after this long without clients and jobs [default: as configured]
    #[arg(long, value_name = "SECONDS")]
    exit_when_idle: Option<u64>,
    /// Serve only the D-Bus connection on standard input, and end with it: for programs that start a daemon of their own
    #[arg(long, conflicts_with_all = ["bus", "socket"])]
    private: bool,
    /// Remove the state folder at the end: one that was made for this run
    #[arg(long, requires = "private", requires = "state")]
    temporary: bool,
    /// How much to write to stderr [default: info; with --private: warn]
    #[arg(long, value_enum)]
    log: Option<LogArg>,
}

#[derive(Clone, Copy, ValueEnum)]
enum BusArg {
    Session,
    System,
    None,
}

#[derive(Clone, Copy, ValueEnum)]
enum LogArg {
    Error,
    Warn,
    Info,
    Debug,
}

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    if let Some(code) = serve_hidden_command(&arguments) {
        return ExitCode::from(code);
    }
    let args = Args::parse();
    let log = args.log.unwrap_or(if args.private { LogArg::Warn } else { LogArg::Info });
    let level = match log {
        LogArg::Error => tracing::Level::ERROR,
        LogArg::Warn => tracing::Level::WARN,
        LogArg::Info => tracing::Level::INFO,
        LogArg::Debug => tracing::Level::DEBUG,
    };
    tracing_subscriber::fmt().with_max_level(level).with_writer(std::io::stderr).with_ansi(false).without_time().init();
    let bus = args.bus.map(|bus| match bus {
        BusArg::Session => Bus::Session,
        BusArg::System => Bus::System,
        BusArg::None => Bus::None,
    });
    let options = Options {
        config: args.config,
        bus,
        socket: args.socket,
        state_dir: args.state,
        exit_when_idle_sec: args.exit_when_idle,
        private: args.private,
        temporary: args.temporary,
    };
    // Records of plugins are the user's or the service's, whatever the state folder of this run.
    let plugins = |config: &Config| -> Arc<dyn Methods> {
        let isolation = Isolation::from_environment().unwrap_or(config.plugins.isolation);
        Arc::new(Plugins::new(PluginOptions { isolation, ..PluginOptions::default() }))
    };
    match run(&options, plugins) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("blocklorad: {error}");
            ExitCode::FAILURE
        }
    }
}
