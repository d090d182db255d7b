//! One training run from pictures to an adapter file.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

use blocklora_spec::{
    AdapterBuilder, Base, Fault, Layer, Manifest, NAME_RULE, Storage, Token, TokenVectors, Training, is_name,
};
use sha2::{Digest, Sha256};

use super::checkpoint::Checkpoint;
use super::dataset::Dataset;
use super::engine_host::{EngineHost, PriorSampler, Progress};
use super::host::{Concept, Parameters, TrainPlan, Trainer};
use crate::error::{Error, MethodFault, Result};
use crate::merge::strategy::LayerInfo;
use crate::model::Model;
use crate::weights::hex;

/// What to train and where to put it.
#[derive(Clone)]
pub struct TrainRequest {
    /// The concept.
    pub concept: Concept,
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
    /// Draws pictures of the class for trainers that ask for some.
    pub sampler: Option<PriorSampler>,
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
/// bytes, also when the run was interrupted and resumed. The last checkpoint stays, for the caller to remove once the
/// file is where it belongs. `progress` is called between two steps; its error ends the run, [`Error::Cancelled`] being
/// the usual one.
pub fn train(
    model: &Model,
    dataset: &Dataset,
    trainer: &dyn Trainer,
    request: &TrainRequest,
    progress: &mut dyn FnMut(Progress) -> Result<()>,
) -> Result<TrainReport> {
    EngineHost::check_model(model)?;
    let base = Base { architecture: model.architecture(), digest: model.digest().to_owned() };
    let plan = planned(trainer, request, base, dataset.digest())?;
    let started = Instant::now();
    let checkpoint = Checkpoint { path: request.checkpoint_path(), run: run_digest(model, dataset, trainer, request) };
    if !request.resume && checkpoint.path.exists() {
        return Err(Error::invalid_file(
            &checkpoint.path,
            "a run that was interrupted left this checkpoint; continue it with --resume, or delete it to start anew",
        ));
    }
    let saved = Some((checkpoint.clone(), plan.checkpoint_every));
    let mut host = EngineHost::new(model, &request.concept, dataset, request.seed, saved, request.resume, progress)
        .with_sampler(request.sampler.clone())
        .with_plan(&trainer.algorithm().id, plan.steps);
    let parameters = trainer.train(&mut host)?;
    host.check_end()?;
    let digest = write(model, dataset, trainer, request, &plan, &parameters)?;
    Ok(TrainReport {
        digest,
        parameters: parameters.tensors().map(Vec::len).sum(),
        seconds: started.elapsed().as_secs_f64(),
    })
}

/// Fails on everything that would be wrong with the adapter file and is known without model and pictures.
pub fn check(trainer: &dyn Trainer, request: &TrainRequest) -> Result<()> {
    let base = Base { architecture: "any".to_owned(), digest: UNKNOWN.to_owned() };
    planned(trainer, request, base, UNKNOWN).map(drop)
}

/// A digest that is not known yet.
const UNKNOWN: &str = "0000000000000000000000000000000000000000000000000000000000000000";

/// The trainer's plan. What the file will say must be right before anything is trained.
fn planned(trainer: &dyn Trainer, request: &TrainRequest, base: Base, data_digest: &str) -> Result<TrainPlan> {
    let plan = trainer.plan(&request.concept)?;
    check_plan(&plan, &request.concept)?;
    // How many vectors a token has is known when it is trained.
    let tokens = plan.tokens.iter().map(|name| Token { name: name.clone(), vectors: 1 }).collect();
    let manifest = manifest(trainer, request, &plan, base, data_digest, tokens);
    let manifest = Manifest { tensor_digest: UNKNOWN.to_owned(), ..manifest };
    manifest.validate().map_err(|Fault { field, reason }| {
        let said = match field.as_str() {
            "class_word" => Some(&manifest.class_word),
            "licence" => manifest.licence.as_ref(),
            "created" => manifest.created.as_ref(),
            _ => None,
        };
        match said {
            Some(value) => Error::option(field, format!("{value:?}"), reason),
            None => Error::Method {
                method: trainer.algorithm().id.clone(),
                reason: format!("{field}: {reason}"),
                fault: MethodFault::Option,
            },
        }
    })?;
    Ok(plan)
}

fn check_plan(plan: &TrainPlan, concept: &Concept) -> Result<()> {
    let name = &concept.name;
    if !is_name(name) {
        return Err(Error::option("name", name, format!("it {NAME_RULE}")));
    }
    if let Some(token) = plan.tokens.iter().find(|token| !is_name(token)) {
        let behind = token.strip_prefix(name.as_str()).unwrap_or(token);
        return Err(Error::option("name", name, format!("with {behind} behind it, it {NAME_RULE}")));
    }
    for (key, value) in [("steps", plan.steps), ("checkpoint_every", plan.checkpoint_every), ("rank", plan.rank)] {
        if value == 0 {
            return Err(Error::option(key, value, "must be 1 or more"));
        }
    }
    Ok(())
}

/// What was trained must be what the plan said.
fn check_parameters(model: &Model, trainer: &dyn Trainer, plan: &TrainPlan, parameters: &Parameters) -> Result<()> {
    let wrong =
        |reason: String| Err(Error::faulty_method(&trainer.algorithm().id, format!("what it trained: {reason}")));
    let scale = plan.delta.scale(plan.alpha, plan.rank);
    for f in &parameters.factors {
        let LayerInfo { name, rows: m, columns } = &model.layers()[f.layer];
        let rows = plan.partition.map_or_else(|| (0..*m as u32).collect(), |partition| partition.rows(*m));
        if *f.rows != *rows || f.rank != plan.rank || f.scale.to_bits() != scale.to_bits() {
            return wrong(format!("{name} has other rows, another rank or another scale than the trainer's plan"));
        }
        if f.a.len() != f.rank * columns || f.b.len() != f.rank * f.rows.len() {
            return wrong(format!("{name} has factors of another size"));
        }
    }
    if !parameters.tokens.iter().map(|t| &t.name).eq(&plan.tokens) {
        return wrong("they have other tokens than the trainer's plan".into());
    }
    match parameters.tensors().flatten().find(|x| !x.is_finite()) {
        Some(&value) => Err(Error::NotFinite { what: "a trained parameter".into(), value, step: plan.steps }),
        None => Ok(()),
    }
}

/// Digest of everything that decides the result, so that a checkpoint of another run is never continued.
fn run_digest(model: &Model, dataset: &Dataset, trainer: &dyn Trainer, request: &TrainRequest) -> String {
    let algorithm = trainer.algorithm();
    let mut config = algorithm.config.clone();
    if let Some(config) = config.as_object_mut() {
        config.remove("checkpoint_every");
    }
    let concept = &request.concept;
    // It draws the pictures of the class, again where a run goes on.
    let sampler = request.sampler.as_ref().map_or("", |sampler| sampler.id());
    let parts = [
        model.digest(),
        dataset.digest(),
        &algorithm.id,
        &algorithm.version,
        &concept.name,
        &concept.class_word,
        &format!("{:?} {} {config}", concept.kind, request.seed),
        &format!("{:?} {sampler}", model.precision()),
    ];
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hex(&hash.finalize())
}

/// What the file says. Its builder fills in what depends on tensors.
fn manifest(
    trainer: &dyn Trainer,
    request: &TrainRequest,
    plan: &TrainPlan,
    base: Base,
    data_digest: &str,
    tokens: Vec<Token>,
) -> Manifest {
    Manifest {
        name: request.concept.name.clone(),
        kind: request.concept.kind,
        class_word: request.concept.class_word.clone(),
        tokens,
        base,
        algorithm: trainer.algorithm().clone(),
        partition: plan.partition,
        rank: plan.rank,
        alpha: plan.alpha,
        delta: plan.delta,
        outputs: BTreeMap::new(),
        erasure_lambda: plan.erasure_lambda,
        training: Training { steps: plan.steps as u64, seed: request.seed, data_digest: data_digest.to_owned() },
        licence: request.licence.clone(),
        created: request.created.clone(),
        tensor_digest: String::new(),
    }
}

fn write(
    model: &Model,
    dataset: &Dataset,
    trainer: &dyn Trainer,
    request: &TrainRequest,
    plan: &TrainPlan,
    parameters: &Parameters,
) -> Result<String> {
    check_parameters(model, trainer, plan, parameters)?;
    let layers = model.layers();
    let base = Base { architecture: model.architecture(), digest: model.digest().to_owned() };
    let tokens = parameters.tokens.iter().map(|t| Token { name: t.name.clone(), vectors: t.layers }).collect();
    let manifest = manifest(trainer, request, plan, base, dataset.digest(), tokens);
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
