//! DreamBooth's training against PyTorch, with and without prior preservation, and its own parts.
#![allow(clippy::unwrap_used)]

use std::path::Path;

use blocklora_sdk::testing::{Quadratic, TrainGolden, check_trainer};
use blocklora_sdk::train::{ConceptSettings, LearningRates, Parameters, PriorPreservation, Trainer};
use blocklora_sdk::{Code, Config, Value, resolve, schema};
use train_dreambooth_lora::DreamboothLora;

fn trainer(steps: usize, prior: Option<f32>) -> DreamboothLora {
    let default = DreamboothLora::default();
    let settings = ConceptSettings {
        steps,
        batch_size: 2,
        rank: 2,
        learning_rate: LearningRates { tokens: 0.0, text_encoder: 0.01, unet: 0.02 },
        prior: PriorPreservation { enabled: prior.is_some(), weight: prior.unwrap_or(1.0), ..default.settings.prior },
        ..default.settings
    };
    DreamboothLora { settings, ..default }
}

#[test]
fn equals_pytorch() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/train.json");
    let golden = TrainGolden::open(&path).unwrap();
    let check = |name, prior| check_trainer(&golden, name, &trainer(40, prior), &mut Quadratic::new()).unwrap();
    check("dreambooth-lora", None);
    check("dreambooth-lora prior=1", Some(1.0));
    check("dreambooth-lora prior=0.25", Some(0.25));
}

#[test]
fn an_unknown_word_is_named_by_its_setting_before_anything_is_drawn() {
    let unknown = DreamboothLora { rare_token: Quadratic::UNKNOWN.into(), ..trainer(2, Some(1.0)) };
    let mut host = Quadratic::new();
    let error = unknown.train(&mut host).unwrap_err();
    assert_eq!((error.code, host.drawn), (Code::InvalidConfig, 0));
    assert!(error.message.contains("rare_token = xyzzyqwv: must be one token"), "{error}");
    host.concept.class_word = Quadratic::UNKNOWN.into();
    let error = trainer(2, Some(1.0)).train(&mut host).unwrap_err();
    assert_eq!((error.code, host.drawn), (Code::Host, 0));
}

/// The change of row 3 at the optimum.
fn row_3(parameters: &Parameters) -> Vec<f32> {
    let f = &parameters.factors[0];
    let n = Quadratic::N;
    (0..n).map(|q| (0..2).map(|k| f.scale * f.b[3 * 2 + k] * f.a[k * n + q]).sum()).collect()
}

#[test]
fn the_prior_pulls_the_optimum_towards_the_class() {
    for (prior, factor) in [(None, 1.0), (Some(0.0), 1.0), (Some(1.0), 0.5), (Some(3.0), 0.25)] {
        let mut trainer = trainer(800, prior);
        trainer.settings.weight_decay = 0.0;
        let mut host = Quadratic::new();
        let change = row_3(&trainer.train(&mut host).unwrap());
        for (q, change) in change.iter().enumerate() {
            let optimum = factor * host.target[3 * Quadratic::N + q];
            assert!((change - optimum).abs() < 2e-2, "{prior:?}: {change} {optimum}");
        }
    }
}

#[test]
fn without_prior_preservation_nothing_is_drawn() {
    let mut host = Quadratic::new();
    trainer(3, None).train(&mut host).unwrap();
    assert_eq!(host.drawn, 0);
    assert!(host.batches.iter().all(|batch| batch.len() == 2));
    assert!(host.batches.iter().flatten().all(|s| s.picture == 0 && s.prompt == "a {}" && s.weight == 1.0));
}

