//! LoRA files of other tools as adapters: kohya, diffusers, PEFT, and textual inversions as their words.
//!
//! Every key of a file is applied or named with the reason why not. Keys find their layers by the names of the base
//! model's own modules. The adapter owns every row of its layers, and its change is that of the file: alpha / r B A,
//! where a missing alpha is r, and an alpha counts wherever it stands.

mod diffusers;
mod factors;
mod file;
mod index;
mod kohya;
mod manifest;
mod peft;
mod recognise;
mod refused;
mod source;
mod words;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::adapter::TokenVectors;
use crate::builder::{AdapterBuilder, Layer};
use crate::dtype::Storage;
use crate::error::{Error, Result, shortened};
use crate::format::Format;
use crate::manifest::{Base, Kind, Manifest};
use factors::{Fitted, Found};
use file::File;
use index::{Index, Place};
use source::Source;

pub use recognise::Foreign;
pub(crate) use recognise::recognise;

/// A module of the base model that has a weight.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// Its path with its part in front: `unet.down_blocks.0...to_q`.
    pub name: String,
    /// Its weight's shape: [outputs, inputs] of a Linear.
    pub shape: Vec<usize>,
    /// Whether it is a Linear that adapters may change.
    pub adaptable: bool,
}

/// The model that the adapter is to be for.
#[derive(Clone, Debug)]
pub struct Target {
    /// What the manifest says of it.
    pub base: Base,
    /// All its modules, by whose names keys find their layers.
    pub modules: Vec<Module>,
    /// Elements of a word's vector.
    pub token_width: usize,
}

/// What the file does not say, or what is to be said instead.
#[derive(Clone, Debug)]
pub struct Options {
    /// What to call the concept; none: what the file says, or else its own name.
    pub name: Option<String>,
    /// What kind of thing it is.
    pub kind: Kind,
    /// The word for its class; none: the kind.
    pub class_word: Option<String>,
    /// Its licence; none: what the file says, if it does.
    pub licence: Option<String>,
    /// Textual inversions whose vectors, one file after the other, are what the name stands for in a prompt.
    pub words: Vec<PathBuf>,
    /// Leave out what cannot be applied, instead of failing.
    pub allow_unmatched: bool,
    /// How to store numbers; none: as the file does where that is exact, else as f32.
    pub storage: Option<Storage>,
}

/// A key that was not applied.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Unmatched {
    /// The key.
    pub key: String,
    /// Why.
    pub reason: String,
}

/// A textual inversion that became tokens.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Word {
    /// What its file calls it.
    pub name: String,
    /// How many tokens it became.
    pub vectors: usize,
}

/// A file that something was taken from.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Origin {
    /// The file's name.
    pub file: String,
    /// SHA-256 of the file, in lower-case hex.
    pub sha256: String,
}

/// An adapter that waits to be written, and what became of the file.
#[derive(Clone, Debug)]
pub struct Imported {
    /// The adapter.
    pub builder: AdapterBuilder,
    /// Its manifest, but for what the builder fills in.
    pub manifest: Manifest,
    /// The form of the file.
    pub format: Format,
    /// How many layers it changes.
    pub layers: usize,
    /// How its numbers will be stored.
    pub storage: Storage,
    /// The words that its name stands for, in this order.
    pub words: Vec<Word>,
    /// What the file says that prompts for it should have in them.
    pub trigger_phrase: Option<String>,
    /// The keys that were left out.
    pub unmatched: Vec<Unmatched>,
    /// The files that it was made from.
    pub origins: Vec<Origin>,
}

/// What a key of a LoRA file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Down,
    Up,
    Alpha,
}

/// The module that a key names.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Name {
    /// A path, with or without its part in front.
    Dotted(String),
    /// A part, and a path with underscores for dots.
    Flat(&'static str, String),
}

/// A key, understood.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Key {
    module: Name,
    role: Role,
    format: Format,
}

fn parse(key: &str) -> Option<Key> {
    kohya::parse(key).or_else(|| peft::parse(key)).or_else(|| diffusers::parse(key))
}

fn fail<T>(path: &Path, reason: impl Into<String>) -> Result<T> {
    Err(Error::Import { path: path.into(), reason: reason.into() })
}

