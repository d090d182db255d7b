//! Orthogonal Adaptation's training against PyTorch, and the basis that concepts share.
#![allow(clippy::unwrap_used)]

use std::path::Path;

use blocklora_sdk::merge::Layer;
use blocklora_sdk::testing::{Quadratic, TestJob, TrainGolden, check_trainer};
use blocklora_sdk::train::{ConceptSettings, LayerChoice, LayerFactors, LearningRates, Trainer};
use blocklora_sdk::{Value, resolve};
use train_orthogonal::{Allocation, Orthogonal};

fn trainer(allocation: Allocation, slot: usize) -> Orthogonal {
    let default = Orthogonal::default();
    let settings = ConceptSettings {
        steps: 40,
        batch_size: 2,
        rank: 2,
        learning_rate: LearningRates { tokens: 0.05, text_encoder: 0.01, unet: 0.02 },
        token_norm_limit: 0.0,
        ..default.settings
    };
    Orthogonal { settings, allocation, slot, basis_seed: 9 }
}

/// The factors that one step of `trainer` makes for the user of this seed, on the layers of the quadratic problem.
fn factors(trainer: &Orthogonal, seed: u64) -> Vec<LayerFactors> {
    let mut trainer = trainer.clone();
    trainer.settings.steps = 1;
    trainer.train(&mut Quadratic { job: TestJob::new(seed), ..Quadratic::new() }).unwrap().factors
}

fn dot(x: &[f32], y: &[f32]) -> f64 {
    x.iter().zip(y).map(|(x, y)| f64::from(x * y)).sum()
}

#[test]
fn equals_pytorch() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/train.json");
    let golden = TrainGolden::open(&path).unwrap();
    check_trainer(&golden, "orthogonal random", &trainer(Allocation::Random, 0), &mut Quadratic::new()).unwrap();
    check_trainer(&golden, "orthogonal slot=1", &trainer(Allocation::Allocated, 1), &mut Quadratic::new()).unwrap();
}

#[test]
fn a_is_orthonormal_and_never_moves() {
    for allocation in [Allocation::Random, Allocation::Allocated] {
        let mut trainer = trainer(allocation, 0);
        trainer.settings.rank = 6;
        let first = factors(&trainer, 1);
        let last = trainer.train(&mut Quadratic { job: TestJob::new(1), ..Quadratic::new() }).unwrap().factors;
        assert_eq!(first.len(), 3, "every Linear, not only attention");
        for (first, last) in first.iter().zip(&last) {
            assert!(last.a_is_frozen);
            assert_eq!(first.a, last.a);
            assert_ne!(first.b, last.b);
            let rows: Vec<&[f32]> = first.a.chunks(Quadratic::N).collect();
            for (i, x) in rows.iter().enumerate() {
                for (j, y) in rows.iter().enumerate() {
                    assert!((dot(x, y) - f64::from(u8::from(i == j))).abs() < 1e-6, "{i} {j}: {}", dot(x, y));
                }
            }
        }
    }
}

/// The same of a concept of this name, with the seed that everyone has.
fn factors_of(trainer: &Orthogonal, name: &str) -> Vec<LayerFactors> {
    let mut trainer = trainer.clone();
    trainer.settings.steps = 1;
    let mut host = Quadratic::new();
    host.concept.name = name.into();
    trainer.train(&mut host).unwrap().factors
}

#[test]
fn concepts_of_one_seed_draw_their_own_rows_and_share_the_basis() {
    let random = trainer(Allocation::Random, 0);
    let (milo, zuko) = (factors_of(&random, "milo"), factors_of(&random, "zuko"));
    assert_eq!(milo, factors_of(&random, "milo"));
    assert!(milo.iter().zip(&zuko).any(|(x, y)| x.a != y.a), "two concepts have the same rows everywhere");
    // All of a layer's rows, whoever draws them, are those of one matrix.
    let whole = Orthogonal { settings: ConceptSettings { rank: Quadratic::N, ..random.settings.clone() }, ..random };
    let sorted = |name| {
        let mut rows: Vec<Vec<u32>> = factors_of(&whole, name)[0].a.chunks(Quadratic::N).map(bits).collect();
        rows.sort();
        rows
    };
    assert_eq!(sorted("milo"), sorted("zuko"));
    // A slot's rows belong to the slot, whatever its concept is called.
    let allocated = trainer(Allocation::Allocated, 1);
    let a = |name| factors_of(&allocated, name).into_iter().map(|f| f.a).collect::<Vec<_>>();
    assert_eq!(a("milo"), a("zuko"));
}

