//! How a picture was made, as text: the format of AUTOMATIC1111's web UI, which many tools read.
//!
//! First line the prompt, then `Negative prompt: ...` if there is one, then one line of `Key: value` pairs. A value
//! with a comma, colon, quote or line break is a JSON string. Line breaks in prompts become spaces, so that every text
//! has one reading.

use std::fmt::Write;

use serde::{Deserialize, Serialize};

/// One adapter of a composition.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdapterUse {
    /// The concept's name.
    pub name: String,
    /// SHA-256 of its file, in hex.
    pub digest: String,
    /// The weight it was merged with.
    pub weight: f32,
}

/// How adapters were merged, where that was not the usual way.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MergeUse {
    /// The strategy's id.
    pub strategy: String,
    /// Its settings, as far as they were given.
    #[serde(default)]
    pub config: serde_json::Map<String, serde_json::Value>,
}

/// All that is needed to make a picture again.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationParameters {
    /// The prompt.
    pub prompt: String,
    /// The negative prompt; empty for none.
    pub negative_prompt: String,
    /// Sampling steps.
    pub steps: usize,
    /// The sampler's id.
    pub sampler: String,
    /// Classifier-free guidance scale.
    pub guidance_scale: f32,
    /// The seed of this picture.
    pub seed: u64,
    /// Width in pixels.
    pub width: usize,
    /// Height in pixels.
    pub height: usize,
    /// The model's digest, in hex.
    pub model_digest: String,
    /// The adapters that were merged into it.
    pub adapters: Vec<AdapterUse>,
    /// How they were merged; none: by the default strategy with its default settings.
    pub merge: Option<MergeUse>,
    /// Storage type of the model's weights, "f16" or "bf16"; empty: f32.
    pub precision: String,
    /// The sampler's settings, as far as they were given.
    pub sampler_config: serde_json::Map<String, serde_json::Value>,
}

impl GenerationParameters {
    /// The text that goes into a PNG's `parameters` chunk.
    pub fn to_text(&self) -> String {
        let mut text = one_line(&self.prompt);
        if !self.negative_prompt.is_empty() {
            let _ = write!(text, "\n{NEGATIVE}{}", one_line(&self.negative_prompt));
        }
        let mut pairs = vec![
            ("Steps", self.steps.to_string()),
            ("Sampler", quoted(&self.sampler)),
            ("CFG scale", self.guidance_scale.to_string()),
            ("Seed", self.seed.to_string()),
            ("Size", format!("{}x{}", self.width, self.height)),
            ("Model hash", quoted(&self.model_digest)),
        ];
        if !self.adapters.is_empty() {
            pairs.push(("Adapters", quoted(&serde_json::json!(self.adapters).to_string())));
        }
        if let Some(merge) = &self.merge {
            pairs.push(("Merge", quoted(&serde_json::json!(merge).to_string())));
        }
        if !self.precision.is_empty() {
            pairs.push(("Precision", quoted(&self.precision)));
        }
        if !self.sampler_config.is_empty() {
            pairs.push(("Sampler settings", quoted(&serde_json::json!(self.sampler_config).to_string())));
        }
        pairs.push(("Version", concat!("BlockLoRA ", env!("CARGO_PKG_VERSION")).into()));
        let pairs: Vec<String> = pairs.into_iter().map(|(key, value)| format!("{key}: {value}")).collect();
        text + "\n" + &pairs.join(", ")
    }

    /// Reads [`Self::to_text`] back; the error says which part is missing or wrong. Unknown keys are passed over.
    pub fn from_text(text: &str) -> Result<Self, String> {
        let (head, settings) = text.trim_end().rsplit_once('\n').ok_or("no line of settings")?;
        let (prompt, negative) = match head.split_once('\n') {
            None => (head, ""),
            Some((prompt, rest)) => {
                (prompt, rest.strip_prefix(NEGATIVE).ok_or("the second line is not the negative prompt")?)
            }
        };
        let mut parameters =
            Self { prompt: prompt.to_owned(), negative_prompt: negative.to_owned(), ..Default::default() };
        let mut seen = 0;
        for pair in pairs(settings)? {
            let (key, value) = pair;
            let wrong = |_| format!("{key}: {value:?} is not a number");
            match key.as_str() {
                "Steps" => parameters.steps = value.parse().map_err(|_| wrong(()))?,
                "Sampler" => parameters.sampler = value,
                "CFG scale" => parameters.guidance_scale = value.parse().map_err(|_| wrong(()))?,
                "Seed" => parameters.seed = value.parse().map_err(|_| wrong(()))?,
                "Size" => {
                    let (width, height) = value.split_once('x').ok_or_else(|| wrong(()))?;
                    parameters.width = width.parse().map_err(|_| wrong(()))?;
                    parameters.height = height.parse().map_err(|_| wrong(()))?;
                }
                "Model hash" => parameters.model_digest = value,
                "Adapters" => {
                    parameters.adapters = serde_json::from_str(&value).map_err(|e| format!("Adapters: {e}"))?;
                    continue;
                }
                "Merge" => {
                    parameters.merge = Some(serde_json::from_str(&value).map_err(|e| format!("Merge: {e}"))?);
                    continue;
                }
                "Precision" => {
                    parameters.precision = value;
                    continue;
                }
                "Sampler settings" => {
                    parameters.sampler_config =
                        serde_json::from_str(&value).map_err(|e| format!("Sampler settings: {e}"))?;
                    continue;
                }
                _ => continue,
            }
            seen += 1;
        }
        if seen == 6 { Ok(parameters) } else { Err("steps, sampler, scale, seed, size or model is missing".into()) }
    }
}

