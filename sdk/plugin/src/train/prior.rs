//! Prior preservation (Ruiz et al., "DreamBooth: Fine tuning text-to-image diffusion models for subject-driven
//! generation", CVPR 2023, section 3.3): what the model draws without the concept is learned along, so that it stays.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::host::PictureRequest;
use super::settings::check_range;
use crate::error::{Error, Result};

/// Prior preservation: the class stays what it was, because pictures of it, which the model draws before training, are
/// learned along. Further prompts keep more of what the model knows; for an adapter with rows of its own they also teach
/// these rows to be silent where their concept is not named, as when other concepts are drawn from one merged model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct PriorPreservation {
    /// Whether to.
    pub enabled: bool,
    /// lambda: the loss is the concept's plus lambda times the class's.
    #[schemars(range(min = 0.0, max = 100.0))]
    pub weight: f32,
    /// How many pictures are drawn, in all.
    #[schemars(range(min = 1, max = 100_000))]
    pub pictures: usize,
    /// Their prompts, each for as many pictures as the others; {} is the class word.
    pub prompts: Vec<String>,
    /// Sampling steps for each.
    #[schemars(range(min = 1, max = 1000))]
    pub sampling_steps: usize,
    /// Guidance scale for each.
    #[schemars(range(min = 1.0, max = 100.0))]
    pub guidance_scale: f32,
}

impl Default for PriorPreservation {
    fn default() -> Self {
        let prompts = vec!["a {}".to_owned()];
        Self { enabled: false, weight: 1.0, pictures: 100, prompts, sampling_steps: 50, guidance_scale: 7.5 }
    }
}

impl PriorPreservation {
    /// Checks every range; the error names the key and what is allowed.
    pub fn check(&self) -> Result<()> {
        if self.prompts.is_empty() || self.prompts.iter().any(|prompt| prompt.trim().is_empty()) {
            let reason = "needs prompts that are not empty, such as [\"a {}\"]";
            return Err(Error::config("prior.prompts", format!("{:?}", self.prompts), reason));
        }
        check_range("prior.weight", self.weight, 0.0, 100.0)?;
        check_range("prior.guidance_scale", self.guidance_scale, 1.0, 100.0)?;
        for (key, value, least, most) in [
            ("prior.pictures", self.pictures, self.prompts.len(), 100_000),
            ("prior.sampling_steps", self.sampling_steps, 1, 1000),
        ] {
            if !(least..=most).contains(&value) {
                return Err(Error::config(key, value, format!("must be {least} to {most}")));
            }
        }
        Ok(())
    }

    /// What a recipe for a concept of this class does with it; none if it is not enabled.
    pub fn of_class(&self, class_word: &str) -> Option<Prior> {
        let n = self.prompts.len();
        let request = |(index, prompt): (usize, &String)| PictureRequest {
            prompt: prompt.replace("{}", class_word),
            count: self.pictures / n + usize::from(index < self.pictures % n),
            steps: self.sampling_steps,
            guidance_scale: self.guidance_scale,
        };
        let pictures = || self.prompts.iter().enumerate().map(request).collect();
        self.enabled.then(|| Prior { pictures: pictures(), weight: self.weight })
    }
}

/// Pictures that a [`Recipe`](super::Recipe) learns along with the concept's.
#[derive(Clone, Debug)]
pub struct Prior {
    /// What to draw, and with which prompts to learn it; at least one picture of each.
    pub pictures: Vec<PictureRequest>,
    /// lambda: the loss is that of the concept's pictures plus lambda times that of these, each a mean over as many
    /// samples.
    pub weight: f32,
}