/// Reads the file or PEFT folder `path` as an adapter for `target`. Nothing is written yet.
///
/// Fails where a key cannot be applied and `options` do not allow that, on factors that do not fit their layers, on
/// numbers that are not finite, and on what would be another change without the keys that have no counterpart (DoRA).
pub fn import(path: impl AsRef<Path>, target: &Target, options: &Options) -> Result<Imported> {
    let path = path.as_ref();
    let sources = source::open(path)?;
    let index = Index::new(&target.modules);
    let mut gathered = Gathered::default();
    for source in &sources {
        gathered.add(source, &index)?;
    }
    let words_files = options.words.iter().map(|path| File::open(path)).collect::<Result<Vec<_>>>()?;
    for file in &words_files {
        gathered.add_words(file);
    }
    let Gathered { layers, words, mut unmatched, format } = gathered;
    let found = factors::pair(layers, &mut unmatched)?;
    unmatched.sort_by(|a, b| a.key.cmp(&b.key));
    let Some(format) = format.filter(|_| !found.is_empty() || !words.is_empty()) else {
        return fail(path, nothing(&unmatched));
    };
    if !unmatched.is_empty() && !options.allow_unmatched {
        return Err(Error::Unmatched { path: path.into(), keys: unmatched });
    }
    let vectors = words::read(path, &words, target.token_width)?;
    let fitted = factors::fit(path, found)?;
    let storage = options.storage.unwrap_or(fitted.storage(&words));
    let metadata = sources.first().map(|source| &source.file.metadata);
    let files = || sources.iter().map(|source| &source.file).chain(&words_files);
    let manifest = manifest::of(path, target, options, &fitted, &words, format, metadata, files())?;
    let tokens = manifest::tokens(&manifest, vectors, target.token_width);
    check_storage(path, storage, &fitted, &tokens)?;
    let mut builder = AdapterBuilder::new(&manifest, storage);
    for layer in &fitted.layers {
        builder = builder.layer(Layer { name: &layer.name, outputs: layer.outputs, a: &layer.a, b: &layer.b });
    }
    builder = tokens.iter().fold(builder, |builder, token| builder.token(token));
    Ok(Imported {
        builder,
        manifest,
        format,
        layers: fitted.layers.len(),
        storage,
        words: words.iter().map(|word| Word { name: word.name.clone(), vectors: word.vectors() }).collect(),
        trigger_phrase: metadata.and_then(|m| m.get("modelspec.trigger_phrase")).map(|text| shortened(text)),
        unmatched,
        origins: files().map(File::origin).collect(),
    })
}

/// Fails on a number that the storage type would make infinite.
fn check_storage(path: &Path, storage: Storage, fitted: &Fitted, tokens: &[TokenVectors]) -> Result<()> {
    let is_lost = |x: f32| match storage {
        Storage::F32 => false,
        Storage::F16 => half::f16::from_f32(x).is_infinite(),
        Storage::BF16 => half::bf16::from_f32(x).is_infinite(),
    };
    let layers = fitted.layers.iter().flat_map(|l| [(&l.name, &l.a), (&l.name, &l.b)]);
    for (name, values) in layers.chain(tokens.iter().map(|t| (&t.name, &t.values))) {
        if let Some(value) = values.iter().find(|x| is_lost(**x)) {
            let reason = format!(
                "{name:?} has the number {value}, too large for {}: store it as f32",
                storage.name().to_lowercase()
            );
            return fail(path, reason);
        }
    }
    Ok(())
}

/// What of the files could be given a place.
#[derive(Default)]
struct Gathered<'a> {
    layers: BTreeMap<&'a str, Found<'a>>,
    words: Vec<words::Bundle<'a>>,
    unmatched: Vec<Unmatched>,
    format: Option<Format>,
}

