//! `blocklora import`: another tool's LoRA as a concept.

use std::path::{Path, PathBuf};

use blocklora_engine::model::{Component, Model};
use blocklora_engine::weights::hex;
use blocklora_spec::import::{self, Imported, Module, Options, Origin, Target, Unmatched, Word};
use blocklora_spec::{Base, Format, Storage};
use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::args::{KindArg, Precision, StorageArg};
use crate::output::{self, OutputFile};
use crate::{base, session};

/// Make a concept of a LoRA that another tool wrote
///
/// Reads kohya's, diffusers' and PEFT's LoRA in safetensors files, for the Linears of the base model, and writes an
/// adapter with exactly their change. It owns every row. Keys that cannot be applied are errors.
///
/// A prompt's <NAME> stands for the words that are imported along; without any it stands for nothing: name the concept
/// in the words that it was trained with.
#[derive(clap::Args)]
pub struct Args {
    /// The LoRA or textual inversion, a .safetensors file; or a folder that PEFT wrote
    #[arg(value_name = "FILE_OR_FOLDER")]
    source: PathBuf,
    /// The adapter file to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// What to call it: a prompt names it as <NAME> [default: the file's title, or else its name]
    #[arg(long)]
    name: Option<String>,
    /// The word for what it is: man, dog, house, painting [default: the kind]
    #[arg(long, value_name = "WORD")]
    class: Option<String>,
    /// What kind of thing it is
    #[arg(long, value_enum, default_value = "subject")]
    kind: KindArg,
    /// A textual inversion that <NAME> is to stand for; may be given many times, and they follow each other
    #[arg(long, value_name = "FILE")]
    words: Vec<PathBuf>,
    /// Leave out keys that cannot be applied, and list them
    #[arg(long)]
    allow_unmatched: bool,
    /// Type of the numbers in the file [default: that of the LoRA where it is exact, else f32]
    #[arg(long, value_enum)]
    storage: Option<StorageArg>,
    /// The licence to state in the file, e.g. CC-BY-4.0 [default: the LoRA's, where it states one]
    #[arg(long)]
    licence: Option<String>,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
    /// Folder of the base model in the diffusers layout, which it was trained on or is close to [default:
    /// $BLOCKLORA_MODEL, or the bundled starter model]
    #[arg(long, value_name = "DIR", help_heading = "Model")]
    base: Option<PathBuf>,
}

#[derive(Serialize)]
struct Json<'a> {
    file: &'a Path,
    digest: &'a str,
    name: &'a str,
    format: Format,
    layers: usize,
    rank: usize,
    alpha: f32,
    storage: &'a str,
    words: &'a [Word],
    trigger_phrase: Option<&'a str>,
    unmatched: &'a [Unmatched],
    sources: &'a [Origin],
}

/// Runs the command.
pub fn run(args: &Args) -> anyhow::Result<()> {
    for input in args.words.iter().chain(&files_in(&args.source)) {
        output::not_the_same(input, &args.output)?;
    }
    let output = OutputFile::create(&args.output)?;
    let folder = base::folder(args.base.as_deref())?;
    let model = session::load_model(&folder, Precision::F32.into())?;
    let options = Options {
        name: args.name.clone(),
        kind: args.kind.into(),
        class_word: args.class.clone(),
        licence: args.licence.clone(),
        words: args.words.clone(),
        allow_unmatched: args.allow_unmatched,
        storage: args.storage.map(Storage::from),
    };
    let imported = import::import(&args.source, &target(&model)?, &options)?;
    let bytes = imported.builder.to_bytes(&args.output)?;
    output.write(&bytes)?;
    report(args, &imported, &hex(&Sha256::digest(&bytes)))
}

/// What may be read of `source`: a file, or those of a folder's that are called as PEFT and diffusers call them.
fn files_in(source: &Path) -> Vec<PathBuf> {
    const NAMES: [&str; 3] = ["adapter_model.safetensors", "adapter_config.json", "pytorch_lora_weights.safetensors"];
    if !source.is_dir() {
        return vec![source.to_path_buf()];
    }
    let entries = source.read_dir().into_iter().flatten().flatten().map(|entry| entry.path());
    let folders = entries.filter(|path| path.is_dir()).chain([source.to_path_buf()]);
    folders.flat_map(|folder| NAMES.map(|name| folder.join(name))).collect()
}

impl From<StorageArg> for Storage {
    fn from(storage: StorageArg) -> Self {
        match storage {
            StorageArg::F32 => Self::F32,
            StorageArg::F16 => Self::F16,
        }
    }
}

/// What a LoRA may find in `model`: all its modules with weights, whether or not adapters may change them.
fn target(model: &Model) -> anyhow::Result<Target> {
    let mut modules = Vec::new();
    for component in [Component::UNet, Component::TextEncoder] {
        let file = model.weight_file(component);
        for tensor in file.names() {
            let Some(path) = tensor.strip_suffix(".weight") else { continue };
            let name = format!("{}.{path}", component.folder());
            let adaptable = model.layer(&name).is_some();
            modules.push(Module { name, shape: file.view(tensor)?.shape().to_vec(), adaptable });
        }
    }
    Ok(Target {
        base: Base { architecture: model.architecture(), digest: model.digest().to_owned() },
        modules,
        token_width: model.text_encoder().config().hidden_size,
    })
}

fn report(args: &Args, imported: &Imported, digest: &str) -> anyhow::Result<()> {
    let Imported { manifest, format, layers, storage, words, trigger_phrase, unmatched, origins, .. } = imported;
    if args.json {
        return output::print_json(&Json {
            file: &args.output,
            digest,
            name: &manifest.name,
            format: *format,
            layers: *layers,
            rank: manifest.rank,
            alpha: manifest.alpha,
            storage: storage.name(),
            words,
            trigger_phrase: trigger_phrase.as_deref(),
            unmatched,
            sources: origins,
        });
    }
    let name = &manifest.name;
    let mut text = format!(
        "{}: <{name}>, from {format}, {layers} layers of rank {}, {} words\n",
        args.output.display(),
        manifest.rank,
        manifest.tokens.len()
    );
    if !words.is_empty() {
        let called: Vec<String> = words.iter().map(|word| format!("{:?}", word.name)).collect();
        text += &format!("<{name}> stands for {}\n", called.join(", then "));
    }
    if let Some(phrase) = trigger_phrase {
        text += &format!("its file asks for these words in a prompt: {phrase:?}\n");
    }
    for Unmatched { key, reason } in unmatched {
        text += &format!("left out {key:?}: {reason}\n");
    }
    Ok(output::print(&text)?)
}
