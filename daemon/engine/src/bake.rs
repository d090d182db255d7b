//! Bakes merged adapters into a model folder in the diffusers layout, which other tools load as any model.
//!
//! Words: concept `milo` with two tokens becomes the added tokens `<milo>` and `<milo>_1`, the notation of textual
//! inversion with several vectors, which diffusers expands by itself. Tokens with one vector are exact there. Of
//! layer-wise tokens the embedding table can only hold the mean; their vectors lie in [`TOKENS_FILE`].

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use safetensors::tensor::{Dtype, View};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::model::{Component, Model};
use crate::nn::LayerId;
use crate::text::{Concept, TokenVectors};
use crate::weights::{WeightFile, WeightView};

/// The file of a baked folder with every concept's token vectors, [layers, d] each.
pub const TOKENS_FILE: &str = "blocklora_tokens.safetensors";
/// The metadata entry of that file that lists the concepts and the order of their tokens.
const CONCEPTS_KEY: &str = "blocklora.concepts";
const EMBEDDING: &str = "text_model.embeddings.token_embedding.weight";

/// A tensor to be written.
struct Piece<'a> {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Cow<'a, [u8]>,
}

impl View for &Piece<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.bytes)
    }
    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

impl<'a> Piece<'a> {
    /// The file's own bytes where `dtype` is what they are stored in, else converted.
    fn pristine(view: &'a WeightView, dtype: DType) -> Result<Self> {
        let converts = matches!(view.dtype(), DType::F32 | DType::F16 | DType::BF16) && view.dtype() != dtype;
        if converts {
            return Self::live(&view.load(dtype, &Device::Cpu)?);
        }
        Ok(Self { dtype: stored(view.dtype())?, shape: view.shape().to_vec(), bytes: Cow::Borrowed(view.bytes()) })
    }

    fn live(tensor: &Tensor) -> Result<Self> {
        Ok(Self {
            dtype: stored(tensor.dtype())?,
            shape: tensor.dims().to_vec(),
            bytes: Cow::Owned(little_endian(tensor)?),
        })
    }
}

fn stored(dtype: DType) -> Result<Dtype> {
    match dtype {
        DType::F32 => Ok(Dtype::F32),
        DType::F16 => Ok(Dtype::F16),
        DType::BF16 => Ok(Dtype::BF16),
        DType::I64 => Ok(Dtype::I64),
        other => Err(Error::option("dtype", format!("{other:?}"), "weights are f32, f16 or bf16")),
    }
}

fn little_endian(tensor: &Tensor) -> Result<Vec<u8>> {
    let flat = tensor.flatten_all()?;
    Ok(match flat.dtype() {
        DType::F16 => flat.to_vec1::<half::f16>()?.iter().flat_map(|x| x.to_le_bytes()).collect(),
        DType::BF16 => flat.to_vec1::<half::bf16>()?.iter().flat_map(|x| x.to_le_bytes()).collect(),
        _ => flat.to_dtype(DType::F32)?.to_vec1::<f32>()?.iter().flat_map(|x| x.to_le_bytes()).collect(),
    })
}

/// Writes `model` with its live weights and the words of `concepts` into the empty folder `to`: everything that the
/// model's own folder has, with the weights of UNet and text encoder in the model's precision.
pub fn bake(model: &Model, concepts: &[Concept], to: &Path) -> Result<()> {
    let from = model.dir();
    copy(&from.join("model_index.json"), &to.join("model_index.json"))?;
    for entry in list(from)? {
        let (source, target) = (from.join(&entry), to.join(&entry));
        if source.is_dir() {
            make(&target)?;
            for name in list(&source)? {
                let rewritten = [Component::UNet, Component::TextEncoder].iter().any(|c| c.folder() == entry)
                    && name.contains("safetensors");
                if source.join(&name).is_file() && !rewritten {
                    copy(&source.join(&name), &target.join(&name))?;
                }
            }
        }
    }
    write_weights(model, Component::UNet, None, to)?;
    let embeddings = extended_embeddings(model, concepts)?;
    write_weights(model, Component::TextEncoder, embeddings.as_ref(), to)?;
    if let Some(table) = embeddings {
        let vocabulary = table.dim(0)?;
        let first = vocabulary - concepts.iter().map(|c| c.tokens.len()).sum::<usize>();
        edit_json(&to.join("text_encoder").join("config.json"), |config| {
            config.insert("vocab_size".into(), json!(vocabulary));
        })?;
        add_words(&to.join("tokenizer"), concepts, first)?;
        write_tokens(concepts, &to.join(TOKENS_FILE))?;
    }
    Ok(())
}

