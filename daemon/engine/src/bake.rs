//! Bakes merged adapters and their words into a model folder in the diffusers layout, which other tools load as any
//! model.
//!
//! Concept `milo` with two tokens becomes the added tokens `<milo>` and `<milo>_1`, the notation of textual inversion
//! with several vectors, which diffusers expands by itself. Tokens with one vector are exact there. Of layer-wise
//! tokens the embedding table can only hold the mean; their vectors lie in [`TOKENS_FILE`].
//!
//! The words' ids are those that the tokenizer gives next. Where the embedding table has spare rows, which no word of the
//! tokenizer has, the new words take these. Concepts that the model's folder has already keep their words.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use blocklora_spec::{NAME_RULE, is_name};
use candle_core::{DType, Device, Tensor};
use safetensors::tensor::{Dtype, View};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::model::{Component, Model};
use crate::text::{Concept, TokenVectors};
use crate::weights::{WeightFile, WeightView};

/// The file of a baked folder with every concept's token vectors, [layers, d] each.
pub const TOKENS_FILE: &str = "blocklora_tokens.safetensors";
/// The metadata entry of that file that lists the concepts and the order of their tokens.
const CONCEPTS_KEY: &str = "blocklora.concepts";
/// How the embedding table's name ends, with or without the `text_model.` of older transformers.
const EMBEDDING: &str = "embeddings.token_embedding.weight";

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
    fn of(view: &'a WeightView) -> Result<Self> {
        let dtype = match view.dtype() {
            DType::F32 => Dtype::F32,
            DType::F16 => Dtype::F16,
            DType::BF16 => Dtype::BF16,
            DType::I64 => Dtype::I64,
            other => return Err(view.error(format!("type {other:?} cannot be written"))),
        };
        Ok(Self { dtype, shape: view.shape().to_vec(), bytes: Cow::Borrowed(view.bytes()) })
    }
}

/// Writes `model` with what is merged into it to the new folder `to`, as [`Model::save`], and adds the words of
/// `concepts` to its tokenizer and text encoder. Concepts that are built into the model's own folder stay, named or not.
///
/// Words are added to the folder once it is there: an error between leaves it without some of them, for the caller to
/// remove.
pub fn bake(model: &Model, concepts: &[Concept], to: &Path) -> Result<()> {
    let mut all = baked_concepts(model.dir())?;
    let is_new = |concept: &&Concept| !all.iter().any(|built_in| built_in.name == concept.name);
    let new: Vec<Concept> = concepts.iter().filter(is_new).cloned().collect();
    // Whatever can be wrong is found before anything is written.
    new.iter().try_for_each(|concept| concept.check(model))?;
    let words = new_words(model, &new)?;
    let rows = new_rows(&embedding_table(model.weight_file(Component::TextEncoder))?, &new)?;
    model.save(to)?;
    if let Some((first, _)) = words.first() {
        let folder = to.join(Component::TextEncoder.folder());
        let count = add_rows(&folder.join(Component::TextEncoder.weight_file()), &rows, *first as usize)?;
        edit_json(&folder.join("config.json"), |config| drop(config.insert("vocab_size".into(), json!(count))))?;
        add_words(&to.join("tokenizer"), &words)?;
    }
    all.extend(new);
    if all.iter().all(|concept| concept.tokens.is_empty()) {
        return Ok(());
    }
    write_tokens(&all, &to.join(TOKENS_FILE))
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
    check_listed(&listed).map_err(|reason| invalid(format!("{CONCEPTS_KEY}{reason}")))?;
    let file = WeightFile::open(&path)?;
    let token = |concept: &str, name: String| -> Result<TokenVectors> {
        let view = file.view(&tensor_name(concept, &name))?;
        let &[layers, width] = view.shape() else {
            return Err(view.error(format!("shape {:?}, not [layers, d]", view.shape())));
        };
        let values: Vec<f32> = view.load(DType::F32, &Device::Cpu)?.flatten_all()?.to_vec1()?;
        match values.iter().find(|x| !x.is_finite()) {
            Some(value) => Err(view.error(format!("holds {value}; merge the concept again"))),
            None => Ok(TokenVectors { name, layers, width, values }),
        }
    };
    let concept = |l: Listed| -> Result<Concept> {
        let tokens = l.tokens.into_iter().map(|t| token(&l.name, t)).collect::<Result<_>>()?;
        Ok(Concept { name: l.name, tokens })
    };
    listed.into_iter().map(concept).collect()
}

/// What is wrong with the list, with the field in front; a folder may come from anywhere, as adapters may.
fn check_listed(listed: &[Listed]) -> std::result::Result<(), String> {
    let tokens_max = blocklora_spec::limits::TOKENS_MAX;
    let mut concepts = BTreeSet::new();
    for (i, concept) in listed.iter().enumerate() {
        check_name(format!("[{i}].name"), &concept.name, &mut concepts)?;
        if concept.tokens.len() > tokens_max {
            return Err(format!("[{i}].tokens: {} tokens, at most {tokens_max}", concept.tokens.len()));
        }
        let mut tokens = BTreeSet::new();
        for (k, token) in concept.tokens.iter().enumerate() {
            check_name(format!("[{i}].tokens[{k}]"), token, &mut tokens)?;
        }
    }
    Ok(())
}