fn bits(row: &[f32]) -> Vec<u32> {
    row.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn two_users_of_one_slot_have_one_a_and_of_two_slots_orthogonal_changes() {
    let slots: Vec<Vec<LayerFactors>> =
        (0..3).map(|slot| factors(&trainer(Allocation::Allocated, slot), 10 + slot as u64)).collect();
    let other_user = factors(&trainer(Allocation::Allocated, 1), 99);
    for (mine, theirs) in slots[1].iter().zip(&other_user) {
        assert_eq!(mine.a, theirs.a);
    }
    for i in 0..3 {
        for j in 0..i {
            for (x, y) in slots[i].iter().zip(&slots[j]) {
                for x in x.a.chunks(Quadratic::N) {
                    assert!(y.a.chunks(Quadratic::N).all(|y| dot(x, y).abs() < 1e-6));
                }
            }
        }
    }
}

#[test]
fn random_users_draw_other_rows_of_the_same_basis() {
    let (mine, theirs) = (factors(&trainer(Allocation::Random, 0), 1), factors(&trainer(Allocation::Random, 0), 2));
    assert!(mine.iter().zip(&theirs).any(|(x, y)| x.a != y.a));
    // Every row of either is, up to rounding, a row of the basis: equal to one of the other's or orthogonal to it.
    for (x, y) in mine.iter().zip(&theirs) {
        for x in x.a.chunks(Quadratic::N) {
            for y in y.a.chunks(Quadratic::N) {
                let cosine = dot(x, y);
                assert!(cosine.abs() < 1e-6 || (cosine - 1.0).abs() < 1e-6, "{cosine}");
            }
        }
    }
    let other_basis = factors(&Orthogonal { basis_seed: 8, ..trainer(Allocation::Random, 0) }, 1);
    assert_ne!(mine[0].a, other_basis[0].a);
}

/// A of `trainer` for a layer of this many inputs. (The quadratic problem looks at the first few of them only.)
fn a_of(trainer: &Orthogonal, width: usize) -> blocklora_sdk::Result<Vec<f32>> {
    let layers = vec![Layer { name: "unet.x.to_q".into(), rows: Quadratic::M, columns: width }];
    let mut trainer = trainer.clone();
    trainer.settings.steps = 1;
    let parameters = trainer.train(&mut Quadratic { layers, ..Quadratic::new() })?;
    Ok(parameters.factors[0].a.clone())
}

/// Stable Diffusion's narrowest attention, with the published rank.
#[test]
fn sixteen_concepts_fit_320_inputs_and_together_make_the_whole_basis() {
    let slot = |slot| Orthogonal { allocation: Allocation::Allocated, slot, ..Orthogonal::default() };
    let basis: Vec<f32> = (0..16).flat_map(|s| a_of(&slot(s), 320).unwrap()).collect();
    let rows: Vec<&[f32]> = basis.chunks(320).collect();
    assert_eq!(rows.len(), 320);
    for (i, x) in rows.iter().enumerate() {
        for (j, y) in rows[..=i].iter().enumerate() {
            assert!((dot(x, y) - f64::from(u8::from(i == j))).abs() < 1e-6, "{i} {j}: {}", dot(x, y));
        }
    }
    let error = a_of(&slot(16), 320).unwrap_err().message;
    assert!(error.contains("slot = 16: must be below 16, since unet.x.to_q has 320 inputs"), "{error}");
    let error = a_of(&slot(0), 12).unwrap_err().message;
    assert!(error.contains("rank = 20: must be at most 12, the inputs of unet.x.to_q"), "{error}");
}

#[test]
fn the_defaults_are_the_published_ones() {
    let Orthogonal { settings, allocation, basis_seed, .. } = Orthogonal::default();
    assert_eq!((settings.rank, settings.alpha, settings.layers), (20, 1.0, LayerChoice::All));
    assert_eq!((settings.learning_rate.tokens, settings.learning_rate.unet), (1e-3, 1e-5));
    assert_eq!((allocation, basis_seed), (Allocation::Random, 0));
    let error = |json: &str| resolve::<Orthogonal>(&json.parse::<Value>().unwrap()).unwrap_err().message;
    assert!(error(r#"{"slot": 3}"#).contains("slot = 3: means nothing without allocation"));
    assert!(error(r#"{"allocation": "fair"}"#).contains("fair"));
    assert!(error(r#"{"rank": 0}"#).contains("rank = 0"));
}

#[test]
fn a_resumed_run_ends_with_the_same_bits() {
    let trainer = trainer(Allocation::Random, 0);
    let whole = trainer.train(&mut Quadratic::new()).unwrap();
    let mut host = Quadratic { stop_at: Some(11), ..Quadratic::new() };
    assert!(trainer.train(&mut host).unwrap_err().is_cancelled());
    host.stop_at = None;
    assert_eq!(trainer.train(&mut host).unwrap(), whole);
}