/// The concepts that were baked into the folder `dir`; none if it is an ordinary model.
pub fn baked_concepts(dir: &Path) -> Result<Vec<Concept>> {
    let path = dir.join(TOKENS_FILE);
    if !path.is_file() {
        return Ok(Vec::new());
    }
    let bytes = std::fs::read(&path).map_err(|e| Error::io(&path, e))?;
    let invalid = |reason: String| Error::invalid_file(&path, reason);
    let (_, metadata) = safetensors::SafeTensors::read_metadata(&bytes).map_err(|e| invalid(e.to_string()))?;
    let listed = metadata.metadata().as_ref().and_then(|m| m.get(CONCEPTS_KEY));
    let listed = listed.ok_or_else(|| invalid(format!("the header has no metadata {CONCEPTS_KEY:?}")))?;
    let listed: Vec<Listed> = serde_json::from_str(listed).map_err(|e| invalid(format!("{CONCEPTS_KEY}: {e}")))?;
    let file = WeightFile::open(&path)?;
    let token = |concept: &str, name: String| -> Result<TokenVectors> {
        let view = file.view(&tensor_name(concept, &name))?;
        let &[layers, width] = view.shape() else {
            return Err(view.error(format!("shape {:?}, not [layers, d]", view.shape())));
        };
        let values = view.load(DType::F32, &Device::Cpu)?.flatten_all()?.to_vec1()?;
        Ok(TokenVectors { name, layers, width, values })
    };
    let concept = |l: Listed| -> Result<Concept> {
        let tokens = l.tokens.into_iter().map(|t| token(&l.name, t)).collect::<Result<_>>()?;
        Ok(Concept { name: l.name, tokens })
    };
    listed.into_iter().map(concept).collect()
}

/// A concept as the tokens' file lists it.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Listed {
    name: String,
    tokens: Vec<String>,
}

fn tensor_name(concept: &str, token: &str) -> String {
    format!("{concept}.{token}")
}

fn write_tokens(concepts: &[Concept], path: &Path) -> Result<()> {
    let bytes = |t: &TokenVectors| t.values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
    let tokens = concepts.iter().flat_map(|c| c.tokens.iter().map(move |t| (tensor_name(&c.name, &t.name), t)));
    let pieces: BTreeMap<String, Piece> = tokens
        .map(|(name, t)| {
            (name, Piece { dtype: Dtype::F32, shape: vec![t.layers, t.width], bytes: Cow::Owned(bytes(t)) })
        })
        .collect();
    let listed: Vec<Listed> = concepts
        .iter()
        .map(|c| Listed { name: c.name.clone(), tokens: c.tokens.iter().map(|t| t.name.clone()).collect() })
        .collect();
    write_pieces(path, &pieces, HashMap::from([(CONCEPTS_KEY.to_owned(), json!(listed).to_string())]))
}

/// The embedding table with a row for every token, or none if there are no tokens.
fn extended_embeddings(model: &Model, concepts: &[Concept]) -> Result<Option<Tensor>> {
    let tokens: Vec<&TokenVectors> = concepts.iter().flat_map(|c| &c.tokens).collect();
    if tokens.is_empty() {
        return Ok(None);
    }
    let file = open(model, Component::TextEncoder)?;
    let table = file.view(EMBEDDING)?.load(model.precision(), &Device::Cpu)?;
    let width = table.dim(1)?;
    let mut rows = Vec::with_capacity(tokens.len() * width);
    for token in &tokens {
        if token.width != width || token.layers * width != token.values.len() {
            let reason = format!("token {:?} is {} wide, the text encoder {width}", token.name, token.width);
            return Err(Error::Incompatible { adapter: token.name.clone(), reason });
        }
        let mean = |i: usize| token.values.iter().skip(i).step_by(width).sum::<f32>() / token.layers as f32;
        rows.extend((0..width).map(mean));
    }
    let rows = Tensor::from_vec(rows, (tokens.len(), width), &Device::Cpu)?.to_dtype(table.dtype())?;
    Ok(Some(Tensor::cat(&[&table, &rows], 0)?))
}

fn open(model: &Model, component: Component) -> Result<Arc<WeightFile>> {
    crate::model::open_weights(model.dir(), component)
}