fn check_name<'a>(field: String, name: &'a str, seen: &mut BTreeSet<&'a str>) -> std::result::Result<(), String> {
    if !is_name(name) {
        let shown: String = name.chars().take(64).collect();
        return Err(format!("{field}: {shown:?} {NAME_RULE}"));
    }
    if seen.insert(name) { Ok(()) } else { Err(format!("{field}: {name:?} occurs twice")) }
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

/// The words of `concepts` with their ids, which continue those of the model's tokenizer.
fn new_words(model: &Model, concepts: &[Concept]) -> Result<Vec<(u32, String)>> {
    let tokenizer = model.tokenizer();
    let mut words = Vec::new();
    for concept in concepts {
        for word in words_of(concept) {
            if tokenizer.id(&word).is_some() {
                let reason = format!("the model's tokenizer has {word:?} already; train it again under another name");
                return Err(Error::Incompatible { adapter: concept.name.clone(), reason });
            }
            let id = tokenizer.next_id() + words.len() as u32;
            if let Some(token) = tokenizer.token(id) {
                let reason = format!("token {token:?} = {id}, but only {id} tokens are there: no word can be added");
                return Err(Error::invalid_file(model.dir().join("tokenizer"), reason));
            }
            words.push((id, word));
        }
    }
    Ok(words)
}

/// The text encoder's embedding table in its weight file.
fn embedding_table(file: &Arc<WeightFile>) -> Result<WeightView> {
    let name = file.names().find(|name| name.ends_with(EMBEDDING));
    let name = name.ok_or_else(|| Error::invalid_file(file.path(), format!("no tensor ends in {EMBEDDING:?}")))?;
    let table = file.view(name)?;
    match table.shape() {
        [_, _] => Ok(table),
        shape => Err(table.error(format!("shape {shape:?}, not [vocabulary, d]"))),
    }
}

/// A row of the embedding table for every token, in the table's type: the mean of its vectors.
fn new_rows(table: &WeightView, concepts: &[Concept]) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    for concept in concepts {
        for token in &concept.tokens {
            let width = token.width;
            let mean = |i: usize| token.values.iter().skip(i).step_by(width).sum::<f32>() / token.layers as f32;
            let row = Tensor::from_iter((0..width).map(mean), &Device::Cpu)?.to_dtype(table.dtype())?;
            let stored: Vec<f32> = row.to_dtype(DType::F32)?.to_vec1()?;
            if let Some(value) = stored.iter().find(|x| !x.is_finite()) {
                let reason = format!(
                    "token {:?} is {value} in {:?}, the type of the model's words; train it again with a lower learning \
                     rate of the tokens",
                    token.name,
                    table.dtype()
                );
                return Err(Error::Incompatible { adapter: concept.name.clone(), reason });
            }
            row.write_bytes(&mut bytes)?;
        }
    }
    Ok(bytes)
}

/// Puts rows into the embedding table in the weight file `path`, from row `first` on: over spare ones, and behind the
/// last. Returns how many rows the table has then.
fn add_rows(path: &Path, rows: &[u8], first: usize) -> Result<usize> {
    let file = WeightFile::open(path)?;
    let table = embedding_table(&file)?;
    let row = table.shape()[1] * table.dtype().size_in_bytes();
    let after = table.shape()[0].max(first + rows.len() / row);
    let mut bytes = table.bytes().to_vec();
    bytes.resize(after * row, 0);
    bytes[first * row..][..rows.len()].copy_from_slice(rows);

    let views = file.names().map(|name| file.view(name)).collect::<Result<Vec<_>>>()?;
    let mut pieces = BTreeMap::new();
    for view in &views {
        pieces.insert(view.name().to_owned(), Piece::of(view)?);
    }
    let shape = vec![after, table.shape()[1]];
    let extended = Piece { shape, bytes: Cow::Owned(bytes), ..Piece::of(&table)? };
    pieces.insert(table.name().to_owned(), extended);
    // Beside it and then renamed: the pieces are read from the mapped file that is replaced.
    let beside = path.with_extension("new");
    write_pieces(&beside, &pieces, HashMap::from([("format".to_owned(), "pt".to_owned())]))?;
    std::fs::rename(&beside, path).map_err(|e| Error::io(path, e))?;
    Ok(after)
}

fn write_pieces(path: &Path, pieces: &BTreeMap<String, Piece>, metadata: HashMap<String, String>) -> Result<()> {
    use safetensors::SafeTensorError as E;
    safetensors::serialize_to_file(pieces, Some(metadata), path).map_err(|e| match e {
        E::IoError(e) => Error::io(path, e),
        e => Error::invalid_file(path, e.to_string()),
    })?;
    File::open(path).and_then(|f| f.sync_all()).map_err(|e| Error::io(path, e))
}

/// Adds words to a tokenizer's files.
fn add_words(tokenizer: &Path, words: &[(u32, String)]) -> Result<()> {
    // What transformers reads where there is no tokenizer.json.
    let added = tokenizer.join("added_tokens.json");
    if !added.is_file() {
        write(&added, b"{}")?;
    }
    edit_json(&added, |map| map.extend(words.iter().map(|(id, word)| (word.clone(), json!(id)))))?;
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
                for (id, word) in words {
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
