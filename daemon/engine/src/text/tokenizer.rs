//! transformers' `CLIPTokenizer`: byte-level BPE of lower-cased text.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::replace::ReplacePattern;
use tokenizers::normalizers::{self, Lowercase, NFC, Replace};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior};

use crate::error::{Error, Result};
use crate::model::config::{TextEncoderConfig, read_json};

/// What CLIP takes for a word: a special token, an English contraction, letters, one digit, or other signs.
const WORDS: &str = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

/// Splits text into the tokens of a model's vocabulary.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    begin: u32,
    end: u32,
    pad: u32,
    length: usize,
}

#[derive(Deserialize)]
struct TokenizerJson {
    model: BpeJson,
    #[serde(default)]
    added_tokens: Vec<AddedTokenJson>,
}

#[derive(Deserialize)]
struct BpeJson {
    vocab: BTreeMap<String, u32>,
    merges: Vec<MergeJson>,
}

/// A merge rule in either of the two notations of `tokenizer.json`.
#[derive(Deserialize)]
#[serde(untagged)]
enum MergeJson {
    Joined(String),
    Pair(String, String),
}

#[derive(Deserialize)]
struct AddedTokenJson {
    id: u32,
    content: String,
}

/// Vocabulary, merge rules and tokens added later, by id.
struct Vocabulary {
    vocab: BTreeMap<String, u32>,
    merges: Vec<(String, String)>,
    added: BTreeMap<u32, String>,
}

impl Vocabulary {
    /// From `tokenizer.json`, or else from `vocab.json` and `merges.txt`, as transformers does.
    fn open(dir: &Path) -> Result<Self> {
        let whole = dir.join("tokenizer.json");
        if whole.is_file() {
            let json: TokenizerJson = read_json(&whole)?;
            let merges = json
                .model
                .merges
                .into_iter()
                .map(|merge| match merge {
                    MergeJson::Pair(a, b) => Ok((a, b)),
                    MergeJson::Joined(text) => pair(&whole, &text),
                })
                .collect::<Result<_>>()?;
            let added = json.added_tokens.into_iter().map(|token| (token.id, token.content)).collect();
            let vocabulary = Self { vocab: json.model.vocab, merges, added };
            vocabulary.expect_agreement(&dir.join("vocab.json"))?;
            return Ok(vocabulary);
        }
        let vocab = read_json(&dir.join("vocab.json"))?;
        let path = dir.join("merges.txt");
        let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
        let rules = text.lines().filter(|line| !line.starts_with("#version") && !line.trim().is_empty());
        let merges = rules.map(|line| pair(&path, line)).collect::<Result<_>>()?;
        let mut added = BTreeMap::new();
        let path = dir.join("added_tokens.json");
        if path.is_file() {
            let tokens: BTreeMap<String, u32> = read_json(&path)?;
            added.extend(tokens.into_iter().map(|(content, id)| (id, content)));
        }
        Ok(Self { vocab, merges, added })
    }

    /// Fails where the older file at `path`, which other programs may read instead, gives a word another id: one of the
    /// two is not this model's, and would make other pictures of the same prompt.
    fn expect_agreement(&self, path: &Path) -> Result<()> {
        if !path.is_file() {
            return Ok(());
        }
        let older: BTreeMap<String, u32> = read_json(path)?;
        let differs = |(word, id): &(&String, &u32)| self.vocab.get(*word).is_some_and(|ours| ours != *id);
        let Some((word, id)) = older.iter().find(differs) else { return Ok(()) };
        let reason = format!(
            "{word:?} = {id}, but {} in tokenizer.json beside it: they are of different vocabularies; keep the one that \
             this model was trained with",
            self.vocab[word]
        );
        Err(Error::invalid_file(path, reason))
    }
}

fn pair(path: &Path, text: &str) -> Result<(String, String)> {
    match text.split_once(' ') {
        Some((a, b)) if !a.is_empty() && !b.is_empty() => Ok((a.to_owned(), b.to_owned())),
        _ => Err(Error::invalid_file(path, format!("merge rule {text:?} is not two tokens with a space between"))),
    }
}

/// The special tokens and the length limit.
struct Specials {
    tokens: BTreeMap<&'static str, String>,
    length: Option<usize>,
}

