//! Golden values of trainers: what PyTorch makes of the quadratic problem.

use std::collections::BTreeMap;
use std::path::Path;

use super::golden::read_json;
use super::quadratic::Quadratic;
use crate::error::{Code, Error, Result};
use crate::train::{AnyTrainer, Parameters};

/// A file of golden values, as `tests/parity/make_train_golden.py` writes it.
#[derive(Clone, Debug, serde::Deserialize)]
pub struct TrainGolden {
    /// The runs by name.
    pub runs: BTreeMap<String, TrainRun>,
}

/// One training.
#[derive(Clone, Debug, serde::Deserialize)]
pub struct TrainRun {
    /// The loss of every step.
    pub losses: Vec<f32>,
    /// Every tensor after the last step, in the order of [`Parameters::tensors`].
    pub tensors: Vec<Vec<f32>>,
}

impl TrainGolden {
    /// Reads the file.
    pub fn open(path: &Path) -> Result<Self> {
        read_json(path)
    }
}

/// Trains on `host` and compares losses and parameters with the run `name`. The error says where they differ by more
/// than 1e-4, relative to a size of 1.
pub fn check_trainer(
    golden: &TrainGolden,
    name: &str,
    trainer: &dyn AnyTrainer,
    host: &mut Quadratic,
) -> Result<Parameters> {
    let failed = |message: String| Err(Error::new(Code::Failed, format!("{name}: {message}")));
    let Some(expected) = golden.runs.get(name) else { return failed("there is no such run".into()) };
    let parameters = trainer.train(host)?;
    let tensors: Vec<&[f32]> = parameters.tensors().map(Vec::as_slice).collect();
    let ours = std::iter::once(host.losses.as_slice()).chain(tensors.iter().copied());
    let theirs = std::iter::once(&expected.losses).chain(&expected.tensors);
    if tensors.len() != expected.tensors.len() {
        return failed(format!("{} tensors instead of {}", tensors.len(), expected.tensors.len()));
    }
    for (index, (ours, theirs)) in ours.zip(theirs).enumerate() {
        let what = if index == 0 { "losses".to_owned() } else { format!("tensor {}", index - 1) };
        if ours.len() != theirs.len() {
            return failed(format!("{what}: {} numbers instead of {}", ours.len(), theirs.len()));
        }
        for (i, (a, b)) in ours.iter().zip(theirs).enumerate() {
            let distance = (a - b).abs() / b.abs().max(1.0);
            if distance > 1e-4 || distance.is_nan() {
                return failed(format!("{what}[{i}] = {a}, but PyTorch has {b}"));
            }
        }
    }
    Ok(parameters)
}