const NEGATIVE: &str = "Negative prompt: ";

/// PNG text may hold no control characters; a line break would be read as the end of a prompt.
fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

fn quoted(value: &str) -> String {
    if value.contains([',', ':', '"', '\n']) { serde_json::json!(value).to_string() } else { value.to_owned() }
}

/// Splits `Key: value, Key: "quoted, value"`.
fn pairs(mut rest: &str) -> Result<Vec<(String, String)>, String> {
    let mut pairs = Vec::new();
    while !rest.trim().is_empty() {
        let (key, value) = rest.split_once(':').ok_or_else(|| format!("{rest:?} is not a setting"))?;
        let value = value.trim_start();
        let value = if value.starts_with('"') {
            let mut strings = serde_json::Deserializer::from_str(value).into_iter::<String>();
            let string =
                strings.next().and_then(Result::ok).ok_or_else(|| format!("{key}: the quotes do not close"))?;
            let end = strings.byte_offset();
            rest = value[end..].trim_start_matches([',', ' ']);
            string
        } else {
            let (value, after) = value.split_once(',').unwrap_or((value, ""));
            rest = after;
            value.trim().to_owned()
        };
        pairs.push((key.trim().to_owned(), value));
    }
    Ok(pairs)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn parameters() -> GenerationParameters {
        GenerationParameters {
            prompt: "<milo> and <zuko>, \"at sea\": Negative prompt: no".into(),
            negative_prompt: "Steps: 3, blurred".into(),
            steps: 20,
            sampler: "method-2".into(),
            guidance_scale: 7.5,
            seed: u64::MAX,
            width: 32,
            height: 64,
            model_digest: "0123abcd".into(),
            adapters: vec![AdapterUse { name: "milo, the \"cat\": größer".into(), digest: "ff".into(), weight: 0.1 }],
            merge: Some(MergeUse {
                strategy: "average, weighted".into(),
                config: serde_json::Map::from_iter([("clash".into(), "mean".into())]),
            }),
            precision: "f16".into(),
            sampler_config: serde_json::Map::from_iter([("karras".into(), true.into())]),
        }
    }

    #[test]
    fn text_reads_back_whatever_the_prompt() {
        let plain = GenerationParameters { adapters: vec![], negative_prompt: String::new(), ..parameters() };
        let empty = GenerationParameters { prompt: String::new(), ..plain.clone() };
        let odd =
            GenerationParameters { sampler: "a,b:c\"d".into(), prompt: "Negative prompt: x".into(), ..parameters() };
        for expected in [parameters(), plain, empty, odd] {
            assert_eq!(GenerationParameters::from_text(&expected.to_text()).unwrap(), expected);
        }
    }

    #[test]
    fn text_is_what_other_tools_expect() {
        let usual = GenerationParameters {
            adapters: vec![],
            merge: None,
            precision: String::new(),
            sampler_config: Default::default(),
            ..parameters()
        };
        let text = GenerationParameters { prompt: "a\ncat".into(), ..usual }.to_text();
        let version = concat!("Version: BlockLoRA ", env!("CARGO_PKG_VERSION"));
        assert_eq!(
            text,
            format!(
                "a cat\nNegative prompt: Steps: 3, blurred\nSteps: 20, Sampler: method-2, CFG scale: 7.5, \
                 Seed: 18446744073709551615, Size: 32x64, Model hash: 0123abcd, {version}"
            )
        );
    }

    #[test]
    fn broken_text_is_an_error_that_says_what() {
        for (text, expected) in [
            ("", "no line of settings"),
            ("a cat", "no line of settings"),
            ("a cat\nSteps: 20", "missing"),
            ("a cat\nand a dog\nSteps: 20", "negative prompt"),
            ("a cat\nSteps: many", "Steps"),
            ("a cat\nSize: 32", "Size"),
            ("a cat\nSampler: \"method", "quotes"),
            ("a cat\nAdapters: \"[1]\"", "Adapters"),
        ] {
            let message = GenerationParameters::from_text(text).unwrap_err();
            assert!(message.contains(expected), "{text:?}: {message}");
        }
    }
}
