//! `blocklora bench`: how fast this machine merges and trains, and what plugins cost.

mod merge;
mod model;
mod plugins;
mod step;

use std::num::NonZeroUsize;

/// Measure how fast this machine merges and trains
#[derive(clap::Subcommand)]
pub enum Command {
    Merge(merge::Args),
    Plugins(plugins::Args),
    Step(step::Args),
    /// Measure one prediction of the UNet
    Unet(model::SizedArgs),
    /// Measure decoding latents to pictures
    Vae(model::SizedArgs),
    /// Measure encoding prompts
    Text(model::Args),
    /// Measure a training step without a trainer around it: losses and gradients alone
    Gradients(model::GradientsArgs),
    Sample(model::SampleArgs),
    Start(model::StartArgs),
    Model(model::ModelFolderArgs),
}

/// Runs the command.
pub fn run(command: &Command, threads: Option<NonZeroUsize>) -> anyhow::Result<()> {
    match command {
        Command::Merge(args) => merge::run(args, threads),
        Command::Plugins(args) => plugins::run(args, threads),
        Command::Step(args) => step::run(args),
        Command::Unet(args) => model::unet(args),
        Command::Vae(args) => model::vae(args),
        Command::Text(args) => model::text(args),
        Command::Gradients(args) => model::gradients(args),
        Command::Sample(args) => model::sample(args),
        Command::Start(args) => model::start(args),
        Command::Model(args) => model::write_folder(args),
    }
}
