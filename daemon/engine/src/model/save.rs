//! Writing a model, with whatever is merged into it, as a folder that diffusers loads.

use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};

use super::{Component, Defaults, Model, ModelIndex};
use crate::error::{Error, Result};
use crate::nn::LayerId;
use crate::weights::WeightView;

impl Model {
    /// Writes the model in its present state to the new folder `dir`: each weight in the type in which its file stores
    /// it, everything else as it is in the folder that this model was loaded from.
    ///
    /// The folder appears whole or not at all. Fails if `dir` exists and is not empty, and if a merged weight is not
    /// finite in the stored type.
    pub fn save(&self, dir: &Path) -> Result<()> {
        if dir.exists() {
            let mut entries = fs::read_dir(dir).map_err(|e| Error::io(dir, e))?;
            if entries.next().is_some() {
                return Err(Error::invalid_file(dir, "exists and is not empty; choose a new folder or empty this one"));
            }
        }
        let partial = Partial::new(dir)?;
        let index = ModelIndex::open(self.dir())?;
        for entry in read_dir(self.dir())? {
            let name = entry.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
            let goes_along = name == "model_index.json"
                || name == Defaults::FILE
                || name.starts_with("license")
                || name.starts_with("readme");
            if goes_along && entry.is_file() {
                copy_into(&entry, &partial.path)?;
            }
        }
        for name in index.components.keys() {
            let (from, to) = (self.dir().join(name), partial.path.join(name));
            match Component::ALL.into_iter().find(|component| component.folder() == name) {
                // Not the whole folder: other variants of the weights beside the loaded file are not merged.
                Some(component) => {
                    fs::create_dir(&to).map_err(|e| Error::io(&to, e))?;
                    copy_into(&from.join("config.json"), &to)?;
                    self.save_weights(component, &to.join(component.weight_file()))?;
                }
                None if from.is_dir() => copy_folder(&from, &to)?,
                None => {}
            }
        }
        partial.rename_to(dir)
    }

    /// Writes one component's weight file: the loaded file's bytes, but for the layers that are not pristine.
    fn save_weights(&self, component: Component, path: &Path) -> Result<()> {
        let source = self.weight_file(component);
        let io = |e| Error::io(path, e);
        let mut file = File::create(path).map_err(io)?;
        // Not what lies at its path by now, which the layers' places may not be those of.
        file.write_all(source.bytes()).map_err(io)?;
        for (id, info) in self.layers().iter().enumerate() {
            let belongs = info.name.strip_prefix(component.folder()).is_some_and(|rest| rest.starts_with('.'));
            let layer = LayerId(id);
            if let Some(bytes) = if belongs { changed(self.pristine(layer), self.live(layer))? } else { None } {
                file.seek(SeekFrom::Start(self.pristine(layer).offset())).map_err(io)?;
                file.write_all(&bytes).map_err(io)?;
            }
        }
        file.sync_all().map_err(io)
    }
}

/// The bytes of `live` in the stored type, if it is not what loading `pristine` gives.
fn changed(pristine: &WeightView, live: &Tensor) -> Result<Option<Vec<u8>>> {
    let live = live.to_device(&Device::Cpu)?;
    if bytes_of(&live)? == bytes_of(&pristine.load(live.dtype(), &Device::Cpu)?)? {
        return Ok(None);
    }
    let stored = live.to_dtype(pristine.dtype())?;
    let values: Vec<f32> = stored.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
    match values.iter().find(|value| !value.is_finite()) {
        Some(value) => Err(pristine.error(format!(
            "its merged value {value} is not finite in {:?}, the type of the file; lower the adapters' weights",
            pristine.dtype()
        ))),
        None => bytes_of(&stored).map(Some),
    }
}

fn bytes_of(tensor: &Tensor) -> Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(tensor.elem_count() * tensor.dtype().size_in_bytes());
    tensor.write_bytes(&mut bytes)?;
    Ok(bytes)
}

fn read_dir(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(dir).map_err(|e| Error::io(dir, e))?;
    entries.map(|entry| entry.map(|entry| entry.path()).map_err(|e| Error::io(dir, e))).collect()
}

/// Copies content only, not permissions: the copy of a read-only file must not be read-only while it is written.
fn copy_into(from: &Path, folder: &Path) -> Result<()> {
    let to = folder.join(from.file_name().unwrap_or_default());
    let mut source = File::open(from).map_err(|e| Error::io(from, e))?;
    let mut target = File::create(&to).map_err(|e| Error::io(&to, e))?;
    std::io::copy(&mut source, &mut target).map_err(|e| Error::io(&to, e))?;
    target.sync_all().map_err(|e| Error::io(&to, e))
}

fn copy_folder(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir(to).map_err(|e| Error::io(to, e))?;
    for entry in read_dir(from)? {
        if entry.is_dir() {
            copy_folder(&entry, &to.join(entry.file_name().unwrap_or_default()))?;
        } else {
            copy_into(&entry, to)?;
        }
    }
    Ok(())
}

/// A folder in the making beside its destination; removed unless it gets there.
struct Partial {
    path: PathBuf,
}

impl Partial {
    fn new(destination: &Path) -> Result<Self> {
        let Some(name) = destination.file_name() else {
            return Err(Error::invalid_file(destination, "is not a name for a new folder"));
        };
        let parent = destination.parent().filter(|parent| !parent.as_os_str().is_empty());
        if let Some(parent) = parent.filter(|parent| !parent.is_dir()) {
            return Err(Error::invalid_file(parent, "does not exist or is not a folder; create it first"));
        }
        let name = format!(".{}.{}.partial", name.to_string_lossy(), std::process::id());
        let path = destination.with_file_name(name);
        fs::create_dir(&path).map_err(|e| Error::io(&path, e))?;
        Ok(Self { path })
    }

    fn rename_to(self, destination: &Path) -> Result<()> {
        if destination.exists() {
            // Fails if something has been put there meanwhile.
            fs::remove_dir(destination).map_err(|e| Error::io(destination, e))?;
        }
        fs::rename(&self.path, destination).map_err(|e| Error::io(destination, e))?;
        let parent = destination.parent().filter(|parent| !parent.as_os_str().is_empty());
        let parent = parent.unwrap_or(Path::new("."));
        // A folder that cannot be opened for syncing (some platforms) does not make the rename less complete.
        if let Ok(folder) = File::open(parent) {
            let _ = folder.sync_all();
        }
        Ok(())
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        // After a rename there is nothing left to remove.
        let _ = fs::remove_dir_all(&self.path);
    }
}
