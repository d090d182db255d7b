//! `blocklora bench step`: what a training step costs.

use blocklora_engine::device::Wanted;
use blocklora_engine::train::bench_step;
use blocklora_sdk::manifest::PluginKind;
use serde_json::json;

use crate::args::OwnModelArgs;
use crate::{methods, output};

/// The methods that are measured if none is named.
const METHODS: [&str; 2] = ["blocklora", "ed-lora"];

/// Measure the time and memory of a training step
///
/// Runs training steps of BlockLoRA and of ED-LoRA on pictures of noise; nothing is written.
#[derive(clap::Args)]
pub struct Args {
    /// Steps to measure, after one to warm up
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..))]
    steps: u16,
    /// Pictures per step
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=1024))]
    batch_size: u16,
    /// Rank of the factors
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=1024))]
    rank: u16,
    /// A word that the model knows
    #[arg(long, default_value = "a")]
    class: String,
    /// Measure only this method
    #[arg(long, value_name = "ID")]
    method: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// What computes: cpu, or cuda or cuda:NUMBER in a program built with CUDA
    #[arg(long, value_name = "NAME", default_value = "cpu")]
    device: Wanted,
    #[command(flatten)]
    model: OwnModelArgs,
}

/// Runs the command.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let model = super::model::open(&args.model, args.device)?;
    let methods = args.method.as_deref().map_or(METHODS.to_vec(), |m| vec![m]);
    let mut results = serde_json::Map::new();
    let mut text = String::new();
    for name in methods {
        let mut settings = json!({
            "steps": usize::from(args.steps) + 1,
            "batch_size": args.batch_size,
            "rank": args.rank,
        });
        if methods::plugins().has_setting(PluginKind::Train, name, "partition")? {
            settings["partition"] = json!({"scheme": "contiguous", "capacity": 16, "seed": 0, "slot": 0});
        }
        let trainer = methods::plugins().trainer(name, &settings)?;
        let result = bench_step(&model, trainer.as_ref(), &args.class, usize::from(args.batch_size))?;
        text += &format!(
            "{name}: {:.1} ms a step of {} pictures ({:.1} to {:.1} ms over {} steps), {} trained numbers, peak memory \
             {:.0} MiB\n",
            result.step_ms,
            result.batch_size,
            result.step_ms_range[0],
            result.step_ms_range[1],
            result.steps,
            result.parameters,
            result.peak_resident_bytes as f64 / f64::from(1 << 20)
        );
        results.insert(name.to_owned(), serde_json::to_value(result)?);
    }
    if args.json {
        return output::print_json(&results);
    }
    output::print(&text)?;
    Ok(())
}
