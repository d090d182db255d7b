//! The training loop on problems whose answer is known, through the same interface that the engine serves.

#![allow(clippy::unwrap_used)]

use super::host::{ErasureMasks, Parameters, Sample, TrainHost, TrainState, Trainer};
use super::{BlockLora, Concept, EdLora, Erasure, LearningRates, RateSchedule, TrainConfig};
use crate::error::{Error, Result};
use crate::merge::strategy::LayerInfo;
use crate::rng::{Rng, Stream};

/// loss = 1/2 sum over layers |mask ⊙ (B A) - T[rows]|^2 + 1/2 |tokens - 1|^2: the least is T's best approximation.
struct Quadratic {
    layers: Vec<LayerInfo>,
    target: Vec<f32>,
    captions: Vec<Option<String>>,
    stop_at: Option<usize>,
    saved: Option<TrainState>,
    seen_masks: Vec<f32>,
    losses: Vec<f32>,
}

const M: usize = 24;
const N: usize = 6;

impl Quadratic {
    fn new() -> Self {
        let layer = |name: &str| LayerInfo { name: name.into(), rows: M, columns: N };
        // Rank 1, so that rank 2 factors can reach it exactly.
        let target = (0..M * N).map(|i| ((i / N) as f32 * 0.1 - 1.0) * ((i % N) as f32 * 0.3 - 0.7)).collect();
        Self {
            layers: vec![layer("unet.x.to_q"), layer("text_encoder.x.k_proj"), layer("unet.x.ff.net.2")],
            target,
            captions: vec![None],
            stop_at: None,
            saved: None,
            seen_masks: Vec::new(),
            losses: Vec::new(),
        }
    }
}

impl TrainHost for Quadratic {
    fn layers(&self) -> &[LayerInfo] {
        &self.layers
    }
    fn cross_attention_layers(&self) -> usize {
        3
    }
    fn embedding(&self, _word: &str) -> Result<Vec<f32>> {
        Ok(vec![0.1, 0.2])
    }
    fn captions(&self) -> &[Option<String>] {
        &self.captions
    }
    fn latent_shape(&self) -> [usize; 3] {
        [2, 2, 2]
    }
    fn num_train_timesteps(&self) -> usize {
        1000
    }
    fn loss_and_gradients(
        &mut self,
        parameters: &Parameters,
        masks: &ErasureMasks,
        _batch: &[Sample],
        gradients: &mut Parameters,
    ) -> Result<f32> {
        gradients.clone_from(parameters);
        gradients.tensors_mut().for_each(|t| t.fill(0.0));
        let mut loss = 0.0;
        for (i, f) in parameters.factors.iter().enumerate() {
            let out = &mut gradients.factors[i];
            for (p, &row) in f.rows.iter().enumerate() {
                let mask = masks.get(i).map_or(1.0, |m| m[p]);
                self.seen_masks.push(mask);
                for q in 0..N {
                    let value: f32 = (0..f.rank).map(|k| f.b[p * f.rank + k] * f.a[k * N + q]).sum();
                    let error = mask * (f.scale * value - self.target[row as usize * N + q]);
                    loss += 0.5 * error * error;
                    for k in 0..f.rank {
                        out.b[p * f.rank + k] += f.scale * error * f.a[k * N + q];
                        out.a[k * N + q] += f.scale * error * f.b[p * f.rank + k];
                    }
                }
            }
        }
        for (t, out) in parameters.tokens.iter().zip(&mut gradients.tokens) {
            for (value, out) in t.values.iter().zip(&mut out.values) {
                *out = value - 1.0;
                loss += 0.5 * *out * *out;
            }
        }
        Ok(loss)
    }
    fn rng(&self, stream: Stream, step: usize, lane: usize) -> Rng {
        Rng::new(5, stream, step as u32, lane as u16)
    }
    fn resume(&mut self) -> Result<Option<TrainState>> {
        Ok(self.saved.take())
    }
    fn step_done(&mut self, state: &TrainState, _steps: usize, loss: f32) -> Result<()> {
        self.losses.push(loss);
        if self.stop_at == Some(state.step) {
            self.saved = Some(state.clone());
            return Err(Error::Cancelled);
        }
        Ok(())
    }
}

fn concept() -> Concept {
    Concept { name: "milo".into(), class_word: "cat".into(), kind: blocklora_spec::Kind::Subject }
}

fn config() -> TrainConfig {
    TrainConfig {
        steps: 600,
        batch_size: 1,
        rank: 2,
        learning_rate: LearningRates { tokens: 0.02, text_encoder: 0.02, unet: 0.02 },
        schedule: RateSchedule::Linear,
        weight_decay: 0.0,
        token_norm_limit: 0.0,
        ..TrainConfig::default()
    }
}

fn partition(slot: u32) -> blocklora_spec::Partition {
    blocklora_spec::Partition { scheme: blocklora_spec::Scheme::Contiguous, capacity: 4, seed: 0, slot }
}

