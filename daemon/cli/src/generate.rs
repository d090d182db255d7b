//! `blocklora generate`: draw a prompt.

use std::path::{Path, PathBuf};

use blocklora_client::{CancelMode, Generate, Generated, ResultFile};

use crate::args::{ModelArgs, SetArgs, Size, WeightedFile};
use crate::daemon::{self, choose_model, watch};
use crate::like::{self, Recipe};
use crate::output::{self, OutputFile};
use crate::set::{self, Members};
use crate::settings::{self, Setting};
use crate::terminal::{Preview, Screen};

/// Draw a prompt, with any number of concepts merged into the model
///
/// The prompt names a concept in angle brackets: "<milo> and <zuko> on the beach". Concepts of the library need no --with.
/// Every PNG holds the settings that made it; the same settings give the same picture, and `--like` draws it again from
/// them.
#[derive(clap::Args)]
pub struct Args {
    /// What to draw
    #[arg(required_unless_present = "like")]
    prompt: Option<String>,
    /// An adapter to merge, a file or a name of the library, and how strongly (1 is as trained); may be given many times
    #[arg(long, value_name = "FILE[=WEIGHT]")]
    with: Vec<WeightedFile>,
    /// Draw as this picture was drawn; what other options say counts more. Adapters are looked for by their digests in
    /// --with, beside the picture, in the current folder, among the bundled ones and in the library
    #[arg(long, value_name = "IMAGE.png")]
    like: Option<PathBuf>,
    /// What to steer away from
    #[arg(long, value_name = "PROMPT")]
    negative: Option<String>,
    /// Pictures to draw; picture i has the seed SEED + i
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1000))]
    count: u16,
    /// The PNG file to write; with --count N > 1, FILE-1.png to FILE-N.png
    #[arg(short, long, value_name = "FILE.png")]
    output: PathBuf,
    /// How to show pictures on the terminal, in progress and done
    #[arg(long, value_enum, default_value = "auto", value_name = "HOW")]
    preview: Preview,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
    /// Seed of the first picture [default: 0]
    #[arg(long, value_name = "N", help_heading = "Sampling")]
    seed: Option<u64>,
    /// Sampling steps [default: 20]
    #[arg(long, value_name = "N", help_heading = "Sampling", value_parser = clap::value_parser!(u16).range(1..=1000))]
    steps: Option<u16>,
    /// How closely to follow the prompt; 1 is no guidance [default: the model's own, usually 7.5]
    #[arg(long, value_name = "SCALE", help_heading = "Sampling", allow_negative_numbers = true)]
    guidance: Option<f32>,
    /// ddim, dpmpp-2m, dpmpp-2m-karras, euler-a, or another sampler of `blocklora plugin list` [default: dpmpp-2m]
    #[arg(long, value_name = "NAME", help_heading = "Sampling")]
    sampler: Option<String>,
    /// A setting of the sampler, such as eta=0.5; may be given many times
    #[arg(long = "sampler-set", value_name = "KEY=VALUE", help_heading = "Sampling")]
    sampler_settings: Vec<Setting>,
    /// Size in pixels: one number, or WIDTHxHEIGHT [default: the model's own]
    #[arg(long, help_heading = "Sampling")]
    size: Option<Size>,
    #[command(flatten)]
    set: SetArgs,
    #[command(flatten)]
    model: ModelArgs,
}

#[derive(serde::Serialize)]
struct Json<'a> {
    files: &'a [PathBuf],
    artefacts: &'a [PathBuf],
    #[serde(flatten)]
    generated: &'a Generated,
}

/// Runs the command.
pub fn run(args: &Args, options: &daemon::Options) -> anyhow::Result<()> {
    let paths = numbered(&args.output, args.count);
    for path in &paths {
        args.with.iter().try_for_each(|with| output::not_the_same(&with.path, path))?;
    }
    let files = paths.iter().map(|p| OutputFile::create(p)).collect::<anyhow::Result<Vec<_>>>()?;
    let recipe = args.like.as_deref().map(|picture| like::read(picture, &args.with)).transpose()?;
    let with = recipe.as_ref().map_or(&args.with, |recipe| &recipe.with);
    let concepts = set::check_files(with)?;
    let request = request(args, recipe.as_ref())?;
    let state = set::state_for(with, &concepts, &prompts(&request));
    let (generated, mut pictures) = daemon::run(draw(args, (options, state), recipe.as_ref(), with, request))?;
    let artefacts = output::artefacts(&args.output, &mut pictures)?;
    output::write_all(files.into_iter().zip(pictures.into_iter().map(|file| file.bytes)).collect())?;
    if args.json {
        return output::print_json(&Json { files: &paths, artefacts: &artefacts, generated: &generated });
    }
    Ok(())
}

