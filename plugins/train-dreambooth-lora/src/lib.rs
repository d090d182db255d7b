//! DreamBooth with LoRA: a rare word that comes to mean the concept, with or without prior preservation.

use blocklora_sdk::train::{
    Augmentation, Concept, ConceptSettings, LearningRates, Parameters, PictureRequest, Prior, RateSchedule, Recipe,
    TokenStyle, TrainHost, TrainPlan, Trainer, Words, check_range, train_concept,
};
use blocklora_sdk::{Config, Error, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Prior preservation (DreamBooth, section 3.3): the class stays what it was, because pictures of it, which the model
/// draws before training, are learned along.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct PriorPreservation {
    /// Whether to.
    pub enabled: bool,
    /// lambda: the loss is the concept's plus lambda times the class's.
    #[schemars(range(min = 0.0, max = 100.0))]
    pub weight: f32,
    /// How many pictures of the class are drawn.
    #[schemars(range(min = 1, max = 100_000))]
    pub pictures: usize,
    /// Their prompt; {} is the class word.
    pub prompt: String,
    /// Sampling steps for each.
    #[schemars(range(min = 1, max = 1000))]
    pub sampling_steps: usize,
    /// Guidance scale for each.
    #[schemars(range(min = 1.0, max = 100.0))]
    pub guidance_scale: f32,
}

impl Default for PriorPreservation {
    fn default() -> Self {
        let prompt = "a {}".to_owned();
        Self { enabled: false, weight: 1.0, pictures: 100, prompt, sampling_steps: 50, guidance_scale: 7.5 }
    }
}

/// Trains factors that make `a <rare token> <class>` mean the concept (Ruiz et al., "DreamBooth: Fine tuning
/// text-to-image diffusion models for subject-driven generation", CVPR 2023; its LoRA form is diffusers'
/// train_dreambooth_lora script). The words themselves do not move. alpha = 1 multiplies B A, which is what others write
/// as alpha = r in alpha / r.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DreamboothLora {
    /// What it shares with other methods.
    #[serde(flatten)]
    pub settings: ConceptSettings,
    /// A word that the model hardly knows; it must be one token of the model's vocabulary.
    pub rare_token: String,
    /// The prompt of every picture of the concept; {} stands for the rare token and the class word. Empty: captions and
    /// templates, as in the other methods.
    pub instance_prompt: String,
    /// Prior preservation.
    pub prior: PriorPreservation,
}

impl Default for DreamboothLora {
    fn default() -> Self {
        let settings = ConceptSettings {
            steps: 500,
            learning_rate: LearningRates { tokens: 0.0, text_encoder: 5e-4, unet: 5e-4 },
            schedule: RateSchedule::Constant,
            noise_offset: 0.0,
            tokens: TokenStyle::Plain,
            token_norm_limit: 0.0,
            train_text_encoder: false,
            augmentation: Augmentation { fill: 1.0, ..Augmentation::default() },
            ..ConceptSettings::default()
        };
        let (rare_token, instance_prompt) = ("sks".to_owned(), "a {}".to_owned());
        Self { settings, rare_token, instance_prompt, prior: PriorPreservation::default() }
    }
}

impl Config for DreamboothLora {
    fn check(&self) -> Result<()> {
        self.settings.check()?;
        let has_place = |key: &str, prompt: &str| match prompt.matches("{}").count() {
            1 => Ok(()),
            _ => Err(Error::config(key, format!("{prompt:?}"), "must contain {} once, such as \"a {}\"")),
        };
        if !self.instance_prompt.is_empty() {
            has_place("instance_prompt", &self.instance_prompt)?;
        }
        if self.rare_token.is_empty() || self.rare_token.contains(char::is_whitespace) {
            return Err(Error::config("rare_token", format!("{:?}", self.rare_token), "must be one word"));
        }
        has_place("prior.prompt", &self.prior.prompt)?;
        check_range("prior.weight", self.prior.weight, 0.0, 100.0)?;
        check_range("prior.guidance_scale", self.prior.guidance_scale, 1.0, 100.0)?;
        for (key, value) in
            [("prior.pictures", self.prior.pictures), ("prior.sampling_steps", self.prior.sampling_steps)]
        {
            if value == 0 {
                return Err(Error::config(key, 0, "must be 1 or more"));
            }
        }
        Ok(())
    }
}

impl Trainer for DreamboothLora {
    fn plan(&self, concept: &Concept) -> Result<TrainPlan> {
        Ok(self.settings.plan(concept))
    }

    fn train(&self, host: &mut dyn TrainHost) -> Result<Parameters> {
        self.check()?;
        let pictures = PictureRequest {
            prompt: self.prior.prompt.replace("{}", &host.concept().class_word),
            count: self.prior.pictures,
            steps: self.prior.sampling_steps,
            guidance_scale: self.prior.guidance_scale,
        };
        let recipe = Recipe {
            words: Words::Rare(&self.rare_token),
            prompt: Some(self.instance_prompt.as_str()).filter(|prompt| !prompt.is_empty()),
            prior: self.prior.enabled.then_some(Prior { pictures, weight: self.prior.weight }),
            ..Recipe::new(&self.settings)
        };
        train_concept(host, &recipe)
    }
}

blocklora_sdk::export_plugin! {
    train: DreamboothLora,
    id: "dreambooth-lora",
    manifest: include_str!("../train-dreambooth-lora.toml"),
}
