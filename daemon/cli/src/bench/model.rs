//! `blocklora bench unet`, `vae`, `text`: the parts of a model; `sample`: a picture; `start`: until the first step.

use std::sync::OnceLock;
use std::time::Instant;

use anyhow::Context;
use blocklora_engine::Error;
use blocklora_engine::bench::{self, BenchModel};
use blocklora_engine::device::{self, Wanted};
use blocklora_engine::generate::{GenerateRequest, generate};
use blocklora_engine::model::Model;
use blocklora_engine::sample::{Denoiser, Sampler};

use crate::args::{OwnModelArgs, Precision};
use crate::{base, output};

/// What to measure, and how often
#[derive(clap::Args)]
pub struct Args {
    /// Samples in a batch
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    batch: u16,
    /// How often to measure, after once to warm up
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=10000))]
    repeats: u16,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// What computes: cpu, or cuda or cuda:NUMBER in a program built with CUDA
    #[arg(long, value_name = "NAME", default_value = "cpu")]
    device: Wanted,
    #[command(flatten)]
    model: OwnModelArgs,
}

/// The same, for what has latents
#[derive(clap::Args)]
pub struct SizedArgs {
    /// Side of the latents [default: the model's own]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    latents: Option<u16>,
    #[command(flatten)]
    usual: Args,
}

/// The same, for a training step
#[derive(clap::Args)]
pub struct GradientsArgs {
    /// Compute the UNet's activations again rather than keep them
    #[arg(long)]
    checkpointing: bool,
    #[command(flatten)]
    sized: SizedArgs,
}

/// The model that `args` names on `device`.
pub(super) fn open(args: &OwnModelArgs, device: Wanted) -> anyhow::Result<Model> {
    // Without a progress bar: it would be part of what is measured.
    let folder = base::folder(args.base.as_deref())?;
    Ok(Model::load(&folder, &device::choose(device)?.device, args.precision.into())?)
}

/// Rank of the factors whose gradients are measured.
const RANK: usize = 4;

/// Measures one prediction.
pub fn unet(args: &SizedArgs) -> anyhow::Result<()> {
    measure(&args.usual, |model, batch, repeats| bench::unet(model, batch, args.size(), repeats))
}

/// Measures decoding.
pub fn vae(args: &SizedArgs) -> anyhow::Result<()> {
    measure(&args.usual, |model, batch, repeats| bench::vae(model, batch, args.size(), repeats))
}

/// Measures encoding prompts.
pub fn text(args: &Args) -> anyhow::Result<()> {
    measure(args, bench::text)
}

/// Measures a training step.
pub fn gradients(args: &GradientsArgs) -> anyhow::Result<()> {
    let GradientsArgs { checkpointing, sized } = args;
    let step = |model: &_, batch, repeats| bench::step(model, batch, sized.size(), RANK, *checkpointing, repeats);
    measure(&sized.usual, step)
}

impl SizedArgs {
    fn size(&self) -> Option<usize> {
        self.latents.map(usize::from)
    }
}

/// Loads the model and prints what `figures` measures of it, with a batch and so many times.
fn measure(
    args: &Args,
    figures: impl FnOnce(&Model, usize, usize) -> blocklora_engine::Result<BenchModel>,
) -> anyhow::Result<()> {
    let model = open(&args.model, args.device)?;
    let figures = figures(&model, usize::from(args.batch), usize::from(args.repeats))?;
    if args.json {
        return output::print_json(&figures);
    }
    let BenchModel { cost, .. } = figures;
    let peak = cost.peak_resident_bytes.unwrap_or(0) as f64 / f64::from(1 << 20);
    output::print(&format!(
        "{:.1} ms ({:.1} ms of processor time), {} page faults, peak memory {peak:.0} MiB\n",
        cost.wall_ms, cost.cpu_ms, cost.page_faults
    ))?;
    Ok(())
}

/// Measure the time and the peak memory of a picture
#[derive(clap::Args)]
pub struct SampleArgs {
    /// Sampling steps
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=1000))]
    steps: u16,
    #[command(flatten)]
    start: StartArgs,
}

/// Measure the time from the start of the process to the end of the first denoising step
#[derive(clap::Args)]
pub struct StartArgs {
    /// Side of the picture in pixels [default: the model's own]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(8..=8192))]
    size: Option<u16>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// What computes: cpu, or cuda or cuda:NUMBER in a program built with CUDA
    #[arg(long, value_name = "NAME", default_value = "cpu")]
    device: Wanted,
    #[command(flatten)]
    model: OwnModelArgs,
}