/// The request that `args` make, on top of how another picture was drawn.
fn request(args: &Args, recipe: Option<&Recipe>) -> anyhow::Result<Generate> {
    let mut request =
        Generate { count: Some(u32::from(args.count)), formats: vec!["png".into()], ..Generate::default() };
    if let Some(recipe) = recipe {
        recipe.apply(&mut request);
    }
    let (strategy, strategy_config) = set::strategy(&args.set)?;
    if strategy.is_some() {
        request.strategy = strategy;
        request.strategy_config.clear();
    }
    request.strategy_config.extend(strategy_config);
    if let Some(prompt) = &args.prompt {
        request.prompt.clone_from(prompt);
    }
    if let Some(Size { width, height }) = args.size {
        (request.width, request.height) = (Some(width), Some(height));
    }
    request.negative_prompt = args.negative.clone().or(request.negative_prompt);
    request.seed = args.seed.or(request.seed);
    request.steps = args.steps.map(u32::from).or(request.steps);
    request.guidance_scale = args.guidance.map(f64::from).or(request.guidance_scale);
    if let Some(name) = &args.sampler {
        // The settings of a picture's own sampler say nothing about another.
        request.sampler = Some(name.clone());
        request.sampler_config.clear();
    }
    request.sampler_config.extend(settings::read(None, &args.sampler_settings)?);
    Ok(request)
}

/// Both prompts, for the concepts that they name.
fn prompts(request: &Generate) -> String {
    format!("{} {}", request.prompt, request.negative_prompt.as_deref().unwrap_or_default())
}

async fn draw(
    args: &Args,
    (options, state): (&daemon::Options, daemon::State),
    recipe: Option<&Recipe>,
    with: &[WeightedFile],
    mut request: Generate,
) -> anyhow::Result<(Generated, Vec<ResultFile>)> {
    let daemon = daemon::connect(options, state).await?;
    let wanted = recipe.map(Recipe::precision);
    let model_args = ModelArgs { precision: args.model.precision.or(wanted), ..args.model.clone() };
    let model = choose_model(&daemon, &model_args).await?;
    if let Some(recipe) = recipe {
        recipe.check_model(&model)?;
    }
    let mut members = Members::new(&daemon, &model, with).await?;
    members.check_model(&model)?;
    members.add_named(&daemon, &model, &prompts(&request)).await?;
    request.target = Some(model.model.path().clone().into());
    request.precision = model_args.precision_name();
    request.adapters = members.entries();
    let job = daemon.client.generate(&request).await?;
    let mut screen = Screen::open(args.preview);
    let steps = request.steps.unwrap_or(20) as usize * usize::from(args.count);
    let look = watch::Look { label: "drawing", steps, screen: screen.as_mut(), on_interrupt: CancelMode::Discard };
    let generated = watch::follow(&job, look).await?;
    let mut pictures = job.take_results(false).await?;
    pictures.sort_by_key(|picture| picture.index);
    let mut given = pictures.iter().filter(|file| !file.is_artefact());
    let (number, last) = (given.clone().count(), given.next_back());
    anyhow::ensure!(number == usize::from(args.count), "the daemon gave {number} pictures");
    if let (Some(screen), Some(last)) = (&mut screen, last) {
        screen.show(&last.bytes);
    }
    daemon.close().await;
    Ok((generated, pictures))
}

/// `path`, or `path` with -1 to -count before its extension.
fn numbered(path: &Path, count: u16) -> Vec<PathBuf> {
    if count == 1 {
        return vec![path.to_path_buf()];
    }
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let extension = path.extension().map(|e| format!(".{}", e.to_string_lossy())).unwrap_or_default();
    (1..=count).map(|i| path.with_file_name(format!("{stem}-{i}{extension}"))).collect()
}
