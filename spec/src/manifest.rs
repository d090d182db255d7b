//! The manifest: everything about an adapter but its numbers.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Deserializer, Serialize};

use crate::error::shortened;
use crate::limits;
use crate::partition::Partition;

/// What kind of thing a concept is; it decides caption templates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A thing or an animal.
    Subject,
    /// A person or a character.
    Person,
    /// A place.
    Scene,
    /// A manner of drawing.
    Style,
}

impl Kind {
    const ALL: [Self; 4] = [Self::Subject, Self::Person, Self::Scene, Self::Style];

    /// Its name in manifests and in the daemon's interface.
    pub fn name(self) -> &'static str {
        match self {
            Self::Subject => "subject",
            Self::Person => "person",
            Self::Scene => "scene",
            Self::Style => "style",
        }
    }

    /// The one called `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

/// One word that the concept adds to the vocabulary.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Token {
    /// Its name; the tensor is `tokens.<name>`.
    pub name: String,
    /// How many vectors it has: one per cross-attention layer in forward order (layer-wise), or 1 (plain).
    pub vectors: usize,
}

/// The model that the adapter was trained on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Base {
    /// What its layers are called and how large they are.
    pub architecture: String,
    /// SHA-256 of its weights, in lower-case hex.
    pub digest: String,
}

/// The algorithm that trained the adapter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Algorithm {
    /// The trainer's id.
    pub id: String,
    /// Its version.
    pub version: String,
    /// SHA-256 of the plugin's file in lower-case hex; none for a built-in trainer.
    #[serde(deserialize_with = "nullable")]
    pub digest: Option<String>,
    /// Its whole configuration, a JSON object.
    pub config: serde_json::Value,
}

/// How the factors make a layer's change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Delta {
    /// delta = alpha B A (ED-LoRA and BlockLoRA).
    #[serde(rename = "alpha * B * A")]
    Alpha,
    /// delta = (alpha / r) B A (most other LoRA).
    #[serde(rename = "alpha / rank * B * A")]
    AlphaOverRank,
}

impl Delta {
    /// The factor of B A.
    pub fn scale(self, alpha: f32, rank: usize) -> f32 {
        match self {
            Self::Alpha => alpha,
            Self::AlphaOverRank => alpha / rank as f32,
        }
    }
}

/// How the adapter was trained, as far as the algorithm's configuration does not say.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Training {
    /// Optimiser steps taken.
    pub steps: u64,
    /// The seed of everything random in it.
    pub seed: u64,
    /// SHA-256 of the training data, in lower-case hex.
    pub data_digest: String,
}

/// An adapter's manifest. In the file every field is present; `null` stands for `None`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// The concept's name: `<name>` in a prompt. Letters, digits, `_` and `-`, at most 64, a letter or digit first.
    pub name: String,
    /// What kind of thing it is.
    pub kind: Kind,
    /// The word for the class it belongs to ("man", "dog", "painting").
    pub class_word: String,
    /// Its tokens, in the order in which they replace the name in a prompt.
    pub tokens: Vec<Token>,
    /// The model it was trained on.
    pub base: Base,
    /// What trained it.
    pub algorithm: Algorithm,
    /// Which output rows it owns; none means all.
    #[serde(deserialize_with = "nullable")]
    pub partition: Option<Partition>,
    /// The rank r of every layer's factors.
    pub rank: usize,
    /// alpha in the delta formula.
    pub alpha: f32,
    /// The delta formula.
    pub delta: Delta,
    /// Outputs m of every layer that it changes. [`AdapterBuilder`](crate::AdapterBuilder) fills it in.
    pub outputs: BTreeMap<String, usize>,
    /// The probability lambda with which training erased an output; 0 without output erasure.
    pub erasure_lambda: f32,
    /// How it was trained.
    pub training: Training,
    /// The licence of the adapter, if stated (an SPDX expression where possible).
    #[serde(deserialize_with = "nullable")]
    pub licence: Option<String>,
    /// When it was made: `YYYY-MM-DDThh:mm:ssZ`, if stated.
    #[serde(deserialize_with = "nullable")]
    pub created: Option<String>,
    /// SHA-256 over all tensors, in lower-case hex. [`AdapterBuilder`](crate::AdapterBuilder) fills it in.
    pub tensor_digest: String,
}

