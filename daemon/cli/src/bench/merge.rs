//! `blocklora bench merge`: a merge of many adapters against a copy of the same bytes.

use std::num::NonZeroUsize;

use blocklora_engine::bench::{self, Shape};
use blocklora_engine::device::{self, Wanted};

use crate::args::Precision;
use crate::output;

/// Measure merging on random weights of a real model's shapes
///
/// Merges random adapters in slots of their own, in turns with a plain copy of the rows that a merge writes; swaps one
/// adapter for another, and takes all out again, comparing bits. Times are medians.
#[derive(clap::Args)]
pub struct Args {
    /// Whose shapes: sd15 (the attention of Stable Diffusion 1.5's UNet and text encoder)
    #[arg(long, default_value = "sd15")]
    shape: Shape,
    /// Adapters to merge, at most the capacity
    #[arg(long, value_name = "N", default_value_t = 15)]
    adapters: usize,
    /// Rank of the factors
    #[arg(long, value_name = "N", default_value_t = 4)]
    rank: usize,
    /// Slots of the partition
    #[arg(long, value_name = "N", default_value_t = 16)]
    capacity: u32,
    /// Storage type of the weights
    #[arg(long, value_enum, default_value = "f32")]
    precision: Precision,
    /// Where the live weights are: cpu, or cuda or cuda:NUMBER in a program built with CUDA
    #[arg(long, value_name = "NAME", default_value = "cpu")]
    device: Wanted,
    /// How often to measure
    #[arg(long, value_name = "N", default_value_t = 9)]
    repeats: usize,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: &Args, threads: Option<NonZeroUsize>) -> anyhow::Result<()> {
    let threads = threads.or_else(|| std::thread::available_parallelism().ok()).map_or(1, NonZeroUsize::get);
    let precision = args.precision.into();
    let figures = {
        let device = device::choose(args.device)?.device;
        bench::merge(args.shape, args.adapters, args.rank, args.capacity, precision, &device, threads, args.repeats)?
    };
    if args.json {
        return output::print_json(&figures);
    }
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let mut text = format!(
        "{} adapters of rank {} on {:.0} MiB of weights, {} threads, {}\n\
         merge      {:.1} ms ({:.0} MiB written), {:.2} times a copy of the same rows ({:.1} ms)\n\
         swap one   {:.1} ms, {:.3} of a merge\n\
         remove all {:.1} ms, {}\n",
        figures.adapters,
        figures.rank,
        mib(figures.model_bytes),
        figures.threads,
        figures.kernel,
        figures.merge_ms,
        mib(figures.bytes_written),
        figures.merge_over_copy,
        figures.copy_ms,
        figures.swap_one_ms,
        figures.swap_over_merge,
        figures.remove_all_ms,
        if figures.remove_all_exact { "the file's bits are back" } else { "THE FILE'S BITS ARE NOT BACK" },
    );
    if let Some(same) = figures.same_as_cpu {
        text +=
            if same { "bits       as merged in main memory\n" } else { "bits       NOT AS MERGED IN MAIN MEMORY\n" };
    }
    if let (Some(bytes), Some(share)) = (figures.peak_bytes_over_model, figures.peak_over_model) {
        text += &format!("memory     {:.1} MiB over the model at the peak, {:.1} %\n", mib(bytes), 100.0 * share);
    }
    output::print(&text)?;
    Ok(())
}
