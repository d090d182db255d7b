//! A training problem whose optimum is known.

use std::ops::Range;

use super::job::{TestJob, delegate_job};
use crate::Kind;
use crate::error::{Code, Error, Result};
use crate::merge::Layer;
use crate::train::{Concept, ErasureMasks, Parameters, PictureRequest, Sample, TokenFactors, TrainHost, TrainState};

/// loss = 1/N sum_i weight_i error_i + 1/2 |tokens - 1|^2, where the error of a sample is 1/2 sum over layers
/// |mask * (scale B A - T\[rows\])|^2 for a picture of the concept, and the same with zeros for T for a picture that was
/// drawn (the class stays what it was). Without those, its least is the best approximation of T by the factors, and 0
/// from rank 1 on, since T has that rank; with as many of them, weighted by lambda, it lies at T / (1 + lambda).
#[derive(Debug)]
pub struct Quadratic {
    /// The services of its job.
    pub job: TestJob,
    /// The concept.
    pub concept: Concept,
    /// A UNet's attention Linear, a text encoder's, and one that is no attention; each [`Self::M`] x [`Self::N`].
    pub layers: Vec<Layer>,
    /// T, [M, N], for each layer.
    pub target: Vec<f32>,
    /// The concept's pictures.
    pub captions: Vec<Option<String>>,
    /// Pictures drawn for the trainer.
    pub drawn: usize,
    /// Cancel after this many steps.
    pub stop_at: Option<usize>,
    /// What was saved then.
    pub saved: Option<TrainState>,
    /// Every element of every mask seen.
    pub seen_masks: Vec<f32>,
    /// Every batch seen.
    pub batches: Vec<Vec<Sample>>,
    /// The words of every drift asked for.
    pub drift_words: Vec<Vec<TokenFactors>>,
    /// The loss of every step.
    pub losses: Vec<f32>,
}

delegate_job!(Quadratic);

impl Default for Quadratic {
    fn default() -> Self {
        Self::new()
    }
}

impl Quadratic {
    /// Outputs of every layer.
    pub const M: usize = 24;
    /// Inputs of every layer.
    pub const N: usize = 6;
    /// A word that is no token of the vocabulary; every other one is.
    pub const UNKNOWN: &str = "xyzzyqwv";

    /// The problem.
    pub fn new() -> Self {
        let layer = |name: &str| Layer { name: name.into(), rows: Self::M, columns: Self::N };
        let target = (0..Self::M * Self::N)
            .map(|i| ((i / Self::N) as f32 * 0.1 - 1.0) * ((i % Self::N) as f32 * 0.3 - 0.7))
            .collect();
        Self {
            job: TestJob::new(5),
            concept: Concept { name: "milo".into(), class_word: "cat".into(), kind: Kind::Subject },
            layers: vec![layer("unet.x.to_q"), layer("text_encoder.x.k_proj"), layer("unet.x.ff.net.2")],
            target,
            captions: vec![None],
            drawn: 0,
            stop_at: None,
            saved: None,
            seen_masks: Vec::new(),
            batches: Vec::new(),
            drift_words: Vec::new(),
            losses: Vec::new(),
        }
    }
}

impl TrainHost for Quadratic {
    fn concept(&self) -> &Concept {
        &self.concept
    }
    fn layers(&self) -> &[Layer] {
        &self.layers
    }
    fn cross_attention_layers(&self) -> usize {
        3
    }
    fn latent_shape(&self) -> [usize; 3] {
        [2, 2, 2]
    }
    fn num_train_timesteps(&self) -> usize {
        1000
    }
    fn captions(&self) -> &[Option<String>] {
        &self.captions
    }
    fn embedding(&self, word: &str) -> Result<Vec<f32>> {
        if word == Self::UNKNOWN {
            return Err(Error::new(Code::Host, format!("word = {word}: it must be one token")));
        }
        Ok(vec![0.1, if word == "cat" { 0.2 } else { 0.3 }])
    }
    fn check_prompt(&self, _prompt: &str, _tokens: usize) -> Result<()> {
        Ok(())
    }
    fn generate(&mut self, request: &PictureRequest) -> Result<Range<usize>> {
        let start = self.captions.len() + self.drawn;
        self.drawn += request.count;
        Ok(start..start + request.count)
    }
    fn loss_and_gradients(
        &mut self,
        parameters: &Parameters,
        masks: &ErasureMasks,
        batch: &[Sample],
        gradients: &mut Parameters,
    ) -> Result<f32> {
        if batch.iter().any(|s| s.picture >= self.captions.len() + self.drawn || s.timestep >= 1000) {
            return Err(Error::contract("a sample names a picture or a timestep that is not there"));
        }
        self.batches.push(batch.to_vec());
        gradients.clone_from(parameters);
        gradients.tensors_mut().for_each(|t| t.fill(0.0));
        let share = |of_class: bool| {
            let chosen = batch.iter().filter(|s| (s.picture >= self.captions.len()) == of_class);
            chosen.map(|s| s.weight).sum::<f32>() / batch.len() as f32
        };
        let (concept, class) = (share(false), share(true));
        let mut loss = 0.0;
        for (i, f) in parameters.factors.iter().enumerate() {
            let out = &mut gradients.factors[i];
            for (p, &row) in f.rows.iter().enumerate() {
                let mask = masks.get(i).map_or(1.0, |m| m[p]);
                self.seen_masks.push(mask);
                for q in 0..Self::N {
                    let value: f32 = (0..f.rank).map(|k| f.b[p * f.rank + k] * f.a[k * Self::N + q]).sum();
                    let error = mask * (f.scale * value - self.target[row as usize * Self::N + q]);
                    let drift = mask * f.scale * value;
                    loss += concept * 0.5 * error * error + class * 0.5 * drift * drift;
                    let slope = f.scale * (concept * error + class * drift);
                    for k in 0..f.rank {
                        out.b[p * f.rank + k] += slope * f.a[k * Self::N + q];
                        out.a[k * Self::N + q] += slope * f.b[p * f.rank + k];
                    }
                }
            }
            if f.a_is_frozen {
                out.a.fill(0.0);
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
    /// 1/2 sum over layers |mask * scale B A|^2, as if every sample weighed the same under any words.
    fn drift_and_gradients(
        &mut self,
        parameters: &Parameters,
        masks: &ErasureMasks,
        batch: &[Sample],
        gradients: &mut Parameters,
    ) -> Result<f32> {
        self.drift_words.push(parameters.tokens.clone());
        let of_class = |s: &Sample| Sample { picture: self.captions.len(), ..s.clone() };
        let batch: Vec<Sample> = batch.iter().map(of_class).collect();
        let drawn = std::mem::replace(&mut self.drawn, 1);
        let drift = self.loss_and_gradients(parameters, masks, &batch, gradients);
        self.drawn = drawn;
        let of_words = parameters.tokens.iter().flat_map(|t| &t.values).map(|v| 0.5 * (v - 1.0) * (v - 1.0));
        gradients.tokens.iter_mut().for_each(|t| t.values.fill(0.0));
        Ok(drift? - of_words.sum::<f32>())
    }
    fn resume(&mut self) -> Result<Option<TrainState>> {
        Ok(self.saved.take())
    }
    fn step_done(&mut self, state: &TrainState, steps: usize, loss: f32) -> Result<()> {
        crate::job::Job::progress(self, state.step as u64, steps as u64);
        self.losses.push(loss);
        if self.stop_at == Some(state.step) {
            self.saved = Some(state.clone());
            return Err(Error::cancelled());
        }
        Ok(())
    }
}
