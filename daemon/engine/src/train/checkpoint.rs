//! Checkpoints: a training state in one safetensors file, written whole or not at all.

use std::collections::HashMap;
use std::path::PathBuf;

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde::{Deserialize, Serialize};

use super::host::{LayerFactors, Parameters, TokenFactors, TrainState};
use crate::error::{Error, Result};

#[derive(Serialize, Deserialize)]
struct Header {
    /// Digest of everything that decides the run's result; another run's checkpoint is refused.
    run: String,
    step: usize,
    factors: Vec<FactorHeader>,
    tokens: Vec<(String, usize)>,
    /// Number of the optimiser's tensors.
    optimiser: usize,
}

#[derive(Serialize, Deserialize)]
struct FactorHeader {
    layer: usize,
    rows: Vec<u32>,
    rank: usize,
    scale: f32,
    a_is_frozen: bool,
}

/// Where a run keeps its checkpoint.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    /// The file.
    pub path: PathBuf,
    /// Digest of everything that decides the run's result.
    pub run: String,
}

impl Checkpoint {
    /// Writes `state`: to a temporary file beside, synced, then renamed.
    pub fn save(&self, state: &TrainState) -> Result<()> {
        let header = Header {
            run: self.run.clone(),
            step: state.step,
            factors: state
                .parameters
                .factors
                .iter()
                .map(|f| FactorHeader {
                    layer: f.layer,
                    rows: f.rows.to_vec(),
                    rank: f.rank,
                    scale: f.scale,
                    a_is_frozen: f.a_is_frozen,
                })
                .collect(),
            tokens: state.parameters.tokens.iter().map(|t| (t.name.clone(), t.layers)).collect(),
            optimiser: state.optimiser.len(),
        };
        let mut bytes: Vec<(String, Vec<u8>)> = Vec::new();
        let groups = [("theta", collect(state.parameters.tensors())), ("optimiser", collect(state.optimiser.iter()))];
        for (group, tensors) in groups {
            bytes.extend(tensors.into_iter().enumerate().map(|(i, data)| (format!("{group}.{i:05}"), data)));
        }
        let mut views = Vec::with_capacity(bytes.len());
        for (name, data) in &bytes {
            let view = TensorView::new(Dtype::F32, vec![data.len() / 4], data)
                .map_err(|e| Error::invalid_file(&self.path, format!("cannot lay out tensor {name:?}: {e}")))?;
            views.push((name.clone(), view));
        }
        let header = serde_json::to_string(&header)
            .map_err(|e| Error::invalid_file(&self.path, format!("cannot write the header: {e}")))?;
        let metadata = HashMap::from([("blocklora.checkpoint".to_owned(), header)]);
        let content = safetensors::serialize(views, Some(metadata))
            .map_err(|e| Error::invalid_file(&self.path, format!("cannot lay out the file: {e}")))?;
        Ok(blocklora_spec::write_atomically(&self.path, &content)?)
    }

    /// Reads the state back; `None` if there is no file. A damaged file, or one of another run, is an error.
    pub fn load(&self) -> Result<Option<TrainState>> {
        let content = match std::fs::read(&self.path) {
            Ok(content) => content,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::io(&self.path, e)),
        };
        let invalid = |reason: String| Error::invalid_file(&self.path, format!("not a usable checkpoint: {reason}"));
        let (_, metadata) = SafeTensors::read_metadata(&content).map_err(|e| invalid(e.to_string()))?;
        let tensors = SafeTensors::deserialize(&content).map_err(|e| invalid(e.to_string()))?;
        let header = metadata
            .metadata()
            .as_ref()
            .and_then(|m| m.get("blocklora.checkpoint"))
            .ok_or_else(|| invalid("the header entry blocklora.checkpoint is missing".into()))?;
        let header: Header = serde_json::from_str(header).map_err(|e| invalid(e.to_string()))?;
        if header.run != self.run {
            return Err(Error::invalid_file(
                &self.path,
                "this checkpoint belongs to a run with other pictures, settings, seed or model, or with another version of \
                 the method; give the same ones, or delete it to start anew",
            ));
        }
        let read = |group: &str, i: usize, len: Option<usize>| -> Result<Vec<f32>> {
            let name = format!("{group}.{i:05}");
            let view = tensors.tensor(&name).map_err(|e| invalid(format!("tensor {name:?}: {e}")))?;
            if view.dtype() != Dtype::F32 || len.is_some_and(|len| view.data().len() != 4 * len) {
                return Err(invalid(format!("tensor {name:?} has the wrong type or size")));
            }
            Ok(view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
        };
        let mut parameters = Parameters::default();
        for (i, f) in header.factors.iter().enumerate() {
            parameters.factors.push(LayerFactors {
                layer: f.layer,
                rows: f.rows.clone().into(),
                rank: f.rank,
                scale: f.scale,
                a: read("theta", 2 * i, None)?,
                b: read("theta", 2 * i + 1, Some(f.rows.len() * f.rank))?,
                a_is_frozen: f.a_is_frozen,
            });
        }
        let first_token = 2 * header.factors.len();
        for (i, (name, layers)) in header.tokens.iter().enumerate() {
            let values = read("theta", first_token + i, None)?;
            parameters.tokens.push(TokenFactors { name: name.clone(), layers: *layers, values });
        }
        let optimiser = (0..header.optimiser).map(|i| read("optimiser", i, None)).collect::<Result<Vec<Vec<f32>>>>()?;
        Ok(Some(TrainState { step: header.step, parameters, optimiser }))
    }
}

fn collect<'a>(tensors: impl Iterator<Item = &'a Vec<f32>>) -> Vec<Vec<u8>> {
    tensors.map(|t| t.iter().flat_map(|x| x.to_le_bytes()).collect()).collect()
}
