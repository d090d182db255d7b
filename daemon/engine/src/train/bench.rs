//! What a training step costs.

use std::time::Instant;

use serde::Serialize;

use super::dataset::Dataset;
use super::engine_host::{EngineHost, Progress};
use super::host::{Concept, Trainer};
use crate::error::{Error, Result};
use crate::image::Picture;
use crate::model::Model;
use crate::rng::{Rng, Stream};

/// The cost of a training step.
#[derive(Clone, Debug, Serialize)]
pub struct BenchStep {
    /// Steps measured, after one to warm up.
    pub steps: usize,
    /// Pictures per step.
    pub batch_size: usize,
    /// Median milliseconds of a step.
    pub step_ms: f64,
    /// Fastest and slowest.
    pub step_ms_range: [f64; 2],
    /// Peak resident bytes of the process.
    pub peak_resident_bytes: u64,
    /// Trained numbers.
    pub parameters: usize,
}

/// Runs the training of `trainer`, with `batch_size` pictures per step, on pictures of noise and reports what its steps
/// cost. Nothing is written.
pub fn bench_step(model: &Model, trainer: &dyn Trainer, class_word: &str, batch_size: usize) -> Result<BenchStep> {
    EngineHost::check_model(model)?;
    let concept = Concept { name: "bench".into(), class_word: class_word.into(), kind: blocklora_spec::Kind::Subject };
    let steps = trainer.plan(&concept)?.steps;
    if steps < 2 {
        return Err(Error::option("steps", steps, "at least 2 are needed: the first one warms up"));
    }
    let side = model.latent_shape().1 * model.vae().downscale();
    let mut rng = Rng::new(0, Stream::Test, 0, 0);
    let pictures = (0..4)
        .map(|_| Ok((Picture::new(side, side, noise(&mut rng, 3 * side * side))?, None)))
        .collect::<Result<Vec<_>>>()?;
    let dataset = Dataset::from_pictures(pictures)?;
    let mut times = Vec::with_capacity(steps);
    let mut last = Instant::now();
    let mut record = |_: Progress| {
        times.push(last.elapsed().as_secs_f64() * 1e3);
        last = Instant::now();
        Ok(())
    };
    let id = &trainer.algorithm().id;
    let mut host = EngineHost::new(model, &concept, &dataset, 0, None, false, &mut record).with_plan(id, steps);
    let parameters = trainer.train(&mut host)?.tensors().map(Vec::len).sum();
    host.check_end()?;
    let mut times = times.split_off(1);
    times.sort_by(f64::total_cmp);
    Ok(BenchStep {
        steps: times.len(),
        batch_size,
        step_ms: times[times.len() / 2],
        step_ms_range: [times[0], times[times.len() - 1]],
        peak_resident_bytes: crate::bench::peak_resident_bytes().unwrap_or(0),
        parameters,
    })
}

fn noise(rng: &mut Rng, len: usize) -> Vec<u8> {
    (0..len).map(|_| rng.next_u32() as u8).collect()
}
