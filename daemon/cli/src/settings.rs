//! Settings of methods, from a TOML file and from `KEY=VALUE` on the command line. What they mean, and whether they are
//! right, is the method's to say: its JSON Schema is checked before it is used.

use std::path::Path;
use std::str::FromStr;

use anyhow::{Context, bail};
use serde_json::{Map, Value};

/// One setting: `lambda=0.4`, `erasure.lambda=0.3`, `normalise=sum1`.
#[derive(Clone, Debug, PartialEq)]
pub struct Setting {
    /// The key, and the tables around it.
    path: Vec<String>,
    value: Value,
}

impl FromStr for Setting {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (key, value) = text.split_once('=').ok_or_else(|| format!("{text:?} is not like lambda=0.4"))?;
        let path: Vec<String> = key.split('.').map(|part| part.trim().to_owned()).collect();
        if path.iter().any(String::is_empty) {
            return Err(format!("{key:?} is no key, such as lambda or erasure.lambda"));
        }
        // As in TOML, but for words, which need no quotes.
        let toml = toml::from_str::<Map<String, Value>>(&format!("value = {value}"));
        let value = toml.ok().and_then(|mut table| table.remove("value"));
        Ok(Self { path, value: value.unwrap_or_else(|| text[key.len() + 1..].into()) })
    }
}

/// The settings in `file`, if there is one, and `given` on top of them.
pub fn read(file: Option<&Path>, given: &[Setting]) -> anyhow::Result<Map<String, Value>> {
    let mut settings = match file {
        Some(file) => {
            let text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
            toml::from_str(&text).with_context(|| format!("{}: not valid settings", file.display()))?
        }
        None => Map::new(),
    };
    for Setting { path, value } in given {
        let (last, tables) = path.split_last().context("a setting has no key")?;
        let mut at = &mut settings;
        for (depth, table) in tables.iter().enumerate() {
            let inner = at.entry(table.clone()).or_insert_with(|| Value::Object(Map::new()));
            match inner {
                Value::Object(inner) => at = inner,
                other => bail!("{} = {other}: {} needs a table there", path[..=depth].join("."), path.join(".")),
            }
        }
        at.insert(last.clone(), value.clone());
    }
    Ok(settings)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde_json::json;

    use super::*;

    fn parse(texts: &[&str]) -> Value {
        let settings: Vec<Setting> = texts.iter().map(|text| text.parse().unwrap()).collect();
        Value::Object(read(None, &settings).unwrap())
    }

    #[test]
    fn values_are_those_of_toml_and_words() {
        assert_eq!(
            parse(&["a=0.5", "b=3", "c=true", "d=sum1", "e=\"x y\"", "f=[1, 2]", "g=a=b", "h=", "k=-1e-3"]),
            json!({"a": 0.5, "b": 3, "c": true, "d": "sum1", "e": "x y", "f": [1, 2], "g": "a=b", "h": "", "k": -1e-3})
        );
        assert_eq!(parse(&["x.y=1", "x.z=2", "x.y=3"]), json!({"x": {"y": 3, "z": 2}}));
    }

    #[test]
    fn what_is_no_setting_is_refused() {
        for text in ["lambda", "=1", ".a=1", "a..b=1"] {
            assert!(text.parse::<Setting>().is_err(), "{text}");
        }
        let clash: Vec<Setting> = ["a=1", "a.b=2"].iter().map(|text| text.parse().unwrap()).collect();
        assert_eq!(read(None, &clash).unwrap_err().to_string(), "a = 1: a.b needs a table there");
    }

    #[test]
    fn the_command_line_counts_more_than_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("merge.toml");
        std::fs::write(&file, "lambda = 0.4\n[inner]\nx = 1\ny = 2\n").unwrap();
        let given: Vec<Setting> = ["lambda=1", "inner.x=7"].iter().map(|text| text.parse().unwrap()).collect();
        let both = read(Some(&file), &given).unwrap();
        assert_eq!(Value::Object(both), json!({"lambda": 1, "inner": {"x": 7, "y": 2}}));
        std::fs::write(&file, "lambda = \n").unwrap();
        assert!(read(Some(&file), &[]).unwrap_err().to_string().contains("merge.toml: not valid settings"));
        assert!(read(Some(&folder.path().join("gone")), &[]).unwrap_err().to_string().contains("gone"));
    }
}
