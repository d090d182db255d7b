//! `blocklora bench step`: what a training step costs.

use blocklora_engine::train::{BlockLora, Concept, EdLora, TrainConfig, Trainer, bench_step};
use blocklora_spec::{Partition, Scheme};

use crate::args::ModelArgs;
use crate::output;
use crate::session;

type MakeTrainer = fn(Concept, TrainConfig) -> Box<dyn Trainer>;

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
    #[arg(long, value_enum)]
    method: Option<Method>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    model: ModelArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Method {
    /// A sixteenth of the rows, output erasure
    Blocklora,
    /// All rows
    EdLora,
}

/// Runs the command.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let model = session::open_model(&args.model)?;
    let mut config = TrainConfig {
        steps: usize::from(args.steps) + 1,
        batch_size: usize::from(args.batch_size),
        rank: usize::from(args.rank),
        ..TrainConfig::default()
    };
    let methods = args.method.map_or(vec![Method::Blocklora, Method::EdLora], |m| vec![m]);
    let mut results = serde_json::Map::new();
    let mut text = String::new();
    for method in methods {
        let (name, trainer): (_, MakeTrainer) = match method {
            Method::Blocklora => {
                config.partition = Some(Partition { scheme: Scheme::Contiguous, capacity: 16, seed: 0, slot: 0 });
                ("blocklora", |concept, config| Box::new(BlockLora { concept, config }))
            }
            Method::EdLora => {
                config.partition = None;
                ("ed-lora", |concept, config| Box::new(EdLora { concept, config }))
            }
        };
        let result = bench_step(&model, &trainer, &args.class, &config)?;
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
