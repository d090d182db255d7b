//! The trainer on a problem whose optimum is known.
#![allow(clippy::unwrap_used)]

use blocklora_sdk::testing::Quadratic;
use blocklora_sdk::train::{
    ConceptSettings, Erasure, LearningRates, PriorPreservation, Silence, TokenFactors, TrainHost, Trainer,
};
use blocklora_sdk::{Config, Partition, Scheme, resolve};
use train_blocklora::Blocklora;

fn settings() -> ConceptSettings {
    ConceptSettings {
        steps: 600,
        batch_size: 1,
        rank: 2,
        learning_rate: LearningRates { tokens: 0.02, text_encoder: 0.02, unet: 0.02 },
        weight_decay: 0.0,
        token_norm_limit: 0.0,
        ..ConceptSettings::default()
    }
}

fn partition(slot: u32) -> Option<Partition> {
    Some(Partition { scheme: Scheme::Contiguous, capacity: 4, seed: 0, slot })
}

const NO_ERASURE: Erasure = Erasure { lambda: 0.0, ..erasure() };

const fn erasure() -> Erasure {
    Erasure { lambda: 0.3, scope: blocklora_sdk::train::ErasureScope::Step, rescale: false }
}

#[test]
fn reaches_the_optimum_on_its_own_rows() {
    let mut host = Quadratic::new();
    let trainer = Blocklora { settings: settings(), partition: partition(2), erasure: NO_ERASURE };
    let parameters = trainer.train(&mut host).unwrap();
    assert_eq!(parameters.factors.len(), 2, "only attention projections are adapted");
    assert_eq!(host.losses.len(), 600);
    let last = *host.losses.last().unwrap();
    assert!(last < 1e-4 * host.losses[0], "{} -> {last}", host.losses[0]);
    for f in &parameters.factors {
        assert_eq!(*f.rows, [12, 13, 14, 15, 16, 17]);
        for (p, &row) in f.rows.iter().enumerate() {
            for q in 0..Quadratic::N {
                let value: f32 = (0..2).map(|k| f.b[p * 2 + k] * f.a[k * Quadratic::N + q]).sum();
                assert!((value - host.target[row as usize * Quadratic::N + q]).abs() < 2e-2);
            }
        }
    }
    let plan = trainer.plan(&host.concept).unwrap();
    assert_eq!(plan.partition, partition(2));
    assert_eq!(plan.tokens, parameters.tokens.iter().map(|t| t.name.clone()).collect::<Vec<_>>());
    assert!(parameters.factors.iter().all(|f| f.scale == plan.scale() && f.rank == plan.rank));
}

#[test]
fn silence_is_asked_for_with_other_words_and_moves_no_word() {
    let prior = PriorPreservation { enabled: true, weight: 0.0, pictures: 4, ..PriorPreservation::default() };
    let settings =
        ConceptSettings { steps: 60, prior, silence: Silence { weight: 2.0, ..Silence::default() }, ..settings() };
    let words = |settings: &ConceptSettings| {
        let mut host = Quadratic::new();
        let trainer = Blocklora { settings: settings.clone(), partition: partition(1), erasure: NO_ERASURE };
        (trainer.train(&mut host).unwrap().tokens, host)
    };
    let (learned, host) = words(&settings);
    let (alone, _) = words(&ConceptSettings { silence: Silence::default(), ..settings.clone() });
    assert_eq!(learned, alone, "a made-up word taught the concept's own");
    let (silent, concept): (Vec<_>, Vec<_>) = host.batches.iter().enumerate().partition(|(i, _)| i % 2 == 1);
    assert_eq!((silent.len(), concept.len()), (60, 60));
    let own = host.embedding("cat").unwrap();
    assert!(host.drift_words.iter().all(|words| words != &learned && words[1].values[..2] != own[..]));
    assert!(host.drift_words.windows(2).all(|pair| pair[0] != pair[1]), "every step makes up new words");
    let samples = || silent.iter().flat_map(|(_, batch)| batch.iter());
    assert!(samples().any(|s| s.prompt.contains("{}")) && samples().any(|s| !s.prompt.contains("{}")));
    assert!(concept.iter().all(|(_, batch)| batch.len() == 1), "a prior of weight 0 is not learned");
}

#[test]
fn an_output_is_erased_alike_whoever_owns_it() {
    let masks = |partition| {
        let mut host = Quadratic::new();
        let settings = ConceptSettings { steps: 1, ..settings() };
        Blocklora { settings, partition, erasure: Erasure { lambda: 0.5, ..erasure() } }.train(&mut host).unwrap();
        host.seen_masks
    };
    let (all, slot) = (masks(None), masks(partition(1)));
    assert_eq!(slot[..6], all[6..12]);
    assert!(all.contains(&0.0) && all.contains(&1.0));
}

#[test]
fn a_resumed_run_ends_with_the_same_bits() {
    let settings = ConceptSettings { steps: 40, ..settings() };
    let trainer = Blocklora { settings, partition: None, erasure: erasure() };
    let whole = trainer.train(&mut Quadratic::new()).unwrap();
    for stop in [1, 17, 39] {
        let mut host = Quadratic { stop_at: Some(stop), ..Quadratic::new() };
        assert!(trainer.train(&mut host).unwrap_err().is_cancelled());
        host.stop_at = None;
        assert_eq!(trainer.train(&mut host).unwrap(), whole, "stopped at {stop}");
    }
}

#[test]
fn tokens_freeze_at_their_norm_limit() {
    let settings = ConceptSettings { token_norm_limit: 0.5, ..settings() };
    let trainer = Blocklora { settings, partition: None, erasure: NO_ERASURE };
    let parameters = trainer.train(&mut Quadratic::new()).unwrap();
    let norm = |v: &[f32]| (v[0] * v[0] + v[1] * v[1]).sqrt();
    let norms = |t: &TokenFactors| t.values.chunks(2).map(norm).collect::<Vec<_>>();
    let norms: Vec<f32> = parameters.tokens.iter().flat_map(norms).collect();
    let mean = norms.iter().sum::<f32>() / norms.len() as f32;
    assert!((0.5..0.56).contains(&mean), "{mean}");
}

#[test]
fn a_loss_that_is_not_finite_ends_the_run() {
    let mut host = Quadratic::new();
    host.target[3] = f32::NAN;
    let error = Blocklora { settings: settings(), ..Default::default() }.train(&mut host).unwrap_err();
    assert!(error.message.contains("the loss is not finite"), "{error}");
}

#[test]
fn bad_settings_name_the_key() {
    let error = |json: &str| resolve::<Blocklora>(&json.parse().unwrap()).unwrap_err().message;
    assert!(error(r#"{"rank": 0}"#).contains("rank = 0: must be 1 to 1024"));
    assert!(error(r#"{"erasure": {"lambda": 1.5}}"#).contains("erasure.lambda = 1.5"));
    assert!(error(r#"{"lerning_rate": 1}"#).contains("lerning_rate"));
    let slot = r#"{"partition": {"scheme": "strided", "capacity": 4, "seed": 0, "slot": 4}}"#;
    assert!(error(slot).contains("partition.slot = 4: must be 0 to 3"));
    assert!(Blocklora { partition: partition(3), ..Default::default() }.check().is_ok());
}
