//! Arguments that several commands share.

use std::num::IntErrorKind;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, bail};
use blocklora_spec::Kind;
use clap::{Args, ValueEnum};

use crate::settings::Setting;
use crate::words;

/// Storage type of the weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Precision {
    /// 32 bits: exact, the default on a CPU
    F32,
    /// 16 bits: half the memory
    F16,
    /// 16 bits with the range of 32
    Bf16,
}

impl Precision {
    /// Its name in the daemon's interface.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }
}

/// A concept's kind as people write it.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum KindArg {
    /// A thing or an animal
    Subject,
    /// A person or a character
    Person,
    /// A place
    Scene,
    /// A manner of drawing
    Style,
}

impl From<KindArg> for Kind {
    fn from(kind: KindArg) -> Self {
        match kind {
            KindArg::Subject => Self::Subject,
            KindArg::Person => Self::Person,
            KindArg::Scene => Self::Scene,
            KindArg::Style => Self::Style,
        }
    }
}

/// A storage type as people write it.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum StorageArg {
    /// 32 bits, as trained
    F32,
    /// 16 bits: half the size, rounded
    F16,
}

impl StorageArg {
    /// Its name in the daemon's interface.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
        }
    }
}

/// How adapters add up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Strategy {
    /// BlockLoRA: every row is divided by the number of concepts that own it
    Blocklora,
    /// BlockLoRA by the letter: weights are divided by their sum
    BlockloraSum1,
    /// The weighted average of all concepts
    Average,
}

/// What to do with concepts that own the same rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Clash {
    /// Stop and name them
    Refuse,
    /// Use the mean on shared rows
    Mean,
}

/// Which model, and how a daemon is to hold it.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Model")]
pub struct ModelArgs {
    /// Folder of the base model in the diffusers layout [default: $BLOCKLORA_MODEL, else that of a daemon that runs, else
    /// the bundled starter model]
    #[arg(long, value_name = "DIR")]
    pub base: Option<PathBuf>,
    /// Storage type of the weights [default: the daemon's]
    #[arg(long, value_enum)]
    pub precision: Option<Precision>,
}

impl ModelArgs {
    /// The precision as a job takes it; none: the daemon's.
    pub fn precision_name(&self) -> Option<String> {
        self.precision.map(|precision| precision.name().to_owned())
    }
}

/// Which model, and how this process is to hold it.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Model")]
pub struct OwnModelArgs {
    /// Folder of the base model in the diffusers layout [default: $BLOCKLORA_MODEL, or the bundled starter model]
    #[arg(long, value_name = "DIR")]
    pub base: Option<PathBuf>,
    /// Storage type of the weights
    #[arg(long, value_enum, default_value = "f32")]
    pub precision: Precision,
}

/// How to merge.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Merging")]
pub struct MergeArgs {
    /// How concepts add up
    #[arg(long, value_enum, default_value = "blocklora")]
    pub strategy: Strategy,
    /// What to do with concepts that own the same rows
    #[arg(long, value_enum, default_value = "refuse")]
    pub on_clash: Clash,
}

/// How a daemon merges.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Merging")]
pub struct SetArgs {
    /// How concepts add up: blocklora, blocklora-sum1, average, or another strategy of `blocklora plugin list`
    /// [default: the daemon's, usually blocklora]
    #[arg(long, value_name = "NAME")]
    pub strategy: Option<String>,
    /// What to do with concepts that own the same rows
    #[arg(long, value_enum, default_value = "refuse")]
    pub on_clash: Clash,
    /// A file of the strategy's settings, TOML; `blocklora plugin info merge-NAME` explains them
    #[arg(long, value_name = "FILE.toml")]
    pub merge_config: Option<PathBuf>,
    /// A setting of the strategy, such as lambda=0.4; may be given many times, and counts more than the file
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub merge_settings: Vec<Setting>,
}

/// How to sample.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingArgs {
    /// Seed of the first picture
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Sampling steps
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub steps: u16,
    /// How closely to follow the prompt; 1 is no guidance [default: the model's own, usually 7.5]
    #[arg(long, value_name = "SCALE", allow_negative_numbers = true)]
    pub guidance: Option<f32>,
    /// ddim, dpmpp-2m, dpmpp-2m-karras, euler-a, or another sampler of `blocklora plugin list`
    #[arg(long, value_name = "NAME", default_value = "dpmpp-2m")]
    pub sampler: String,
    /// Size in pixels: one number, or WIDTHxHEIGHT [default: the model's own]
    #[arg(long)]
    pub size: Option<Size>,
}

