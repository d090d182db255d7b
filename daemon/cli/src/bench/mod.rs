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
    Unet(model::Args),
    /// Measure decoding latents to pictures
    Vae(model::Args),
    /// Measure encoding prompts
    Text(model::Args),
    /// Measure a training step without a trainer around it: losses and gradients alone
    Gradients(model::Args),
    Sample(model::SampleArgs),
    /// Measure the time from the start of the process to the end of the first denoising step
    Start(model::SampleArgs),
    Model(model::ModelFolderArgs),
}

/// Runs the command.
pub fn run(command: &Command, threads: Option<NonZeroUsize>) -> anyhow::Result<()> {
    match command {
        Command::Merge(args) => merge::run(args, threads),
        Command::Plugins(args) => plugins::run(args, threads),
        Command::Step(args) => step::run(args),
        Command::Unet(args) => model::run(args, model::Part::Unet),
        Command::Vae(args) => model::run(args, model::Part::Vae),
        Command::Text(args) => model::run(args, model::Part::Text),
        Command::Gradients(args) => model::run(args, model::Part::RawStep),
        Command::Sample(args) => model::sample(args, false),
        Command::Start(args) => model::sample(args, true),
        Command::Model(args) => model::write_folder(args),
    }
}
