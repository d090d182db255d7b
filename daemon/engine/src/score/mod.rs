//! Scoring pictures with a CLIP: image alignment, text alignment and identity, in the formulas of Mix-of-Show and
//! BlockLoRA (CLIPScore: Hessel et al., EMNLP 2021).

mod alignment;
mod clip;
mod crosstalk;
mod preprocess;
mod show;

use std::path::Path;

use candle_core::{Device, Tensor};

pub use alignment::{Feature, IdentityClassifier, PAPER_PREFIX, cosine, image_alignment, prior_text, text_alignment};
pub use crosstalk::{Answer, answers};
pub(crate) use show::show;

use crate::error::{Error, Result};
use crate::image::Picture;
use crate::text::Tokenizer;
use clip::Clip;
use preprocess::Preprocessor;

/// Pictures or prompts that go through the model together.
const BATCH: usize = 32;

/// A CLIP model that turns pictures and prompts into comparable features.
pub struct ClipScorer {
    clip: Clip,
    preprocessor: Preprocessor,
    tokenizer: Tokenizer,
    digest: String,
}

impl ClipScorer {
    /// Loads a folder as transformers' `CLIPModel.save_pretrained` writes it: `config.json`, `model.safetensors` (f32,
    /// f16 or bf16), `preprocessor_config.json` and `tokenizer.json` or `vocab.json` with `merges.txt`. Errors name the
    /// file, and the field or tensor in it.
    pub fn load(folder: &Path) -> Result<Self> {
        let (clip, digest) = Clip::load(folder, &Device::Cpu)?;
        let preprocessor = Preprocessor::open(&folder.join("preprocessor_config.json"), clip.image_size())?;
        let tokenizer = Tokenizer::open(folder, clip.text_config())?;
        Ok(Self { clip, preprocessor, tokenizer, digest })
    }

    /// SHA-256 of its weight file, in hex.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// The features of pictures of any size, each of length 1.
    pub fn image_features(&self, pictures: &[Picture]) -> Result<Vec<Feature>> {
        let mut features = Vec::with_capacity(pictures.len());
        let side = self.clip.image_size();
        for batch in pictures.chunks(BATCH) {
            let mut pixels = Vec::with_capacity(batch.len() * 3 * side * side);
            for picture in batch {
                pixels.extend(self.preprocessor.apply(picture)?);
            }
            let pixels = Tensor::from_vec(pixels, (batch.len(), 3, side, side), &Device::Cpu)?;
            features.extend(normalised(&self.clip.image_features(&pixels)?)?);
        }
        Ok(features)
    }

    /// The features of prompts, each of length 1. What does not fit into the text encoder is cut off, as in
    /// transformers.
    pub fn text_features<S: AsRef<str>>(&self, prompts: &[S]) -> Result<Vec<Feature>> {
        let mut features = Vec::with_capacity(prompts.len());
        for batch in prompts.chunks(BATCH) {
            let ids = batch.iter().map(|prompt| self.token_ids(prompt.as_ref())).collect::<Result<Vec<_>>>()?;
            features.extend(normalised(&self.clip.text_features(&ids)?)?);
        }
        Ok(features)
    }

    fn token_ids(&self, prompt: &str) -> Result<Vec<u32>> {
        let mut ids = vec![self.tokenizer.begin()];
        ids.extend(self.tokenizer.ids(prompt)?);
        ids.truncate(self.tokenizer.length() - 1);
        ids.push(self.tokenizer.end());
        Ok(ids)
    }
}

/// The rows of `features` [N, d], each divided by its length.
fn normalised(features: &Tensor) -> Result<Vec<Feature>> {
    let unit = |row: Vec<f32>| {
        let length = row.iter().map(|v| v * v).sum::<f32>().sqrt();
        if length.is_finite() && length > 0.0 {
            Ok(row.iter().map(|v| v / length).collect())
        } else {
            Err(Error::NotFinite { what: "the length of a CLIP feature".into(), value: length, step: 0 })
        }
    };
    features.to_vec2::<f32>()?.into_iter().map(unit).collect()
}
