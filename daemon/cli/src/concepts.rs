//! `concepts.json`: the bundled concepts, their pictures with captions, and the prompts that score them.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use serde::Deserialize;

/// One bundled concept.
#[derive(Clone, Debug, Deserialize)]
pub struct Entry {
    /// Its name, as in its adapter.
    pub name: String,
    /// The word for its class.
    pub class: String,
    /// Its pictures.
    pub images: Vec<Image>,
    /// Prompts to score it with; `{c}` stands for the concept.
    pub prompts: Vec<String>,
}

/// A picture of a concept.
#[derive(Clone, Debug, Deserialize)]
pub struct Image {
    /// Its file, relative to the folder of `concepts.json`.
    pub file: PathBuf,
    /// What it shows; `{c}` stands for the concept.
    pub caption: String,
}

impl Entry {
    /// One of its prompts with its name in it.
    pub fn prompt(&self, prompt: &str) -> String {
        prompt.replace("{c}", &format!("<{}>", self.name))
    }
}

/// The concepts of a folder.
#[derive(Clone, Debug)]
pub struct Concepts {
    folder: PathBuf,
    /// In the order of the file.
    pub entries: Vec<Entry>,
}

impl Concepts {
    /// Reads `folder/concepts.json`.
    pub fn open(folder: &Path) -> anyhow::Result<Self> {
        let path = folder.join("concepts.json");
        let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let entries: Vec<Entry> = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
        for entry in &entries {
            if entry.images.is_empty() || entry.prompts.is_empty() {
                bail!("{}: concept {:?} needs at least one picture and one prompt", path.display(), entry.name);
            }
            if let Some(prompt) = entry.prompts.iter().find(|p| !p.contains("{c}")) {
                bail!("{}: concept {:?}: the prompt {prompt:?} has no {{c}}", path.display(), entry.name);
            }
        }
        Ok(Self { folder: folder.to_path_buf(), entries })
    }

    /// The concept `name`; an error that names the file if there is none.
    pub fn get(&self, name: &str) -> anyhow::Result<&Entry> {
        self.entries.iter().find(|e| e.name == name).with_context(|| {
            format!("{}: there is no concept {name:?} in it", self.folder.join("concepts.json").display())
        })
    }

    /// Where a concept's pictures are, with their captions.
    pub fn pictures(&self, entry: &Entry) -> Vec<(PathBuf, Option<String>)> {
        entry.images.iter().map(|i| (self.folder.join(&i.file), Some(i.caption.clone()))).collect()
    }
}
