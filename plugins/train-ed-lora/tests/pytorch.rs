//! ED-LoRA's training against PyTorch, and its own parts.
#![allow(clippy::unwrap_used)]

use std::path::Path;

use blocklora_sdk::testing::{Quadratic, TrainGolden, check_trainer};
use blocklora_sdk::train::{Augmentation, ConceptSettings, LayerChoice, LearningRates, Parameters, Trainer};
use blocklora_sdk::{Delta, Value, resolve, schema};
use train_ed_lora::EdLora;

fn settings() -> ConceptSettings {
    ConceptSettings {
        steps: 40,
        batch_size: 2,
        rank: 2,
        alpha: 0.7,
        learning_rate: LearningRates { tokens: 0.05, text_encoder: 0.01, unet: 0.02 },
        ..ConceptSettings::default()
    }
}

#[test]
fn equals_pytorch() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/train.json");
    let mut host = Quadratic::new();
    let trainer = EdLora { settings: settings() };
    let golden = TrainGolden::open(&path).unwrap();
    let parameters = check_trainer(&golden, "ed-lora", &trainer, &mut host).unwrap();
    let other = EdLora { settings: ConceptSettings { weight_decay: 0.02, ..settings() } };
    assert!(check_trainer(&golden, "ed-lora", &other, &mut Quadratic::new()).is_err());
    // The limit was reached, so that freezing is part of what was compared.
    let norms: Vec<f32> = parameters.tokens.iter().flat_map(|t| t.values.chunks(2)).map(|v| v[0].hypot(v[1])).collect();
    assert!(norms.iter().sum::<f32>() / norms.len() as f32 >= 0.55);
}

#[test]
fn a_concept_owns_every_row_of_the_attention_and_has_a_vector_for_each_layer() {
    let mut host = Quadratic::new();
    let trainer = EdLora { settings: ConceptSettings { steps: 2, ..settings() } };
    let parameters = trainer.train(&mut host).unwrap();
    assert_eq!(parameters.factors.iter().map(|f| f.layer).collect::<Vec<_>>(), [0, 1]);
    assert!(parameters.factors.iter().all(|f| f.rows.iter().copied().eq(0..Quadratic::M as u32) && !f.a_is_frozen));
    assert!(parameters.tokens.iter().all(|t| t.layers == 3));
    assert!(host.seen_masks.iter().all(|&mask| mask == 1.0));
    let all = EdLora { settings: ConceptSettings { layers: LayerChoice::All, steps: 1, ..settings() } };
    assert_eq!(all.train(&mut Quadratic::new()).unwrap().factors.len(), 3);
}

/// What a concept of this name starts from, with the seed that everyone has.
fn start_of(name: &str) -> Parameters {
    let still = LearningRates { tokens: 0.0, text_encoder: 0.0, unet: 0.0 };
    let trainer = EdLora { settings: ConceptSettings { steps: 1, learning_rate: still, ..settings() } };
    let mut host = Quadratic::new();
    host.concept.name = name.into();
    trainer.train(&mut host).unwrap()
}

#[test]
fn concepts_of_one_seed_start_apart() {
    let (milo, zuko) = (start_of("milo"), start_of("zuko"));
    assert_eq!(milo, start_of("milo"));
    for (x, y) in milo.factors.iter().zip(&zuko.factors) {
        assert!(x.a.iter().zip(&y.a).all(|(x, y)| x != y), "layer {}: numbers of A are the same", x.layer);
    }
    assert_ne!(milo.tokens[0].values, zuko.tokens[0].values);
}

#[test]
fn a_limit_that_the_words_reach_before_the_first_step_is_not_kept() {
    let trained = |limit| {
        let trainer = EdLora { settings: ConceptSettings { token_norm_limit: limit, ..settings() } };
        let mut host = Quadratic::new();
        (trainer.train(&mut host).unwrap().tokens, host.job.log.into_inner().unwrap())
    };
    let (free, silent) = trained(0.0);
    assert!(silent.is_empty(), "{silent:?}");
    let (tokens, said) = trained(0.05);
    assert_eq!(tokens, free);
    assert!(said.iter().any(|(_, line)| line.contains("token_norm_limit = 0.05")), "{said:?}");
    assert_ne!(trained(0.3).0, free, "a limit that can be kept is");
}

#[test]
fn the_class_words_vector_starts_the_second_name() {
    let still = LearningRates { tokens: 0.0, ..settings().learning_rate };
    let trainer = EdLora { settings: ConceptSettings { learning_rate: still, ..settings() } };
    let tokens = trainer.train(&mut Quadratic::new()).unwrap().tokens;
    assert_eq!(tokens[1].values, [0.1, 0.2, 0.1, 0.2, 0.1, 0.2]);
    assert!(tokens[0].values.iter().all(|x| x.abs() < 5.0 * 0.013));
    assert_eq!((tokens[0].name.as_str(), tokens[1].name.as_str()), ("milo-1", "milo-2"));
}

/// Scale 1 means a canvas that is filled, so that a picture with another shape is cropped.
#[test]
fn a_smallest_scale_of_1_still_shows_pictures_whole() {
    let augmentation = Augmentation { fill: 0.0, min_scale: 1.0, flip: false };
    let trainer = EdLora { settings: ConceptSettings { augmentation, ..settings() } };
    let mut host = Quadratic::new();
    trainer.train(&mut host).unwrap();
    assert!(host.batches.iter().flatten().all(|s| s.placement.scale < 1.0 && s.placement.scale > 0.9999));
    let filled = Augmentation { fill: 1.0, ..augmentation };
    let trainer = EdLora { settings: ConceptSettings { augmentation: filled, ..settings() } };
    let mut host = Quadratic::new();
    trainer.train(&mut host).unwrap();
    assert!(host.batches.iter().flatten().all(|s| s.placement.scale == 1.0));
}

#[test]
fn the_plan_says_what_the_parameters_are() {
    let host = Quadratic::new();
    let plan = EdLora::default().plan(&host.concept).unwrap();
    assert_eq!((plan.rank, plan.alpha, plan.delta, plan.partition), (4, 1.0, Delta::Alpha, None));
    assert_eq!((plan.erasure_lambda, plan.steps, plan.tokens), (0.0, 1000, vec!["milo-1".into(), "milo-2".into()]));
}

#[test]
fn blocks_and_erasure_are_no_settings_of_it() {
    for key in ["partition", "erasure"] {
        let json: Value = format!("{{\"{key}\": null}}").parse().unwrap();
        assert!(resolve::<EdLora>(&json).unwrap_err().message.contains(key));
    }
    assert_eq!(schema::<EdLora>().unwrap()["properties"]["rank"]["default"], 4);
    assert!(resolve::<EdLora>(&r#"{"alpha": -1}"#.parse().unwrap()).unwrap_err().message.contains("alpha = -1"));
}

#[test]
fn a_resumed_run_ends_with_the_same_bits() {
    let trainer = EdLora { settings: settings() };
    let whole = trainer.train(&mut Quadratic::new()).unwrap();
    for stop in [1, 20, 39] {
        let mut host = Quadratic { stop_at: Some(stop), ..Quadratic::new() };
        assert!(trainer.train(&mut host).unwrap_err().is_cancelled());
        host.stop_at = None;
        assert_eq!(trainer.train(&mut host).unwrap(), whole, "stopped at {stop}");
    }
}