/// A picture's size in pixels.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Size {
    /// Width.
    pub width: u32,
    /// Height.
    pub height: u32,
}

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |t: &str| {
            t.parse::<u32>().map_err(|error| match error.kind() {
                IntErrorKind::PosOverflow => format!("{t} pixels are too many"),
                _ => format!("{text:?} is not like 512 or 512x768"),
            })
        };
        let (width, height) = text.split_once('x').unwrap_or((text, text));
        Ok(Self { width: number(width)?, height: number(height)? })
    }
}

/// An adapter file and its weight: `FILE` or `FILE=WEIGHT`.
#[derive(Clone, Debug, PartialEq)]
pub struct WeightedFile {
    /// The file.
    pub path: PathBuf,
    /// 1 is "as trained".
    pub weight: f32,
}

impl WeightedFile {
    /// Whether it is a name or digest in the daemon's library rather than a file: it looks like no file name, and no
    /// file of that name is there.
    pub fn is_of_library(&self) -> bool {
        let looks_like_a_file = self.path.components().count() > 1 || self.path.extension().is_some();
        !looks_like_a_file && !self.path.exists()
    }
}

impl FromStr for WeightedFile {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // A file may have '=' in its name: an existing file wins, and only a number counts as a weight.
        if !Path::new(text).exists()
            && let Some((path, weight)) = text.rsplit_once('=')
        {
            let weight: f32 = weight.parse().map_err(|_| format!("{weight:?} is not a number"))?;
            if !weight.is_finite() {
                return Err(format!("the weight {weight} is not finite"));
            }
            return Ok(Self { path: path.into(), weight });
        }
        Ok(Self { path: text.into(), weight: 1.0 })
    }
}

/// The adapter files in `folder`, sorted, without those of words; an error if there is none.
pub fn adapters_in(folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let shown = folder.display();
    let mut files = Vec::new();
    for entry in folder.read_dir().with_context(|| format!("{shown}"))? {
        let path = entry.with_context(|| format!("{shown}"))?.path();
        let is_words = path.to_string_lossy().ends_with(words::ENDING);
        if path.extension().is_some_and(|e| e == "safetensors") && !is_words {
            files.push(path);
        }
    }
    files.sort();
    if files.is_empty() {
        bail!("{shown}: there is no adapter (.safetensors) in this folder: train some with `blocklora train`");
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::{Size, WeightedFile, adapters_in};

    #[test]
    fn files_of_words_are_no_adapters() {
        let folder = tempfile::tempdir().expect("a folder");
        for name in ["b.safetensors", "a.safetensors", "a.embedding.safetensors", "a.toml"] {
            std::fs::write(folder.path().join(name), "").expect("a file");
        }
        let found = adapters_in(folder.path()).expect("adapters");
        assert_eq!(found, ["a.safetensors", "b.safetensors"].map(|name| folder.path().join(name)));
    }

    #[test]
    fn weights_follow_the_last_equals_sign() {
        let parse = |t: &str| t.parse::<WeightedFile>();
        assert_eq!(parse("a.safetensors"), Ok(WeightedFile { path: "a.safetensors".into(), weight: 1.0 }));
        assert_eq!(parse("a=b.st=0.5"), Ok(WeightedFile { path: "a=b.st".into(), weight: 0.5 }));
        assert_eq!(parse("a.st=-1"), Ok(WeightedFile { path: "a.st".into(), weight: -1.0 }));
        assert!(parse("a.st=x").is_err() && parse("a.st=inf").is_err());
    }

    #[test]
    fn names_without_a_file_are_of_the_library() {
        let of_library = |t: &str| t.parse::<WeightedFile>().map(|w| w.is_of_library());
        assert_eq!(of_library("milo"), Ok(true));
        assert_eq!(of_library("milo=0.5"), Ok(true));
        assert_eq!(of_library("milo.safetensors"), Ok(false));
        assert_eq!(of_library("./milo"), Ok(false));
        assert_eq!(of_library("src"), Ok(false), "the tests run in a folder that has src");
    }

    #[test]
    fn a_size_is_one_number_or_two() {
        assert_eq!("512".parse(), Ok(Size { width: 512, height: 512 }));
        assert_eq!("512x768".parse(), Ok(Size { width: 512, height: 768 }));
        assert!("512x".parse::<Size>().is_err() && "-1".parse::<Size>().is_err());
        assert_eq!("512x5000000000".parse::<Size>(), Err("5000000000 pixels are too many".to_owned()));
    }
}
