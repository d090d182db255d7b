//! Trainers on a quadratic problem, whose optimum is known.

use blocklora_sdk::testing::Quadratic;
use blocklora_sdk::train::{AnyTrainer, Parameters};
use blocklora_sdk::{Error, Value};
use serde_json::{Map, json};

use super::skip;
use crate::subject::{Subject, Verdict, wrong};

fn text(error: Error) -> String {
    error.message
}

/// The trainer for `steps` steps, as far as its settings have the SDK's names (steps, rank, learning_rate): rates that
/// suit the problem, and a rank that reaches its optimum.
pub fn trainer(subject: &Subject, steps: usize) -> Result<Box<dyn AnyTrainer>, String> {
    let schema = subject.library.schema().map_err(|e| format!("no schema: {e}"))?;
    let rates = json!({"tokens": 0.02, "text_encoder": 0.02, "unet": 0.02});
    let wanted =
        [("steps", json!(steps)), ("rank", json!(4)), ("learning_rate", rates), ("token_norm_limit", json!(100.0))];
    let has = |key: &str| schema["properties"].get(key).is_some();
    let mut settings: Map<String, Value> = Map::new();
    for (key, value) in wanted.into_iter().filter(|(key, _)| has(key)) {
        settings.insert(key.to_owned(), value);
        if subject.library.resolve(&Value::Object(settings.clone())).is_err() {
            settings.remove(key);
        }
    }
    subject.trainer(&Value::Object(settings))
}

fn run(subject: &Subject, steps: usize) -> Result<(Quadratic, Parameters), String> {
    let mut host = Quadratic::new();
    host.job.seed = subject.seed;
    let parameters = trainer(subject, steps)?.train(&mut host).map_err(text)?;
    Ok((host, parameters))
}

pub fn plan(subject: &Subject) -> Verdict {
    let plan = trainer(subject, 5)?.plan(&Quadratic::new().concept).map_err(text)?;
    let (host, parameters) = run(subject, 5)?;
    let tokens: Vec<&String> = parameters.tokens.iter().map(|t| &t.name).collect();
    if plan.tokens.iter().ne(tokens.iter().copied()) {
        return wrong(format!("it planned the tokens {:?} and trained {tokens:?}", plan.tokens));
    }
    if plan.steps != host.losses.len() {
        return wrong(format!("it planned {} steps and reported {}", plan.steps, host.losses.len()));
    }
    if plan.checkpoint_every == 0 {
        return wrong("checkpoint_every = 0: must be 1 or more");
    }
    for f in &parameters.factors {
        let layer = &host.layers[f.layer];
        let rows: Vec<u32> = match plan.partition {
            None => (0..layer.rows as u32).collect(),
            Some(partition) => partition.rows(layer.rows),
        };
        if *f.rows != rows[..] {
            return wrong(format!("{}: it owns other rows than its partition says", layer.name));
        }
        if f.rank != plan.rank || (f.scale - plan.scale()).abs() > 1e-6 * plan.scale().abs() {
            return wrong(format!("{}: rank or scale are not those of the plan", layer.name));
        }
    }
    Ok(())
}

pub fn learns(subject: &Subject) -> Verdict {
    let (host, _) = run(subject, 600)?;
    let mean = |losses: &[f32]| losses.iter().sum::<f32>() / losses.len().max(1) as f32;
    let part = (host.losses.len() / 20).max(1);
    let (first, last) = (mean(&host.losses[..part]), mean(&host.losses[host.losses.len() - part..]));
    // A frozen A reaches the optimum among its own multiples only.
    if last.is_nan() || last >= 0.7 * first {
        return wrong(format!("the loss went from {first} to {last} in {} steps", host.losses.len()));
    }
    Ok(())
}

pub fn progress(subject: &Subject) -> Verdict {
    let (host, _) = run(subject, 20)?;
    let reported = host.job.progress.into_inner().unwrap_or_default();
    if let Some(pair) = reported.windows(2).find(|pair| pair[1].0 < pair[0].0) {
        return wrong(format!("the progress went from {} back to {}", pair[0].0, pair[1].0));
    }
    match reported.last() {
        Some((done, total)) if done == total => Ok(()),
        other => wrong(format!("the last progress was {other:?}, not the end")),
    }
}

pub fn cancel(subject: &Subject) -> Verdict {
    let mut host = Quadratic::new();
    host.stop_at = Some(4);
    match trainer(subject, 20)?.train(&mut host) {
        Err(e) if e.is_cancelled() && host.losses.len() == 4 => Ok(()),
        other => {
            let steps = host.losses.len();
            wrong(format!("cancelled after step 4: {:?} after {steps} steps", other.map(|_| "a result").map_err(text)))
        }
    }
}

pub fn resume(subject: &Subject) -> Verdict {
    if !subject.manifest.deterministic {
        return skip("the manifest does not declare deterministic = true");
    }
    let (_, whole) = run(subject, 20)?;
    let (_, again) = run(subject, 20)?;
    if whole != again {
        return wrong("the same training again gives other bits: take random numbers from Job::rng only");
    }
    let mut host = Quadratic::new();
    host.job.seed = subject.seed;
    host.stop_at = Some(7);
    if let Ok(parameters) = trainer(subject, 20)?.train(&mut host) {
        return wrong(format!("cancelled, it gave {} layers", parameters.factors.len()));
    }
    host.stop_at = None;
    let resumed = trainer(subject, 20)?.train(&mut host).map_err(text)?;
    if resumed != whole {
        return wrong(
            "resumed after step 7, it ends with other bits than without interruption: keep all state in TrainState",
        );
    }
    Ok(())
}

pub fn errors(subject: &Subject) -> Verdict {
    let mut host = Quadratic::new();
    host.target.fill(f32::NAN);
    if trainer(subject, 20)?.train(&mut host).is_ok() || host.losses.len() > 2 {
        return wrong("the loss is NaN, and it goes on: end with Error::not_finite");
    }
    Ok(())
}
