//! How a picture was made, read from the picture itself, so that it can be made again.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use blocklora_client::Generate;
use blocklora_engine::image::{AdapterUse, GenerationParameters, read_parameters};
use sha2::{Digest, Sha256};

use crate::args::{Precision, WeightedFile};
use crate::base;
use crate::daemon::ChosenModel;

/// How to make a picture again.
pub struct Recipe {
    picture: PathBuf,
    parameters: GenerationParameters,
    /// The adapters that it was made with, and where they are now.
    pub with: Vec<WeightedFile>,
}

/// Reads how `picture` was made. Its adapters are those of `with` with the same digest, else files beside it, in the
/// current folder or among the bundled ones, else the library's; a weight in `with` that is not 1 counts more.
pub fn read(picture: &Path, with: &[WeightedFile]) -> anyhow::Result<Recipe> {
    let shown = picture.display();
    let parameters = read_parameters(picture)?;
    let parameters = parameters
        .with_context(|| format!("{shown}: does not say how it was made: give a PNG file that blocklora wrote"))?;
    let mut places = Vec::new();
    for folder in [picture.parent().map(Path::to_path_buf), Some(PathBuf::from(".")), bundled()].into_iter().flatten() {
        let folder = if folder.as_os_str().is_empty() { PathBuf::from(".") } else { folder };
        places.extend(adapters_in(&folder));
    }
    let mut found = Vec::new();
    let mut left: Vec<&WeightedFile> = with.iter().collect();
    for used in &parameters.adapters {
        let given = left.iter().position(|with| is_it(with, used));
        let given = given.map(|at| left.remove(at));
        found.push(match given {
            Some(given) if given.weight != 1.0 => given.clone(),
            Some(given) => WeightedFile { path: given.path.clone(), weight: used.weight },
            None => WeightedFile { path: find(used, &places), weight: used.weight },
        });
    }
    // What is given beside is merged beside.
    found.extend(left.into_iter().cloned());
    Ok(Recipe { picture: picture.to_path_buf(), parameters, with: found })
}

impl Recipe {
    /// Asks for the same picture.
    pub fn apply(&self, request: &mut Generate) {
        let p = &self.parameters;
        request.prompt.clone_from(&p.prompt);
        request.negative_prompt = Some(p.negative_prompt.clone());
        request.steps = u32::try_from(p.steps).ok();
        request.guidance_scale = Some(f64::from(p.guidance_scale));
        request.sampler = Some(p.sampler.clone());
        request.seed = Some(p.seed);
        request.sampler_config.clone_from(&p.sampler_config);
        request.width = u32::try_from(p.width).ok();
        request.height = u32::try_from(p.height).ok();
        if let Some(merge) = &p.merge {
            request.strategy = Some(merge.strategy.clone());
            request.strategy_config = merge.config.clone();
        }
    }

    /// The type that the model's weights had.
    pub fn precision(&self) -> Precision {
        match self.parameters.precision.as_str() {
            "f16" => Precision::F16,
            "bf16" => Precision::Bf16,
            _ => Precision::F32,
        }
    }

    /// Fails if `model` is not the one that the picture was made with.
    pub fn check_model(&self, model: &ChosenModel) -> anyhow::Result<()> {
        let (made, have) = (&self.parameters.model_digest, &model.state.digest);
        if made != have {
            bail!(
                "{}: made with another model ({made:.12}) than {} ({have:.12}): give that one with --base",
                self.picture.display(),
                model.state.path
            );
        }
        Ok(())
    }
}

fn bundled() -> Option<PathBuf> {
    base::starter().ok().map(|starter| starter.join("adapters"))
}

/// The adapter files of a folder; none where it cannot be read.
fn adapters_in(folder: &Path) -> Vec<PathBuf> {
    let entries = folder.read_dir().into_iter().flatten().flatten().map(|entry| entry.path());
    let mut files: Vec<PathBuf> =
        entries.filter(|path| path.extension().is_some_and(|e| e == "safetensors") && path.is_file()).collect();
    files.sort();
    files
}

fn is_it(with: &WeightedFile, used: &AdapterUse) -> bool {
    if with.is_of_library() {
        let text = with.path.to_string_lossy();
        return *text == *used.name || (text.len() >= 8 && used.digest.starts_with(&*text));
    }
    digest(&with.path).is_some_and(|digest| digest == used.digest)
}

/// The file of `places` that has the digest, files with the concept's name first; else the digest, for the library.
fn find(used: &AdapterUse, places: &[PathBuf]) -> PathBuf {
    let named = |path: &&PathBuf| path.file_stem().is_some_and(|stem| *stem == *used.name);
    let others = places.iter().filter(|path| !named(path));
    let mut all = places.iter().filter(named).chain(others);
    let found = all.find(|path| digest(path).is_some_and(|digest| digest == used.digest));
    found.cloned().unwrap_or_else(|| used.digest.clone().into())
}

/// SHA-256 of a file; none where it cannot be read.
fn digest(path: &Path) -> Option<String> {
    let mut hash = Sha256::new();
    std::io::copy(&mut std::fs::File::open(path).ok()?, &mut hash).ok()?;
    Some(blocklora_engine::weights::hex(&hash.finalize()))
}