/// Deterministic DDIM at evenly spaced timesteps, which notes when its first step begins.
struct Clocked {
    start: Instant,
    first_step: OnceLock<f64>,
}

impl Sampler for Clocked {
    fn id(&self) -> &'static str {
        "bench"
    }

    fn sample(&self, denoiser: &mut dyn Denoiser, z: &mut [f32], steps: usize) -> blocklora_engine::Result<()> {
        self.first_step.get_or_init(|| self.start.elapsed().as_secs_f64());
        let schedule = denoiser.schedule().clone();
        let stride = schedule.num_train_timesteps() / steps;
        let timesteps: Vec<usize> = (0..steps).rev().map(|i| i * stride).collect();
        let mut eps = vec![0.0; z.len()];
        for (step, &t) in timesteps.iter().enumerate() {
            let (alpha, sigma) = schedule.alpha_sigma(t);
            let next = timesteps.get(step + 1).map_or((1.0, 0.0), |&t| schedule.alpha_sigma(t));
            denoiser.predict(z, t as f32, &mut eps)?;
            z.iter_mut().zip(&eps).for_each(|(z, eps)| *z = next.0 * ((*z - sigma * eps) / alpha) + next.1 * eps);
            denoiser.step_done(step, steps, z)?;
        }
        Ok(())
    }
}

/// Loads the model and draws a picture under guidance.
pub fn sample(args: &SampleArgs) -> anyhow::Result<()> {
    draw(&args.start, Some(args.steps))
}

/// Loads the model and draws a picture's first step under guidance.
pub fn start(args: &StartArgs) -> anyhow::Result<()> {
    draw(args, None)
}

/// Loads the model and draws a picture of so many steps; of none, it stops behind the first one.
fn draw(args: &StartArgs, steps: Option<u16>) -> anyhow::Result<()> {
    let only_start = steps.is_none();
    let start = Instant::now();
    let model = open(&args.model, args.device)?;
    let loaded = start.elapsed().as_secs_f64();
    let (_, height, width) = model.latent_shape();
    let own = (width * model.vae().downscale(), height * model.vae().downscale());
    let (width, height) = args.size.map_or(own, |size| (size.into(), size.into()));
    let sampler = Clocked { start, first_step: OnceLock::new() };
    let mut first_step = None;
    let request = GenerateRequest {
        prompt: "a",
        negative_prompt: "",
        concepts: &[],
        steps: steps.map_or(1, usize::from),
        guidance_scale: 7.5,
        sampler: &sampler,
        seed: 0,
        width,
        height,
        count: 1,
    };
    let mut progress = |step: blocklora_engine::generate::Step| {
        first_step.get_or_insert(start.elapsed().as_secs_f64());
        if only_start && step.step == 0 { Err(Error::Cancelled) } else { Ok(()) }
    };
    match generate(&model, &request, &mut progress) {
        Err(Error::Cancelled) if only_start => {}
        other => drop(other?),
    }
    let figures = serde_json::json!({
        "seconds_to_loaded": loaded,
        "seconds_to_first_step_begun": sampler.first_step.get(),
        "seconds_to_first_step_done": first_step.context("no step was done")?,
        "seconds": start.elapsed().as_secs_f64(),
        "cpu_seconds": bench::cpu_time().as_secs_f64(),
        "width": width,
        "height": height,
        "steps": request.steps,
        "peak_resident_bytes": bench::peak_resident_bytes(),
    });
    if args.json {
        return output::print_json(&figures);
    }
    output::print(&format!("{figures:#}\n"))?;
    Ok(())
}

/// Write a folder with random weights of a known model's shapes, to measure on
#[derive(clap::Args)]
pub struct ModelFolderArgs {
    /// Whose shapes: sd15
    #[arg(long, default_value = "sd15")]
    shape: bench::Shape,
    /// Storage type of the weights
    #[arg(long, value_enum, default_value = "f32")]
    precision: Precision,
    /// The folder to write, which must not exist yet
    #[arg(short, long, value_name = "DIR")]
    output: std::path::PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Writes the folder.
pub fn write_folder(args: &ModelFolderArgs) -> anyhow::Result<()> {
    bench::write_random_model(args.shape, args.precision.into(), &args.output)?;
    if args.json {
        return output::print_json(&serde_json::json!({ "folder": args.output }));
    }
    Ok(output::print(&format!("{}: a model with random weights\n", args.output.display()))?)
}
