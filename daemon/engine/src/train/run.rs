//! One training run from pictures to an adapter file.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

use blocklora_spec::{
    AdapterBuilder, Algorithm, Base, Delta, Layer, Manifest, NAME_RULE, Storage, Token, TokenVectors, Training, is_name,
};
use sha2::{Digest, Sha256};

use super::checkpoint::Checkpoint;
use super::concept::CONCEPT_TOKENS;
use super::concept::Concept;
use super::config::TrainConfig;
use super::dataset::Dataset;
use super::engine_host::{EngineHost, Progress, tokenise};
use super::host::{Parameters, Trainer};
use super::templates;
use crate::error::{Error, Result};
use crate::merge::strategy::LayerInfo;
use crate::model::Model;
use crate::weights::hex;

/// What to train and where to put it.
#[derive(Clone, Debug)]
pub struct TrainRequest {
    /// The concept.
    pub concept: Concept,
    /// The settings; written into the file.
    pub config: TrainConfig,
    /// Decides every random number of the run.
    pub seed: u64,
    /// The adapter file to write.
    pub output: PathBuf,
    /// Continue from the checkpoint beside `output`, if there is one.
    pub resume: bool,
    /// How numbers are stored in the file.
    pub storage: Storage,
    /// The adapter's licence, if it has one.
    pub licence: Option<String>,
    /// When it was made (RFC 3339). Left out by default, so that the same run gives the same bytes.
    pub created: Option<String>,
}

impl TrainRequest {
    /// The checkpoint's file: beside the output.
    pub fn checkpoint_path(&self) -> PathBuf {
        let mut name = self.output.file_name().unwrap_or_default().to_os_string();
        name.push(".checkpoint");
        self.output.with_file_name(name)
    }
}

/// What a finished run reports.
#[derive(Clone, Debug)]
pub struct TrainReport {
    /// Digest of the adapter file.
    pub digest: String,
    /// Trained numbers.
    pub parameters: usize,
    /// Seconds of this process, without what ran before a resume.
    pub seconds: f64,
}

/// Trains with `trainer` and writes the adapter file. The same model, pictures, settings and seed give the same
/// bytes, also when the run was interrupted and resumed. A checkpoint is removed once the file is safe.
pub fn train(
    model: &Model,
    dataset: &Dataset,
    trainer: &dyn Trainer,
    request: &TrainRequest,
    progress: &mut dyn FnMut(Progress) -> Result<()>,
) -> Result<TrainReport> {
    request.config.validate()?;
    let name = &request.concept.name;
    if !is_name(&format!("{name}-1")) {
        return Err(Error::option("name", name, format!("with -1 and -2 behind it, it {NAME_RULE}")));
    }
    check_prompts(model, dataset, request)?;
    let started = Instant::now();
    let config = serde_json::to_value(&request.config)
        .map_err(|e| Error::option("config", "", format!("cannot be written as JSON: {e}")))?;
    let checkpoint =
        Checkpoint { path: request.checkpoint_path(), run: run_digest(model, dataset, trainer, request, &config) };
    if !request.resume && checkpoint.path.exists() {
        return Err(Error::invalid_file(
            &checkpoint.path,
            "a run that was interrupted left this checkpoint; continue it with --resume, or delete it to start anew",
        ));
    }
    let every = request.config.checkpoint_every;
    let mut host =
        EngineHost::new(model, dataset, request.seed, Some((checkpoint.clone(), every)), request.resume, progress);
    let parameters = trainer.train(&mut host)?;
    let digest = write(model, dataset, trainer, request, config, &parameters)?;
    checkpoint.remove()?;
    Ok(TrainReport {
        digest,
        parameters: parameters.tensors().map(Vec::len).sum(),
        seconds: started.elapsed().as_secs_f64(),
    })
}

/// Every prompt that training may draw must fit the model: better said now than at step 700.
fn check_prompts(model: &Model, dataset: &Dataset, request: &TrainRequest) -> Result<()> {
    for template in templates::of_kind(request.concept.kind) {
        for caption in dataset.captions().iter().flatten().map(String::as_str).chain(["{}"]) {
            tokenise(model, &template.replace("{}", caption), CONCEPT_TOKENS)?;
        }
    }
    Ok(())
}

/// Digest of everything that decides the result, so that a checkpoint of another run is never continued.
fn run_digest(
    model: &Model,
    dataset: &Dataset,
    trainer: &dyn Trainer,
    request: &TrainRequest,
    config: &serde_json::Value,
) -> String {
    let mut config = config.clone();
    if let Some(config) = config.as_object_mut() {
        config.remove("checkpoint_every");
    }
    let concept = &request.concept;
    let parts = [
        model.digest(),
        dataset.digest(),
        trainer.id(),
        &concept.name,
        &concept.class_word,
        &format!("{:?} {} {config}", concept.kind, request.seed),
    ];
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hex(&hash.finalize())
}

fn write(
    model: &Model,
    dataset: &Dataset,
    trainer: &dyn Trainer,
    request: &TrainRequest,
    config: serde_json::Value,
    parameters: &Parameters,
) -> Result<String> {
    let layers = model.layers();
    let manifest = Manifest {
        name: request.concept.name.clone(),
        kind: request.concept.kind,
        class_word: request.concept.class_word.clone(),
        tokens: parameters.tokens.iter().map(|t| Token { name: t.name.clone(), vectors: t.layers }).collect(),
        base: Base { architecture: model.architecture(), digest: model.digest().to_owned() },
        algorithm: Algorithm {
            id: trainer.id().to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            digest: None,
            config,
        },
        partition: request.config.partition,
        rank: request.config.rank,
        alpha: request.config.alpha,
        delta: Delta::Alpha,
        outputs: BTreeMap::new(),
        erasure_lambda: request.config.erasure.map_or(0.0, |e| e.lambda),
        training: Training {
            steps: request.config.steps as u64,
            seed: request.seed,
            data_digest: dataset.digest().to_owned(),
        },
        licence: request.licence.clone(),
        created: request.created.clone(),
        tensor_digest: String::new(),
    };
    let mut builder = AdapterBuilder::new(&manifest, request.storage);
    for f in &parameters.factors {
        let LayerInfo { name, rows, .. } = &layers[f.layer];
        builder = builder.layer(Layer { name, outputs: *rows, a: &f.a, b: &f.b });
    }
    for t in &parameters.tokens {
        let width = t.values.len() / t.layers;
        let values = t.values.clone();
        builder = builder.token(&TokenVectors { name: t.name.clone(), layers: t.layers, width, values });
    }
    Ok(builder.write(&request.output)?)
}
