//! Prompts as token ids.

use std::path::Path;

use super::clip::TextConfig;
use crate::error::{Error, Result};

pub struct Tokens {
    inner: tokenizers::Tokenizer,
    length: usize,
    end: u32,
}

impl Tokens {
    pub fn open(folder: &Path, config: &TextConfig) -> Result<Self> {
        let path = folder.join("tokenizer.json");
        let mut inner =
            tokenizers::Tokenizer::from_file(&path).map_err(|e| Error::invalid_file(&path, e.to_string()))?;
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| Error::invalid_file(&path, e.to_string()))?;
        let end = inner.token_to_id("<|endoftext|>").ok_or_else(|| Error::invalid_file(&path, "no end token"))?;
        Ok(Self { inner, length: config.max_position_embeddings, end })
    }

    pub fn encode(&self, prompt: &str) -> Result<Vec<u32>> {
        let failed = |e: tokenizers::Error| Error::Prompt { prompt: prompt.to_owned(), reason: e.to_string() };
        let mut ids = self.inner.encode(prompt, true).map_err(failed)?.get_ids().to_vec();
        if ids.len() > self.length {
            ids.truncate(self.length - 1);
            ids.push(self.end);
        }
        Ok(ids)
    }
}