#[test]
fn ed_lora_reaches_the_known_optimum() {
    let mut host = Quadratic::new();
    let trainer = EdLora { concept: concept(), config: config() };
    let parameters = trainer.train(&mut host).unwrap();
    assert_eq!(parameters.factors.len(), 2, "only attention projections are adapted");
    assert_eq!(host.losses.len(), 600);
    let last = *host.losses.last().unwrap();
    assert!(last < 1e-4 * host.losses[0], "{} -> {last}", host.losses[0]);
    assert!(parameters.tokens.iter().flat_map(|t| &t.values).all(|v| (v - 1.0).abs() < 1e-2));
}

#[test]
fn blocklora_trains_its_rows_only_and_erases_the_stated_share() {
    let mut host = Quadratic::new();
    let erasure = Erasure { lambda: 0.3, ..Erasure::default() };
    let config = TrainConfig { partition: Some(partition(2)), erasure: Some(erasure), ..config() };
    let parameters = BlockLora { concept: concept(), config }.train(&mut host).unwrap();
    for f in &parameters.factors {
        assert_eq!(&f.rows[..], &[12, 13, 14, 15, 16, 17]);
        assert_eq!(f.b.len(), 6 * 2);
    }
    let erased = host.seen_masks.iter().filter(|&&m| m == 0.0).count() as f32 / host.seen_masks.len() as f32;
    assert!((erased - 0.3).abs() < 0.02, "{erased}");
    // Masks are 0 or 1, so the optimum of the masked problem is the unmasked one: erasure does not move it.
    let f = &parameters.factors[0];
    for (p, &row) in f.rows.iter().enumerate() {
        for q in 0..N {
            let value: f32 = (0..2).map(|k| f.b[p * 2 + k] * f.a[k * N + q]).sum();
            assert!((value - host.target[row as usize * N + q]).abs() < 2e-2);
        }
    }
}

#[test]
fn an_output_is_erased_alike_whoever_owns_it() {
    let masks = |partition| {
        let mut host = Quadratic::new();
        let erasure = Some(Erasure { lambda: 0.5, ..Erasure::default() });
        let config = TrainConfig { steps: 1, partition, erasure, ..config() };
        BlockLora { concept: concept(), config }.train(&mut host).unwrap();
        host.seen_masks
    };
    let (all, slot) = (masks(None), masks(Some(partition(1))));
    assert_eq!(slot[..6], all[6..12]);
}

#[test]
fn a_resumed_run_ends_with_the_same_bits() {
    let trainer = BlockLora { concept: concept(), config: TrainConfig { steps: 40, ..config() } };
    let whole = trainer.train(&mut Quadratic::new()).unwrap();
    for stop in [1, 17, 39] {
        let mut host = Quadratic { stop_at: Some(stop), ..Quadratic::new() };
        assert!(matches!(trainer.train(&mut host), Err(Error::Cancelled)));
        host.stop_at = None;
        assert_eq!(trainer.train(&mut host).unwrap(), whole, "stopped at {stop}");
    }
}

#[test]
fn tokens_freeze_at_their_norm_limit() {
    let mut host = Quadratic::new();
    let config = TrainConfig { token_norm_limit: 0.5, ..config() };
    let parameters = EdLora { concept: concept(), config }.train(&mut host).unwrap();
    let norms: Vec<f32> =
        parameters.tokens.iter().flat_map(|t| t.values.chunks(2)).map(|v| (v[0] * v[0] + v[1] * v[1]).sqrt()).collect();
    let mean = norms.iter().sum::<f32>() / norms.len() as f32;
    assert!((0.5..0.56).contains(&mean), "{mean}");
}

#[test]
fn a_loss_that_is_not_finite_ends_the_run() {
    let mut host = Quadratic::new();
    host.target[3] = f32::NAN;
    let error = EdLora { concept: concept(), config: config() }.train(&mut host).unwrap_err();
    assert!(error.to_string().contains("the loss is not finite"), "{error}");
}

#[test]
fn bad_settings_name_the_key() {
    let with = |change: fn(&mut TrainConfig)| {
        let mut config = config();
        change(&mut config);
        BlockLora { concept: concept(), config }.train(&mut Quadratic::new()).unwrap_err().to_string()
    };
    assert!(with(|c| c.rank = 0).contains("rank = 0"));
    assert!(with(|c| c.erasure = Some(Erasure { lambda: 1.5, ..Erasure::default() })).contains("erasure.lambda"));
    assert!(with(|c| c.partition = Some(partition(4))).contains("partition.slot = 4"));
    let config = TrainConfig { partition: Some(partition(0)), ..config() };
    let error = EdLora { concept: concept(), config }.train(&mut Quadratic::new()).unwrap_err();
    assert!(error.to_string().contains("blocklora"), "{error}");
}