/// A field that must be there but may be null.
fn nullable<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<Option<T>, D::Error> {
    Option::deserialize(deserializer)
}

/// A field of a manifest and what is wrong with it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct Fault {
    /// Its path: `tokens[0].name`.
    pub field: String,
    /// What it must be.
    pub reason: String,
}

fn ensure(ok: bool, field: impl Into<String>, reason: impl Into<String>) -> Result<(), Fault> {
    if ok { Ok(()) } else { Err(Fault { field: field.into(), reason: reason.into() }) }
}

/// What a name must be, as a phrase for error messages: "... must be 1 to 64 ...".
pub const NAME_RULE: &str = "must be 1 to 64 ASCII letters, digits, '_' or '-', beginning with a letter or digit";

fn ensure_name(name: &str, field: impl Into<String>) -> Result<(), Fault> {
    ensure(is_name(name), field, format!("{:?} {NAME_RULE}", shortened(name)))
}

/// Whether `name` can name a concept or a token. Such a name is also safe as a file name.
pub fn is_name(name: &str) -> bool {
    name.len() <= 64
        && name.as_bytes().first().is_some_and(u8::is_ascii_alphanumeric)
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
}

/// What is wrong with `name` as a layer's name, if anything.
pub(crate) fn layer_name_fault(name: &str) -> Option<&'static str> {
    let mut parts = name.split('.');
    let known = matches!(parts.next(), Some("unet" | "text_encoder" | "text_encoder_2"));
    let is_part = |p: &str| !p.is_empty() && p.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    if name.len() + ".lora_A".len() > limits::TENSOR_NAME_BYTES_MAX {
        Some("longer than 249 bytes")
    } else if !known {
        Some("must begin with unet., text_encoder. or text_encoder_2.")
    } else if !name.contains('.') || !parts.all(is_part) {
        Some("must be a module path: parts of ASCII letters, digits and '_' joined by single dots")
    } else {
        None
    }
}

fn is_hex_digest(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

pub(crate) fn is_text(text: &str, chars_max: usize) -> bool {
    !text.is_empty() && text.chars().count() <= chars_max && !text.chars().any(char::is_control)
}

/// `YYYY-MM-DDThh:mm:ssZ`, and a moment that there was or will be.
fn is_timestamp(text: &str) -> bool {
    let pattern = b"0000-00-00T00:00:00Z";
    let fits = text.len() == pattern.len()
        && text.bytes().zip(pattern).all(|(b, p)| if *p == b'0' { b.is_ascii_digit() } else { b == *p });
    let number = |at: std::ops::Range<usize>| text.get(at).and_then(|t| t.parse::<u32>().ok()).unwrap_or(u32::MAX);
    let (year, month) = (number(0..4), number(5..7));
    let days = match month {
        2 if year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400)) => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        1..=12 => 31,
        _ => 0,
    };
    // No leap seconds: few programs that read times take them.
    fits && (1..=days).contains(&number(8..10)) && number(11..13) < 24 && number(14..16) < 60 && number(17..19) < 60
}

impl Manifest {
    /// The factor of B A in a layer's change: alpha, or alpha / r.
    pub fn scale(&self) -> f32 {
        self.delta.scale(self.alpha, self.rank)
    }

    /// The rows that the adapter owns of a layer of `m` outputs, ascending.
    pub fn rows(&self, m: usize) -> Vec<u32> {
        match &self.partition {
            Some(partition) => partition.rows(m),
            None => (0..m as u32).collect(),
        }
    }

    pub(crate) fn row_count(&self, m: usize) -> usize {
        self.partition.map_or(m, |p| p.count(m))
    }

