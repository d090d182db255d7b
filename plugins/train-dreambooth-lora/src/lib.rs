//! DreamBooth with LoRA: a rare word that comes to mean the concept, with or without prior preservation.

use blocklora_sdk::train::{
    Augmentation, Concept, ConceptSettings, LearningRates, Parameters, RateSchedule, Recipe, TokenStyle, TrainHost,
    TrainPlan, Trainer, Words, train_concept,
};
use blocklora_sdk::{Config, Error, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

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
        Self { settings, rare_token, instance_prompt }
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
        Ok(())
    }
}

impl Trainer for DreamboothLora {
    fn plan(&self, concept: &Concept) -> Result<TrainPlan> {
        Ok(self.settings.plan(concept))
    }

    fn train(&self, host: &mut dyn TrainHost) -> Result<Parameters> {
        self.check()?;
        check_rare_token(host, &self.rare_token)?;
        let recipe = Recipe {
            words: Words::Rare(&self.rare_token),
            prompt: Some(self.instance_prompt.as_str()).filter(|prompt| !prompt.is_empty()),
            ..Recipe::new(&self.settings)
        };
        train_concept(host, &recipe)
    }
}

/// The host says what is wrong with a word; whose word it is it cannot know.
fn check_rare_token(host: &dyn TrainHost, word: &str) -> Result<()> {
    host.embedding(word).map(drop).map_err(|error| match error.is_cancelled() {
        true => error,
        false => {
            let reason =
                "must be one token of this model's vocabulary; choose another word that it has but hardly knows";
            Error::config("rare_token", word, reason)
        }
    })
}

blocklora_sdk::export_plugin! {
    train: DreamboothLora,
    id: "dreambooth-lora",
    manifest: include_str!("../train-dreambooth-lora.toml"),
}