impl<'a> Gathered<'a> {
    fn add(&mut self, source: &'a Source, index: &Index<'a>) -> Result<()> {
        let file = &source.file;
        if words::is_file_of_words(file) {
            self.format.get_or_insert(Format::TextualInversion);
            self.add_words(file);
            return Ok(());
        }
        for key in file.tensors.keys() {
            if let Some(method) = refused::method(key) {
                if method.changes_the_rest {
                    return fail(&file.path, format!("tensor {:?}: {}", shortened(key), method.reason()));
                }
                self.leave_out(key, method.reason());
            } else if let Some(word) = words::bundled(file, key) {
                match word {
                    Ok(word) => self.words.push(word),
                    Err(reason) => self.leave_out(key, reason),
                }
            } else if let Some(parsed) = parse(key) {
                self.add_factor(source, index, key, parsed)?;
            } else {
                self.leave_out(key, refused::unknown(key));
            }
        }
        if self.words.iter().any(|word| std::ptr::eq(word.file, file)) {
            self.format.get_or_insert(Format::TextualInversion);
        }
        Ok(())
    }

    fn add_factor(&mut self, source: &'a Source, index: &Index<'a>, key: &'a str, parsed: Key) -> Result<()> {
        let file = &source.file;
        match index.find(&parsed.module) {
            Place::Layer(module) => {
                // Alphas say little of a file's form: several have them.
                if parsed.role != Role::Alpha {
                    self.format.get_or_insert(parsed.format);
                }
                let found = self.layers.entry(&module.name).or_insert_with(|| Found::new(module));
                found.add(source, key, &parsed)
            }
            Place::Other(module) => {
                let what = match module.shape.len() {
                    4 => "a convolution, and adapters change Linears only",
                    _ => "not one of the Linears that adapters change",
                };
                self.leave_out(key, format!("the base model's {} is {what}", module.name));
                Ok(())
            }
            Place::Ambiguous(one, other) => {
                let (key, one, other) = (shortened(key), &one.name, &other.name);
                fail(&file.path, format!("tensor {key:?} may mean {one} or {other} of the base model"))
            }
            Place::Nowhere => {
                self.leave_out(key, refused::no_place(key));
                Ok(())
            }
        }
    }

    fn add_words(&mut self, file: &'a File) {
        for key in file.tensors.keys() {
            match words::of_file(file, key) {
                Ok(word) => self.words.push(word),
                Err(reason) => self.leave_out(key, reason),
            }
        }
    }

    fn leave_out(&mut self, key: &str, reason: impl Into<String>) {
        self.unmatched.push(Unmatched { key: key.to_owned(), reason: reason.into() });
    }
}

/// Why there is nothing to import where only `unmatched` was found.
fn nothing(unmatched: &[Unmatched]) -> String {
    if unmatched.is_empty() {
        return "it has no tensors".into();
    }
    match recognise(unmatched.iter().map(|u| u.key.as_str())) {
        Some(Foreign::Model) => "it is a model's weights, not a change to them".into(),
        _ => format!("none of its keys can be applied{}", reasons(unmatched)),
    }
}

/// What [`Error::Unmatched`] says.
pub(crate) fn summary(keys: &[Unmatched]) -> String {
    format!(
        "{} of its keys cannot be applied{}; allow unmatched keys (--allow-unmatched) to import the rest and have all of \
         these listed",
        keys.len(),
        reasons(keys)
    )
}

/// For each reason how many keys it has and the first of them.
fn reasons(keys: &[Unmatched]) -> String {
    /// Reasons that name a module each may be many.
    const REASONS_MAX: usize = 4;
    let mut reasons: Vec<(&str, Vec<&str>)> = Vec::new();
    for Unmatched { key, reason } in keys {
        match reasons.iter_mut().find(|(known, _)| known == reason) {
            Some((_, keys)) => keys.push(key),
            None => reasons.push((reason, vec![key])),
        }
    }
    // What most keys have in common says what the file is.
    reasons.sort_by_key(|(_, keys)| std::cmp::Reverse(keys.len()));
    let mut text = String::new();
    for (reason, keys) in reasons.iter().take(REASONS_MAX) {
        let first = shortened(keys.first().unwrap_or(&""));
        let more = if keys.len() > 1 { format!(" and {} more", keys.len() - 1) } else { String::new() };
        text += &format!("; {first:?}{more}: {reason}");
    }
    if let Some(rest) = reasons.get(REASONS_MAX..).filter(|rest| !rest.is_empty()) {
        text += &format!("; {} more for other reasons", rest.iter().map(|(_, keys)| keys.len()).sum::<usize>());
    }
    text
}