    /// Checks every field for itself; tensors are checked against it later.
    pub fn validate(&self) -> Result<(), Fault> {
        const HEX_RULE: &str = "must be a SHA-256 digest: 64 lower-case hexadecimal digits";
        ensure_name(&self.name, "name")?;
        ensure(is_text(&self.class_word, 64), "class_word", "must be 1 to 64 characters, none of them control")?;
        self.validate_tokens()?;
        ensure(
            is_text(&self.base.architecture, 256),
            "base.architecture",
            "must be 1 to 256 characters, none of them control",
        )?;
        ensure(is_hex_digest(&self.base.digest), "base.digest", HEX_RULE)?;
        ensure_name(&self.algorithm.id, "algorithm.id")?;
        ensure(
            is_text(&self.algorithm.version, 64),
            "algorithm.version",
            "must be 1 to 64 characters, none of them control",
        )?;
        ensure(self.algorithm.digest.as_deref().is_none_or(is_hex_digest), "algorithm.digest", HEX_RULE)?;
        ensure(self.algorithm.config.is_object(), "algorithm.config", "must be an object")?;
        if let Some(partition) = &self.partition {
            validate_partition(partition)?;
        }
        let rank_ok = (1..=limits::RANK_MAX).contains(&self.rank);
        ensure(rank_ok, "rank", format!("{} is not in 1..={}", self.rank, limits::RANK_MAX))?;
        let alpha_ok = self.alpha.is_normal() && self.alpha > 0.0;
        ensure(alpha_ok, "alpha", format!("{} is not a positive normal number", self.alpha))?;
        self.validate_outputs()?;
        let lambda_ok = (0.0..1.0).contains(&self.erasure_lambda);
        ensure(lambda_ok, "erasure_lambda", format!("{} is not in 0..1", self.erasure_lambda))?;
        ensure(is_hex_digest(&self.training.data_digest), "training.data_digest", HEX_RULE)?;
        let licence_ok = self.licence.as_deref().is_none_or(|l| is_text(l, 256));
        ensure(licence_ok, "licence", "must be null or 1 to 256 characters, none of them control")?;
        let created_ok = self.created.as_deref().is_none_or(is_timestamp);
        ensure(created_ok, "created", "must be null or a time like 2026-01-31T23:59:59Z")?;
        ensure(is_hex_digest(&self.tensor_digest), "tensor_digest", HEX_RULE)
    }

    fn validate_tokens(&self) -> Result<(), Fault> {
        let count = self.tokens.len();
        ensure(count <= limits::TOKENS_MAX, "tokens", format!("{count} tokens, at most {}", limits::TOKENS_MAX))?;
        let mut seen = BTreeSet::new();
        for (i, token) in self.tokens.iter().enumerate() {
            ensure_name(&token.name, format!("tokens[{i}].name"))?;
            ensure(seen.insert(&token.name), format!("tokens[{i}].name"), format!("{:?} occurs twice", token.name))?;
            let ok = (1..=limits::VECTORS_MAX).contains(&token.vectors);
            let reason = format!("{} is not in 1..={}", token.vectors, limits::VECTORS_MAX);
            ensure(ok, format!("tokens[{i}].vectors"), reason)?;
        }
        Ok(())
    }

    fn validate_outputs(&self) -> Result<(), Fault> {
        for (name, &m) in &self.outputs {
            if let Some(reason) = layer_name_fault(name) {
                return ensure(false, format!("outputs[{:?}]", shortened(name)), reason);
            }
            let ok = (1..=limits::LAYER_WIDTH_MAX).contains(&m);
            ensure(ok, format!("outputs[{name:?}]"), format!("{m} is not in 1..={}", limits::LAYER_WIDTH_MAX))?;
        }
        // Permutations are made once per distinct m: bound what they can cost.
        let distinct: usize = self.outputs.values().collect::<BTreeSet<_>>().into_iter().sum();
        let reason = format!("the distinct values add up to {distinct}, at most {}", limits::DISTINCT_OUTPUTS_SUM_MAX);
        ensure(distinct <= limits::DISTINCT_OUTPUTS_SUM_MAX, "outputs", reason)
    }
}

fn validate_partition(partition: &Partition) -> Result<(), Fault> {
    let &Partition { capacity, slot, .. } = partition;
    let ok = (1..=limits::CAPACITY_MAX).contains(&capacity);
    ensure(ok, "partition.capacity", format!("{capacity} is not in 1..={}", limits::CAPACITY_MAX))?;
    ensure(slot < capacity, "partition.slot", format!("{slot} is not below the capacity {capacity}"))
}
