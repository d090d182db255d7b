//! Scores pictures of the bundled concepts with a CLIP model, by the formulas of the paper.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Context;
use blocklora_engine::image::Picture;
use blocklora_engine::score::{ClipScorer, Feature, IdentityClassifier, image_alignment, prior_text, text_alignment};
use serde::Serialize;

use crate::concepts::{Concepts, Entry};
use crate::progress;

/// The scores of some pictures.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Scores {
    /// Mean of max(cosine, 0) over pairs of a real and a drawn picture.
    pub image_alignment: f32,
    /// Mean of 2.5 max(cosine, 0) of a drawn picture and its prompt, with class words for concepts.
    pub text_alignment: f32,
    /// Share of drawn pictures that are nearest to the right concept.
    pub identity: f32,
}

impl Scores {
    /// The mean of each; none of none.
    pub fn mean<'a>(scores: impl IntoIterator<Item = &'a Self>) -> Option<Self> {
        let scores: Vec<&Self> = scores.into_iter().collect();
        let mean = |of: fn(&Self) -> f32| scores.iter().map(|s| of(s)).sum::<f32>() / scores.len() as f32;
        (!scores.is_empty()).then(|| Self {
            image_alignment: mean(|s| s.image_alignment),
            text_alignment: mean(|s| s.text_alignment),
            identity: mean(|s| s.identity),
        })
    }

    /// The standard error of each mean: the standard deviation over `scores` by the root of their number; none of
    /// fewer than two.
    pub fn standard_error<'a>(scores: impl IntoIterator<Item = &'a Self>) -> Option<Self> {
        let scores: Vec<&Self> = scores.into_iter().collect();
        let n = scores.len() as f64;
        let error = |of: fn(&Self) -> f32| {
            let mean = scores.iter().map(|s| f64::from(of(s))).sum::<f64>() / n;
            let squares = scores.iter().map(|s| (f64::from(of(s)) - mean).powi(2)).sum::<f64>();
            (squares / (n - 1.0) / n).sqrt() as f32
        };
        (scores.len() > 1).then(|| Self {
            image_alignment: error(|s| s.image_alignment),
            text_alignment: error(|s| s.text_alignment),
            identity: error(|s| s.identity),
        })
    }
}

/// A CLIP model that knows the concepts' real pictures.
pub struct Judge {
    clip: ClipScorer,
    real: BTreeMap<String, Vec<Feature>>,
    classes: BTreeMap<String, String>,
    identities: IdentityClassifier,
    text_prefix: String,
}

impl Judge {
    /// Loads the CLIP model in `clip` and the real pictures of all `concepts`.
    pub fn open(clip: &Path, concepts: &Concepts, text_prefix: &str) -> anyhow::Result<Self> {
        let spinner = progress::spinner("loading the scorer");
        let clip = ClipScorer::load(clip)?;
        let mut real = BTreeMap::new();
        for entry in &concepts.entries {
            let pictures = concepts.pictures(entry);
            let pictures = pictures.iter().map(|(path, _)| Picture::load(path)).collect::<Result<Vec<_>, _>>()?;
            real.insert(entry.name.clone(), clip.image_features(&pictures)?);
        }
        spinner.finish_and_clear();
        Ok(Self {
            identities: IdentityClassifier::new(real.clone())?,
            classes: concepts.entries.iter().map(|e| (e.name.clone(), e.class.clone())).collect(),
            clip,
            real,
            text_prefix: text_prefix.to_owned(),
        })
    }

    /// Scores `pictures` of `entry`, each drawn from the prompt at its place: the mean over them.
    pub fn score(&self, entry: &Entry, prompts: &[&str], pictures: &[Picture]) -> anyhow::Result<Scores> {
        let each = self.score_each(entry, prompts, pictures)?;
        Scores::mean(&each).with_context(|| format!("there are no pictures of {:?} to score", entry.name))
    }

    /// The scores of each of `pictures` of `entry`, drawn from the prompt at its place.
    pub fn score_each(&self, entry: &Entry, prompts: &[&str], pictures: &[Picture]) -> anyhow::Result<Vec<Scores>> {
        let real = self.real.get(&entry.name).with_context(|| format!("no pictures of {:?}", entry.name))?;
        let drawn = self.clip.image_features(pictures)?;
        let class = |name: &str| self.classes.get(name).map(String::as_str);
        let texts = prompts.iter().map(|p| prior_text(p, &self.text_prefix, class)).collect::<Result<Vec<_>, _>>()?;
        let index = self.identities.names().iter().position(|n| *n == entry.name).unwrap_or(usize::MAX);
        let texts = self.clip.text_features(&texts)?;
        let one = |(text, drawn): (&Feature, &Feature)| {
            let drawn = std::slice::from_ref(drawn);
            Ok(Scores {
                image_alignment: image_alignment(real, drawn)?,
                text_alignment: text_alignment(std::slice::from_ref(text), drawn)?,
                identity: self.identities.accuracy(index, drawn)?,
            })
        };
        texts.iter().zip(&drawn).map(one).collect()
    }
}