impl Specials {
    fn open(dir: &Path) -> Result<Self> {
        const END: &str = "<|endoftext|>";
        let defaults = [("bos_token", "<|startoftext|>"), ("eos_token", END), ("unk_token", END), ("pad_token", END)];
        let mut fields = BTreeMap::<String, Value>::new();
        let config = dir.join("tokenizer_config.json");
        if config.is_file() {
            fields = read_json(&config)?;
        }
        // The older file, which decides where both exist (SD 2 pads with "!" only there), unless the newer one lists
        // its added tokens itself.
        let map = dir.join("special_tokens_map.json");
        if map.is_file() && !fields.contains_key("added_tokens_decoder") {
            fields.extend(read_json::<BTreeMap<String, Value>>(&map)?);
        }
        let mut tokens = BTreeMap::new();
        for (name, default) in defaults {
            let value = fields.get(name).map(|value| value.get("content").unwrap_or(value));
            let token = match value {
                None | Some(Value::Null) => default,
                Some(Value::String(token)) => token,
                Some(other) => return Err(Error::invalid_file(&config, format!("{name}: {other} is not a token"))),
            };
            tokens.insert(name, token.to_owned());
        }
        let length = fields.get("model_max_length").and_then(Value::as_u64).map(|n| n as usize);
        Ok(Self { tokens, length })
    }
}

impl Tokenizer {
    /// Opens a `tokenizer/` folder. Every token must have an embedding in the text encoder that `config` describes.
    pub fn open(dir: &Path, config: &TextEncoderConfig) -> Result<Self> {
        let Vocabulary { vocab, merges, added } = Vocabulary::open(dir)?;
        let Specials { tokens: specials, length } = Specials::open(dir)?;
        let invalid = |reason: String| Error::invalid_file(dir, reason);
        let failed = |e: tokenizers::Error| invalid(e.to_string());
        if let Some((token, id)) = vocab.iter().find(|(_, id)| **id as usize >= config.vocab_size) {
            let reason = format!("token {token:?} = {id}, but the text encoder's vocab_size is {}", config.vocab_size);
            return Err(invalid(reason));
        }
        if vocab.values().collect::<BTreeSet<_>>().len() != vocab.len() {
            return Err(invalid("two tokens of the vocabulary have the same id".into()));
        }
        let id = |name: &str| {
            let token = &specials[name];
            vocab.get(token).copied().ok_or_else(|| invalid(format!("{name} {token:?} is not in the vocabulary")))
        };
        let (begin, end) = (id("bos_token")?, id("eos_token")?);
        let pad = match added.iter().find(|(_, content)| **content == specials["pad_token"]) {
            Some((id, _)) => *id,
            None => id("pad_token")?,
        };

        let model = BPE::builder()
            .vocab_and_merges(vocab.clone().into_iter().collect::<Vocab>(), merges)
            .unk_token(specials["unk_token"].clone())
            .end_of_word_suffix("</w>".into())
            .build()
            .map_err(failed)?;
        let mut inner = tokenizers::Tokenizer::new(model);
        let spaces = Replace::new(ReplacePattern::Regex(r"\s+".into()), " ").map_err(failed)?;
        inner.with_normalizer(Some(normalizers::Sequence::new(vec![NFC.into(), spaces.into(), Lowercase.into()])));
        let words =
            Split::new(SplitPattern::Regex(WORDS.into()), SplitDelimiterBehavior::Removed, true).map_err(failed)?;
        inner.with_pre_tokenizer(Some(Sequence::new(vec![words.into(), ByteLevel::new(false, true, true).into()])));
        let special = |token: &String| AddedToken::from(token.clone(), true).normalized(false);
        inner.add_special_tokens(&specials.values().map(special).collect::<Vec<_>>());
        for (&id, content) in &added {
            inner.add_tokens(&[AddedToken::from(content.clone(), false)]);
            if inner.token_to_id(content) != Some(id) || id as usize >= config.vocab_size {
                return Err(invalid(format!("added token {content:?} = {id} does not continue the vocabulary")));
            }
        }
        let length = length.unwrap_or(config.max_position_embeddings).min(config.max_position_embeddings);
        if length < 2 {
            return Err(invalid(format!("model_max_length {length} leaves no room for begin and end")));
        }
        Ok(Self { inner, begin, end, pad, length })
    }

    /// The ids of `text` without begin, end and padding.
    pub fn ids(&self, text: &str) -> Result<Vec<u32>> {
        let failed = |e: tokenizers::Error| Error::prompt(text, e.to_string());
        Ok(self.inner.encode_fast(text, false).map_err(failed)?.get_ids().to_vec())
    }

    /// The id of this token, if it is one.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The id that the next added token gets, here and in other tools: behind all tokens, however many rows the text
    /// encoder's table has.
    pub fn next_id(&self) -> u32 {
        let added = self.inner.get_added_tokens_decoder().keys().max().map_or(0, |id| id + 1);
        added.max(self.inner.get_vocab_size(false) as u32)
    }

    /// The token with this id.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Length T of every prompt: begin and end included, padded.
    pub fn length(&self) -> usize {
        self.length
    }

    /// The id that every prompt begins with.
    pub fn begin(&self) -> u32 {
        self.begin
    }

    /// The id that ends every prompt.
    pub fn end(&self) -> u32 {
        self.end
    }

    /// The id that follows the end, up to [`Self::length`].
    pub fn pad(&self) -> u32 {
        self.pad
    }
}
