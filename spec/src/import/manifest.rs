//! What an imported adapter says of itself.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::json;
use sha2::{Digest, Sha256};

use super::factors::Fitted;
use super::file::File;
use super::words::Bundle;
use super::{Format, Options, Origin, Target, fail};
use crate::adapter::{TokenVectors, hex};
use crate::error::Result;
use crate::manifest::{Algorithm, Manifest, NAME_RULE, Token, Training, is_name, is_text};

type Metadata = BTreeMap<String, String>;

/// Entries of a header that are kept, where they are not longer than a line or two.
const KEPT: [&str; 12] = [
    "modelspec.architecture",
    "modelspec.author",
    "modelspec.title",
    "modelspec.trigger_phrase",
    "ss_base_model_version",
    "ss_network_alpha",
    "ss_network_args",
    "ss_network_dim",
    "ss_network_module",
    "ss_output_name",
    "ss_sd_model_hash",
    "ss_sd_model_name",
];
const KEPT_CHARS_MAX: usize = 500;

/// The manifest but for outputs and the digest of the tensors. `format` and `files` say where it came from; steps and
/// seed are 0 where the file does not state them.
#[allow(clippy::too_many_arguments)] // All of them are what a manifest is about.
pub(super) fn of<'a>(
    path: &Path,
    target: &Target,
    options: &Options,
    fitted: &Fitted,
    words: &[Bundle<'_>],
    format: Format,
    metadata: Option<&Metadata>,
    files: impl Iterator<Item = &'a File>,
) -> Result<Manifest> {
    let said = |key: &str| metadata.and_then(|m| m.get(key)).map(String::as_str);
    let number = |key: &str| said(key).and_then(|text| text.trim().parse().ok()).unwrap_or(0);
    let name = name(path, options, words, &said)?;
    let count = words.iter().map(Bundle::vectors).sum::<usize>();
    let tokens = (1..=count).map(|i| Token { name: token_name(&name, i), vectors: 1 }).collect();
    let kept: Metadata = KEPT
        .iter()
        .filter_map(|key| Some((*key, said(key)?)))
        .filter(|(_, text)| text.chars().count() <= KEPT_CHARS_MAX)
        .map(|(key, text)| (key.to_owned(), text.to_owned()))
        .collect();
    let origins: Vec<Origin> = files.map(File::origin).collect();
    // What is too long to be one, or none, is not the user's fault.
    let stated = said("modelspec.license").filter(|l| is_text(l, 256)).map(str::to_owned);
    let licence = options.licence.clone().or(stated);
    Ok(Manifest {
        name,
        kind: options.kind,
        class_word: options.class_word.clone().unwrap_or_else(|| options.kind.name().to_owned()),
        tokens,
        base: target.base.clone(),
        algorithm: Algorithm {
            id: format!("import-{}", format.id()),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            digest: None,
            config: json!({ "sources": origins, "metadata": kept }),
        },
        partition: None,
        rank: fitted.rank,
        alpha: fitted.alpha,
        delta: fitted.delta,
        outputs: BTreeMap::new(),
        erasure_lambda: 0.0,
        training: Training { steps: number("ss_steps"), seed: number("ss_seed"), data_digest: data_digest(&origins) },
        licence,
        created: None,
        tensor_digest: String::new(),
    })
}

/// The digest of what the adapter was made from: that of the file, or where there are several, of their digests, one on
/// a line.
fn data_digest(origins: &[Origin]) -> String {
    match origins {
        [one] => one.sha256.clone(),
        several => {
            let lines: String = several.iter().map(|origin| format!("{}\n", origin.sha256)).collect();
            hex(&Sha256::digest(lines))
        }
    }
}

/// The tokens that `manifest` lists, with their vectors.
pub(super) fn tokens(manifest: &Manifest, vectors: Vec<Vec<f32>>, width: usize) -> Vec<TokenVectors> {
    let token =
        |(token, values): (&Token, Vec<f32>)| TokenVectors { name: token.name.clone(), layers: 1, width, values };
    manifest.tokens.iter().zip(vectors).map(token).collect()
}

fn token_name(name: &str, number: usize) -> String {
    // At most 64 characters with the number behind it; a name is ASCII.
    format!("{}-{number}", name.get(..60).unwrap_or(name))
}

/// The name that was asked for, or the first that the file has and that can be made one.
fn name<'a>(
    path: &Path,
    options: &Options,
    words: &[Bundle<'_>],
    said: &impl Fn(&str) -> Option<&'a str>,
) -> Result<String> {
    if let Some(name) = &options.name {
        return if is_name(name) { Ok(name.clone()) } else { fail(path, format!("the name {name:?} {NAME_RULE}")) };
    }
    let stem = path.file_stem().map(|stem| stem.to_string_lossy().into_owned());
    let of_words = match words {
        [word] => Some(word.name.clone()),
        _ => None,
    };
    let titles = ["modelspec.title", "ss_output_name"].map(|key| said(key).map(str::to_owned));
    let found = titles.into_iter().chain([of_words, stem]).flatten().find_map(|text| name_from(&text));
    found.map_or_else(|| fail(path, "its name has no letter or digit that ours may have: give it one (--name)"), Ok)
}

/// `text` as a name: other characters become one `_`, and it begins with a letter or digit.
fn name_from(text: &str) -> Option<String> {
    let mut name = String::new();
    for c in text.chars() {
        match c {
            'a'..='z' | 'A'..='Z' | '0'..='9' | '-' | '_' => name.push(c),
            _ if name.ends_with('_') => {}
            _ => name.push('_'),
        }
        if name.len() >= 128 {
            break;
        }
    }
    let name: String = name.trim_start_matches(['_', '-']).trim_end_matches('_').chars().take(64).collect();
    is_name(&name).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_made_of_what_files_are_called() {
        let name = |text: &str| name_from(text);
        assert_eq!(name("milo").as_deref(), Some("milo"));
        assert_eq!(name("<My cat, v1.5>").as_deref(), Some("My_cat_v1_5"));
        assert_eq!(name("__x--y__").as_deref(), Some("x--y"));
        assert_eq!(name(&"é1".repeat(90)).map(|n| n.len()), Some(64));
        assert_eq!(name("日本"), None);
        assert_eq!(name(""), None);
    }

    #[test]
    fn tokens_of_long_names_are_names() {
        assert!(is_name(&token_name(&"x".repeat(64), 16)));
        assert_eq!(token_name("milo", 2), "milo-2");
    }
}