fn write_weights(model: &Model, component: Component, embeddings: Option<&Tensor>, to: &Path) -> Result<()> {
    let file = open(model, component)?;
    let prefix = format!("{}.", component.folder());
    let of_component = |(_, info): &(usize, &crate::merge::strategy::LayerInfo)| info.name.starts_with(&prefix);
    let live: HashMap<&str, &Tensor> = model
        .layers()
        .iter()
        .enumerate()
        .filter(of_component)
        .map(|(i, _)| (model.pristine(LayerId(i)).name(), model.live(LayerId(i))))
        .collect();
    let views = file.names().map(|name| file.view(name)).collect::<Result<Vec<_>>>()?;
    let mut pieces = BTreeMap::new();
    for view in &views {
        let piece = match (live.get(view.name()), embeddings) {
            // A Linear may be stored as a 1x1 convolution; the file's shape stays.
            (Some(tensor), _) => Piece { shape: view.shape().to_vec(), ..Piece::live(tensor)? },
            (None, Some(table)) if view.name() == EMBEDDING => Piece::live(table)?,
            _ => Piece::pristine(view, model.precision())?,
        };
        pieces.insert(view.name().to_owned(), piece);
    }
    let path = to.join(component.folder()).join(component.weight_file());
    write_pieces(&path, &pieces, HashMap::from([("format".to_owned(), "pt".to_owned())]))
}

fn write_pieces(path: &Path, pieces: &BTreeMap<String, Piece>, metadata: HashMap<String, String>) -> Result<()> {
    use safetensors::SafeTensorError as E;
    safetensors::serialize_to_file(pieces, Some(metadata), path).map_err(|e| match e {
        E::IoError(e) => Error::io(path, e),
        e => Error::invalid_file(path, e.to_string()),
    })?;
    File::open(path).and_then(|f| f.sync_all()).map_err(|e| Error::io(path, e))
}

/// Adds the concepts' words to a tokenizer's files, with ids from `first` on.
fn add_words(tokenizer: &Path, concepts: &[Concept], first: usize) -> Result<()> {
    let words: Vec<String> = concepts.iter().flat_map(words_of).collect();
    let words: Vec<(usize, &String)> = (first..).zip(&words).collect();
    // What transformers reads where there is no tokenizer.json.
    let added = tokenizer.join("added_tokens.json");
    if !added.is_file() {
        write(&added, b"{}")?;
    }
    edit_json(&added, |map| map.extend(words.iter().map(|(id, word)| ((*word).clone(), json!(id)))))?;
    let entry = |word: &str| {
        json!({
            "content": word, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            "special": false
        })
    };
    let whole = tokenizer.join("tokenizer.json");
    if whole.is_file() {
        edit_json(&whole, |file| {
            if let Some(list) = file.entry("added_tokens").or_insert_with(|| json!([])).as_array_mut() {
                for (id, word) in &words {
                    let mut entry = entry(word);
                    entry["id"] = json!(id);
                    list.push(entry);
                }
            }
        })?;
    }
    let config = tokenizer.join("tokenizer_config.json");
    if config.is_file() {
        edit_json(&config, |file| {
            if let Some(map) = file.get_mut("added_tokens_decoder").and_then(Value::as_object_mut) {
                map.extend(words.iter().map(|(id, word)| (id.to_string(), entry(word))));
            }
        })?;
    }
    Ok(())
}

/// `<milo>`, `<milo>_1`, ... one for each token.
fn words_of(concept: &Concept) -> Vec<String> {
    let word = |i: usize| if i == 0 { format!("<{}>", concept.name) } else { format!("<{}>_{i}", concept.name) };
    (0..concept.tokens.len()).map(word).collect()
}

/// Names in `folder`, sorted; the ones that are not text are left out.
fn list(folder: &Path) -> Result<Vec<String>> {
    let io = |e| Error::io(folder, e);
    let mut names = Vec::new();
    for entry in folder.read_dir().map_err(io)? {
        names.extend(entry.map_err(io)?.file_name().into_string());
    }
    names.sort();
    Ok(names)
}

fn make(folder: &Path) -> Result<()> {
    std::fs::create_dir(folder).map_err(|e| Error::io(folder, e))
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    // Not fs::copy: a read-only model must not become a folder whose files cannot be changed.
    let mut source = File::open(from).map_err(|e| Error::io(from, e))?;
    let mut copied = || -> std::io::Result<()> {
        let mut file = File::create(to)?;
        std::io::copy(&mut source, &mut file)?;
        file.sync_all()
    };
    copied().map_err(|e| Error::io(to, e))
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let written = || -> std::io::Result<()> {
        let mut file = File::create(path)?;
        std::io::Write::write_all(&mut file, bytes)?;
        file.sync_all()
    };
    written().map_err(|e| Error::io(path, e))
}

fn edit_json(path: &Path, edit: impl FnOnce(&mut serde_json::Map<String, Value>)) -> Result<()> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
    let mut value: Value = serde_json::from_str(&text).map_err(|e| Error::invalid_file(path, e.to_string()))?;
    let map = value.as_object_mut().ok_or_else(|| Error::invalid_file(path, "not a JSON object"))?;
    edit(map);
    let text = serde_json::to_string_pretty(&value).map_err(|e| Error::invalid_file(path, e.to_string()))?;
    write(path, text.as_bytes())
}
