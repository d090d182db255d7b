//! PEFT: keys such as `base_model.model.<path>.lora_A.weight` or `unet.<path>.lora_A.default.weight`, and the
//! configuration that says what scales them.

use std::path::Path;

use regex::RegexBuilder;
use serde_json::{Map, Value};

use super::{Format, Key, Name, Role, fail};
use crate::error::{Result, excerpt, shortened};

/// What PEFT wraps a model in.
const WRAPPED: &str = "base_model.model.";

pub(super) fn parse(key: &str) -> Option<Key> {
    let roles = [(".lora_A.", Role::Down), (".lora_B.", Role::Up)];
    let (path, leaf, role) = roles.iter().find_map(|(infix, role)| {
        let (path, leaf) = key.rsplit_once(infix)?;
        Some((path, leaf, *role))
    })?;
    // The adapter's name may stand between, "default" where it has no other.
    if leaf != "weight" && leaf.strip_suffix(".weight").is_none_or(|name| name.is_empty() || name.contains('.')) {
        return None;
    }
    let path = path.strip_prefix(WRAPPED).unwrap_or(path);
    Some(Key { module: Name::Dotted(path.to_owned()), role, format: Format::Peft })
}

/// Whether the scale of `key` is stated elsewhere only.
pub(super) fn is_wrapped(key: &str) -> bool {
    key.starts_with(WRAPPED)
}

/// What an `adapter_config.json`, or the same in a file's header, says of alphas.
#[derive(Debug)]
pub(super) struct Config {
    rank: u64,
    alpha: f64,
    rank_pattern: Vec<Pattern>,
    alpha_pattern: Vec<Pattern>,
    rank_stabilised: bool,
}

#[derive(Debug)]
struct Pattern {
    regex: regex::Regex,
    value: f64,
}

impl Config {
    /// Reads the fields of `config` that the change depends on. Those of training do not matter.
    pub(super) fn new(path: &Path, config: &Map<String, Value>) -> Result<Self> {
        let text = |key: &str| config.get(key).and_then(Value::as_str);
        let is = |key: &str| config.get(key).and_then(Value::as_bool) == Some(true);
        let kind = text("peft_type").unwrap_or("LORA");
        if !kind.eq_ignore_ascii_case("lora") {
            return fail(path, format!("peft_type is {:?}, and only LORA is a sum with B A", shortened(kind)));
        }
        if is("use_dora") {
            return fail(
                path,
                "use_dora is true: DoRA scales each row of the changed weight to a length of its own, \
                               which is no sum with B A; train it as plain LoRA",
            );
        }
        // These begin by taking a part out of the base's weights.
        let start = text("init_lora_weights").unwrap_or_default().to_lowercase();
        if ["pissa", "olora", "corda", "loftq"].iter().any(|method| start.starts_with(method)) {
            return fail(
                path,
                format!(
                    "init_lora_weights is {:?}, which changes the base's weights, too: convert it \
                                       with PEFT (save_pretrained(..., path_initial_model_for_weight_conversion=...))",
                    shortened(&start)
                ),
            );
        }
        let number = |key: &str| match config.get(key).and_then(Value::as_f64).filter(|x| x.is_finite() && *x != 0.0) {
            Some(value) => Ok(value),
            None => fail(path, format!("the configuration's {key} is not a number, or 0")),
        };
        let Some(rank) = config.get("r").and_then(Value::as_u64).filter(|r| *r > 0) else {
            return fail(path, "the configuration's r is not a positive whole number");
        };
        Ok(Self {
            rank,
            alpha: number("lora_alpha")?,
            rank_pattern: patterns(path, config, "rank_pattern")?,
            alpha_pattern: patterns(path, config, "alpha_pattern")?,
            rank_stabilised: is("use_rslora"),
        })
    }

    /// The alpha of the layer at `module` with factors of rank `rank`, for a delta of alpha / rank B A.
    pub(super) fn alpha(&self, path: &Path, module: &str, rank: usize) -> Result<f64> {
        let expected = find(&self.rank_pattern, module).unwrap_or(self.rank as f64);
        if expected != rank as f64 {
            let module = shortened(module);
            let reason = format!("the configuration gives {module:?} rank {expected}, its factors have rank {rank}");
            return fail(path, reason);
        }
        let alpha = find(&self.alpha_pattern, module).unwrap_or(self.alpha);
        // rsLoRA divides by the root of the rank.
        Ok(if self.rank_stabilised { alpha * (rank as f64).sqrt() } else { alpha })
    }
}

