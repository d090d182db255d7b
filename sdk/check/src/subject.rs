//! What is tested: the library and its manifest.

use std::path::{Path, PathBuf};

use blocklora_sdk::abi::Library;
use blocklora_sdk::manifest::Manifest;
use blocklora_sdk::rng::{Rng, Stream};
use blocklora_sdk::{Value, merge, sample, train};

/// A test's verdict: a line that says what is wrong.
pub type Verdict = Result<(), String>;

/// Ends a test with what is wrong.
pub fn wrong<T>(message: impl Into<String>) -> Result<T, String> {
    Err(message.into())
}

/// The plugin in a test's process.
pub struct Subject {
    /// The library's file.
    pub file: PathBuf,
    /// The library.
    pub library: Library,
    /// The manifest beside it.
    pub manifest: Manifest,
    /// Decides every random number.
    pub seed: u64,
}

impl Subject {
    /// Loads the library and reads the manifest beside it.
    pub fn open(file: &Path, seed: u64) -> Result<Self, String> {
        let (_, manifest) = read_manifest(file)?;
        let library = Library::open(file).map_err(|refusal| refusal.to_string())?;
        Ok(Self { file: file.to_owned(), library, manifest, seed })
    }

    /// Random numbers of this run; `lane` tells uses apart.
    pub fn rng(&self, lane: u16) -> Rng {
        Rng::new(self.seed, Stream::Test, 0, lane)
    }

    /// A strategy with its default settings.
    pub fn strategy(&self) -> Result<Box<dyn merge::AnyMergeStrategy>, String> {
        self.library.strategy(&Value::Null).map_err(|e| format!("no strategy with the default settings: {e}"))
    }

    /// A sampler with its default settings.
    pub fn sampler(&self) -> Result<Box<dyn sample::AnySampler>, String> {
        self.library.sampler(&Value::Null).map_err(|e| format!("no sampler with the default settings: {e}"))
    }

    /// A trainer with these settings.
    pub fn trainer(&self, settings: &Value) -> Result<Box<dyn train::AnyTrainer>, String> {
        self.library.trainer(settings).map_err(|e| format!("no trainer with the settings {settings}: {e}"))
    }
}

/// The manifest beside the library `file`, which names it as its library: its path and its content, checked.
pub fn read_manifest(file: &Path) -> Result<(PathBuf, Manifest), String> {
    let name = file.file_name().and_then(|name| name.to_str()).ok_or("the library's name is no text")?;
    let folder = match file.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let unreadable = |e: std::io::Error| format!("{}: {e}", folder.display());
    let mut broken = None;
    let mut paths: Vec<PathBuf> = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        if path.extension().is_some_and(|e| e == "toml") {
            paths.push(path);
        }
    }
    paths.sort();
    for path in paths {
        let text = std::fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        let library = text.parse::<toml::Table>().ok().and_then(|t| Some(t.get("library")?.as_str()?.to_owned()));
        match parse_manifest(&text) {
            Ok(manifest) if manifest.library == name => return Ok((path, manifest)),
            Err(e) if library.as_deref() == Some(name) => broken = Some(format!("{}: {e}", path.display())),
            _ => {}
        }
    }
    Err(broken.unwrap_or_else(|| {
        format!(
            "no manifest names {name}: put its <kind>-<id>.toml with library = \"{name}\" into {}",
            folder.display()
        )
    }))
}

/// Reads a manifest's text, and checks each field.
pub fn parse_manifest(text: &str) -> Result<Manifest, String> {
    let manifest: Manifest = toml::from_str(text).map_err(|e| e.message().to_owned())?;
    manifest.check()?;
    Ok(manifest)
}
