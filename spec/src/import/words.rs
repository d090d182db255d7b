//! Textual inversions: vectors that stand in a prompt where a word's embedding would.

use std::path::Path;

use super::fail;
use super::file::File;
use crate::error::{Result, shortened};
use crate::limits;

/// One word's vectors, [vectors, d] or [d], in a file.
pub(super) struct Bundle<'a> {
    pub(super) name: String,
    pub(super) file: &'a File,
    pub(super) key: &'a str,
    shape: [usize; 2],
}

impl Bundle<'_> {
    pub(super) fn vectors(&self) -> usize {
        self.shape[0]
    }
}

const SECOND_ENCODER: &str = "it is for a second text encoder, as SDXL has, and the base model has one";

/// The word of a key `bundle_emb.NAME.clip_l` inside a LoRA file; none if `key` is not of that form.
pub(super) fn bundled<'a>(file: &'a File, key: &'a str) -> Option<Result<Bundle<'a>, String>> {
    let (name, leaf) = key.strip_prefix("bundle_emb.")?.split_once('.')?;
    Some(match leaf {
        "clip_g" => Err(SECOND_ENCODER.into()),
        "clip_l" | "emb_params" => bundle(file, key, name.to_owned()),
        _ if leaf.starts_with("string_to_param.") => bundle(file, key, name.to_owned()),
        _ => Err("not a form of word that is known here: clip_l, emb_params or string_to_param".into()),
    })
}

/// The word of `key` in a file that has nothing else.
pub(super) fn of_file<'a>(file: &'a File, key: &'a str) -> Result<Bundle<'a>, String> {
    let stem = || file.path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    match key {
        "clip_g" => Err(SECOND_ENCODER.into()),
        "clip_l" | "emb_params" => bundle(file, key, stem()),
        _ if file.tensors.len() == 1 => {
            let name = key.trim_start_matches('<').trim_end_matches('>');
            bundle(file, key, name.to_owned())
        }
        _ => Err("not a key of a textual inversion (one {token: vectors}, emb_params, or clip_l)".into()),
    }
}

/// Whether `file` is a textual inversion.
pub(super) fn is_file_of_words(file: &File) -> bool {
    let mut keys = file.tensors.keys();
    let mut plain = |key: &String| !key.contains('.') && file.tensors.get(key).is_some_and(|t| t.shape.len() <= 2);
    keys.len() > 0 && (keys.len() == 1 && keys.all(&mut plain) || file.tensors.keys().any(|key| is_word(key)))
}

fn is_word(key: &str) -> bool {
    ["emb_params", "clip_l"].contains(&key)
}

fn bundle<'a>(file: &'a File, key: &'a str, name: String) -> Result<Bundle<'a>, String> {
    let shape = file.tensors.get(key).map_or(&[][..], |tensor| &tensor.shape);
    let shape = match *shape {
        [width] => [1, width],
        [vectors, width] if vectors > 0 => [vectors, width],
        _ => return Err(format!("shape {:?} is not of vectors, [n, d]", &shape[..shape.len().min(8)])),
    };
    Ok(Bundle { name: shortened(&name), file, key, shape })
}

/// The vectors of all `words`, one after the other, each of `width` elements.
pub(super) fn read(path: &Path, words: &[Bundle<'_>], width: usize) -> Result<Vec<Vec<f32>>> {
    let total = words.iter().fold(0usize, |sum, word| sum.saturating_add(word.vectors()));
    if total > limits::TOKENS_MAX {
        let most = limits::TOKENS_MAX;
        return fail(path, format!("its words have {total} vectors, an adapter has at most {most}"));
    }
    let mut vectors = Vec::new();
    for word in words {
        let [count, actual] = word.shape;
        if actual != width {
            let (key, file) = (shortened(word.key), &word.file.path);
            let reason = format!("tensor {key:?} has vectors of {actual} elements, the base model's have {width}");
            return fail(file, format!("{reason}: it is for another base model"));
        }
        let values = word.file.numbers(word.key, count * width)?;
        vectors.extend(values.chunks_exact(width.max(1)).map(<[f32]>::to_vec));
    }
    Ok(vectors)
}