/// The value of the first pattern that fits the end of `module`, from a dot on; as PEFT's `get_pattern_key`.
fn find(patterns: &[Pattern], module: &str) -> Option<f64> {
    patterns.iter().find(|pattern| pattern.regex.is_match(module)).map(|pattern| pattern.value)
}

fn patterns(path: &Path, config: &Map<String, Value>, field: &str) -> Result<Vec<Pattern>> {
    /// Bytes of a compiled pattern: a name's are a few thousand.
    const COMPILED_MAX: usize = 1 << 18;
    let entries = match config.get(field) {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Object(entries)) => entries,
        Some(_) => return fail(path, format!("the configuration's {field} is not an object")),
    };
    let pattern = |(key, value): (&String, &Value)| {
        let Some(value) = value.as_f64().filter(|x| x.is_finite() && *x != 0.0) else {
            return fail(path, format!("{field}: the value of {:?} is not a number, or 0", shortened(key)));
        };
        match RegexBuilder::new(&format!(r"^(?:.*\.)?(?:{key})$")).size_limit(COMPILED_MAX).build() {
            Ok(regex) => Ok(Pattern { regex, value }),
            Err(error) => {
                let (key, error) = (shortened(key), excerpt(&error.to_string()));
                fail(path, format!("{field}: {key:?} is not a regular expression that can be read: {error}"))
            }
        }
    };
    entries.iter().map(pattern).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;

    #[test]
    fn keys() {
        let key = |path: &str, role| Some(Key { module: Name::Dotted(path.into()), role, format: Format::Peft });
        assert_eq!(parse("base_model.model.a.to_q.lora_A.weight"), key("a.to_q", Role::Down));
        assert_eq!(parse("unet.a.to_q.lora_B.default.weight"), key("unet.a.to_q", Role::Up));
        assert_eq!(parse("a.to_q.lora_A.weight"), key("a.to_q", Role::Down));
        for other in ["unet.a.lora_A", "unet.a.lora_A.a.b.weight", "unet.a.lora_A..weight", "lora_A.weight"] {
            assert_eq!(parse(other), None, "{other}");
        }
    }

    fn config(fields: Value) -> Result<Config> {
        Config::new(Path::new("c"), fields.as_object().unwrap())
    }

    #[test]
    fn patterns_fit_the_ends_of_names() {
        let config = config(json!({
            "r": 4, "lora_alpha": 8, "rank_pattern": {"to_k": 2, "^down.0.to_q": 1},
            "alpha_pattern": {"a.to_k": 3.5, r"mid\..*to_q": 5}
        }))
        .unwrap();
        let alpha = |module, rank| config.alpha(Path::new("c"), module, rank).unwrap();
        assert_eq!(alpha("x.to_v", 4), 8.0);
        assert_eq!(alpha("x.a.to_k", 2), 3.5);
        assert_eq!(alpha("x.ba.to_k", 2), 8.0, "patterns begin at a dot");
        assert_eq!(alpha("mid.9.to_q", 4), 5.0);
        assert_eq!(alpha("down.0.to_q", 1), 8.0);
        assert!(config.alpha(Path::new("c"), "x.to_v", 3).unwrap_err().to_string().contains("rank 4"));
    }

    #[test]
    fn what_changes_the_meaning_is_seen() {
        let stabilised = config(json!({"r": 4, "lora_alpha": 8, "use_rslora": true})).unwrap();
        assert_eq!(stabilised.alpha(Path::new("c"), "x", 4).unwrap(), 16.0);
        let refused = |fields: Value, reason: &str| {
            let error = config(fields).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        };
        refused(json!({"r": 4, "lora_alpha": 8, "use_dora": true}), "DoRA");
        refused(json!({"r": 4, "lora_alpha": 8, "peft_type": "LOHA"}), "\"LOHA\"");
        refused(json!({"r": 4, "lora_alpha": 8, "init_lora_weights": "pissa_niter_4"}), "pissa");
        refused(json!({"r": 4}), "lora_alpha");
        refused(json!({"r": 0, "lora_alpha": 8}), "r is not");
        refused(json!({"r": 4, "lora_alpha": 8, "alpha_pattern": {"(": 1}}), "alpha_pattern");
        refused(json!({"r": 4, "lora_alpha": 8, "alpha_pattern": {"x{9999}{9999}": 1}}), "alpha_pattern");
        refused(json!({"r": 4, "lora_alpha": 8, "rank_pattern": [1]}), "rank_pattern");
    }
}
