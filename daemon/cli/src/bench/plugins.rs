//! `blocklora bench plugins`: what the way through the plugin host costs.

use std::num::NonZeroUsize;

use blocklora_engine::bench::{self, BenchSampler, Shape};
use blocklora_sdk::manifest::PluginKind;
use blocklora_service::plugins::{Isolation, Options, Plugins};
use serde::Serialize;
use serde_json::Value;

use crate::output;
use crate::table::Table;

/// Measure what plugins cost beyond the work itself
///
/// Merges adapters through a merge strategy's library, in turns with the same plan applied inside the engine; and runs
/// samplers on a denoiser that costs nothing, in this process and in a worker process. Times are medians.
#[derive(clap::Args)]
pub struct Args {
    /// The merge strategy
    #[arg(long, value_name = "ID", default_value = "blocklora")]
    strategy: String,
    /// Whose shapes: sd15 (the attention of Stable Diffusion 1.5's UNet and text encoder)
    #[arg(long, default_value = "sd15")]
    shape: Shape,
    /// Adapters to merge
    #[arg(long, value_name = "N", default_value_t = 15)]
    adapters: usize,
    /// Rank of the factors
    #[arg(long, value_name = "N", default_value_t = 4)]
    rank: usize,
    /// How often to merge
    #[arg(long, value_name = "N", default_value_t = 101)]
    repeats: usize,
    /// Measure only this sampler; may be given many times [default: all that are installed]
    #[arg(long, value_name = "ID")]
    sampler: Vec<String>,
    /// Side of the latents, which have 4 channels
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..=1024))]
    latents: u16,
    /// Sampling steps
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..=1000))]
    steps: u16,
    /// How often to sample
    #[arg(long, value_name = "N", default_value_t = 21)]
    runs: usize,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// A sampler in this process and in a worker.
#[derive(Serialize)]
struct Sampler {
    in_process: BenchSampler,
    worker: BenchSampler,
}

/// Runs the command.
pub fn run(args: &Args, threads: Option<NonZeroUsize>) -> anyhow::Result<()> {
    let threads = threads.or_else(|| std::thread::available_parallelism().ok()).map_or(1, NonZeroUsize::get);
    let host = |isolation| Plugins::new(Options { isolation, ..Options::default() });
    let (in_process, worker) = (host(Isolation::InProcess), host(Isolation::Worker));
    let mut merges = Vec::new();
    for host in [&in_process, &worker] {
        let strategy = host.strategy(&args.strategy, &Value::Null)?;
        merges.push(bench::strategy(strategy, args.shape, args.adapters, args.rank, threads, args.repeats)?);
    }
    let mut ids = args.sampler.clone();
    if ids.is_empty() {
        let found = in_process.list().0.into_iter().map(|entry| entry.found.manifest);
        ids = found.filter(|manifest| manifest.kind == PluginKind::Sample).map(|manifest| manifest.id).collect();
    }
    let (side, steps) = (usize::from(args.latents), usize::from(args.steps));
    let measure = |host: &Plugins, id: &str| -> anyhow::Result<BenchSampler> {
        let sampler = host.sampler(id, &Value::Null)?;
        Ok(bench::sampler(sampler.as_ref(), [1, 4, side, side], steps, args.runs)?)
    };
    let mut samplers = Vec::new();
    for id in &ids {
        samplers.push(Sampler { in_process: measure(&in_process, id)?, worker: measure(&worker, id)? });
    }
    if args.json {
        let [in_process, worker] = &merges[..] else { return Ok(()) };
        let merge = serde_json::json!({ "in_process": in_process, "worker": worker });
        return output::print_json(&serde_json::json!({ "merge": merge, "samplers": samplers }));
    }
    let title = format!("{} adapters by {}, {threads} threads", args.adapters, args.strategy);
    let mut text = Table::new([&title, "engine's plan ms", "plugin ms", "ratio", "difference ms", "planning ms"]);
    for (name, merge) in ["in-process", "worker"].iter().zip(&merges) {
        let numbers = [merge.planned_ms, merge.merge_ms, merge.merge_over_planned, merge.difference_ms, merge.plan_ms];
        text.row(std::iter::once((*name).to_owned()).chain(numbers.map(|number| format!("{number:.3}"))));
        anyhow::ensure!(merge.same_weights, "{name}: the plugin's merge and the engine's differ");
    }
    let title = format!("samplers, 4 x {side} x {side}");
    let mut steps = Table::new([&title, "predictions a step", "added a step, ms", "added in a worker, ms"]);
    for Sampler { in_process, worker } in &samplers {
        steps.row([
            in_process.sampler.clone(),
            format!("{:.2}", in_process.predictions_per_step),
            format!("{:.3}", in_process.added_ms),
            format!("{:.3}", worker.added_ms),
        ]);
    }
    output::print(&format!("{text}\n{steps}"))?;
    Ok(())
}