#[test]
fn with_prior_preservation_the_class_is_learned_along() {
    let mut host = Quadratic::new();
    trainer(30, Some(0.5)).train(&mut host).unwrap();
    assert_eq!(host.drawn, 100);
    for batch in &host.batches {
        let (concept, class) = batch.split_at(2);
        assert!(concept.iter().all(|s| s.picture == 0 && s.prompt == "a {}"));
        assert!(class.iter().all(|s| (1..101).contains(&s.picture) && s.prompt == "a cat"));
        // loss = mean of the concept's + 0.5 * mean of the class's, where the host divides by the number of both.
        let share = |samples: &[blocklora_sdk::train::Sample]| samples.iter().map(|s| s.weight).sum::<f32>() / 4.0;
        assert_eq!((share(concept), share(class)), (1.0, 0.5));
    }
    let pictures: std::collections::BTreeSet<_> = host.batches.iter().map(|batch| batch[2].picture).collect();
    assert!(pictures.len() > 15, "{pictures:?}");
}

#[test]
fn the_words_are_the_rare_one_and_the_class_and_do_not_move() {
    let parameters = trainer(20, None).train(&mut Quadratic::new()).unwrap();
    let values: Vec<&[f32]> = parameters.tokens.iter().map(|t| t.values.as_slice()).collect();
    assert_eq!(values, [[0.1, 0.3], [0.1, 0.2]]);
    assert_eq!(parameters.factors.len(), 1, "the text encoder is not trained");
}

#[test]
fn an_empty_instance_prompt_means_captions_and_templates() {
    let mut host = Quadratic::new();
    DreamboothLora { instance_prompt: String::new(), ..trainer(60, None) }.train(&mut host).unwrap();
    let prompts: std::collections::BTreeSet<_> = host.batches.iter().flatten().map(|s| &s.prompt).collect();
    assert!(prompts.len() > 3 && prompts.iter().all(|p| p.contains("{}")), "{prompts:?}");
}

#[test]
fn the_defaults_are_the_published_ones() {
    let DreamboothLora { settings, rare_token, instance_prompt } = DreamboothLora::default();
    let prior = &settings.prior;
    assert_eq!((settings.rank, settings.alpha, settings.learning_rate.unet), (4, 1.0, 5e-4));
    assert_eq!((prior.pictures, prior.weight, prior.enabled), (100, 1.0, false));
    assert_eq!((rare_token.as_str(), instance_prompt.as_str()), ("sks", "a {}"));
    assert!(DreamboothLora::default().check().is_ok());
    let prior = resolve::<DreamboothLora>(&r#"{"prior": {"enabled": true}}"#.parse().unwrap()).unwrap().settings.prior;
    assert_eq!(prior, PriorPreservation { enabled: true, ..PriorPreservation::default() });
}

#[test]
fn bad_settings_name_the_key() {
    let error = |json: &str| resolve::<DreamboothLora>(&json.parse::<Value>().unwrap()).unwrap_err().message;
    assert!(error(r#"{"instance_prompt": "a sks dog"}"#).contains(r#"instance_prompt = "a sks dog": must contain {}"#));
    assert!(error(r#"{"prior": {"prompts": []}}"#).contains("prior.prompts"));
    assert!(error(r#"{"prior": {"prompts": ["a {}", " "]}}"#).contains("prior.prompts"));
    assert!(
        error(r#"{"prior": {"prompts": ["a {}", "a dog"], "pictures": 1}}"#).contains("prior.pictures = 1: must be 2")
    );
    assert!(error(r#"{"prior": {"pictures": 0}}"#).contains("prior.pictures = 0"));
    assert!(error(r#"{"prior": {"weight": -1}}"#).contains("prior.weight = -1: must be 0 to 100"));
    assert!(error(r#"{"rare_token": "two words"}"#).contains("rare_token"));
    assert!(error(r#"{"class_images": 7}"#).contains("class_images"));
    assert!(schema::<DreamboothLora>().unwrap()["properties"]["prior"]["default"]["pictures"] == 100);
}

#[test]
fn a_resumed_run_ends_with_the_same_bits() {
    let trainer = trainer(20, Some(1.0));
    let whole = trainer.train(&mut Quadratic::new()).unwrap();
    let mut host = Quadratic { stop_at: Some(7), ..Quadratic::new() };
    assert!(trainer.train(&mut host).unwrap_err().is_cancelled());
    let mut resumed = Quadratic { saved: host.saved.take(), ..Quadratic::new() };
    assert_eq!(trainer.train(&mut resumed).unwrap(), whole);
}
