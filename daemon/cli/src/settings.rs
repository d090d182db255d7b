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
        let toml = toml::from_str::<toml::Table>(&format!("value = {value}"));
        let toml = toml.ok().and_then(|mut table| table.remove("value"));
        let value = toml.map_or_else(|| Ok(value.into()), |value| json_of(key, value))?;
        Ok(Self { path, value })
    }
}

/// A value of TOML as one of JSON, which has no numbers that are not finite and no dates.
fn json_of(key: &str, value: toml::Value) -> Result<Value, String> {
    Ok(match value {
        toml::Value::Float(number) if !number.is_finite() => {
            return Err(format!("{key} = {number}: must be a finite number"));
        }
        toml::Value::Datetime(date) => return Err(format!("{key} = {date}: is a date; put it into quotes")),
        toml::Value::Float(number) => number.into(),
        toml::Value::Integer(number) => number.into(),
        toml::Value::Boolean(value) => value.into(),
        toml::Value::String(text) => text.into(),
        toml::Value::Array(items) => items.into_iter().map(|item| json_of(key, item)).collect::<Result<_, _>>()?,
        toml::Value::Table(table) => Value::Object(object_of(&format!("{key}."), table)?),
    })
}

/// A table whose keys stand behind `prefix`, likewise.
fn object_of(prefix: &str, table: toml::Table) -> Result<Map<String, Value>, String> {
    let entry =
        |(key, value): (String, toml::Value)| json_of(&format!("{prefix}{key}"), value).map(|value| (key, value));
    table.into_iter().map(entry).collect()
}

/// The settings in `file`, if there is one, and `given` on top of them.
pub fn read(file: Option<&Path>, given: &[Setting]) -> anyhow::Result<Map<String, Value>> {
    let mut settings = match file {
        Some(file) => {
            let text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
            let table = toml::from_str(&text).with_context(|| format!("{}: not valid settings", file.display()))?;
            object_of("", table).map_err(|reason| anyhow::anyhow!("{}: {reason}", file.display()))?
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
        for text in ["lambda", "=1", ".a=1", "a..b=1", "a=nan", "a=-inf", "a=[0.5, nan]", "a={ b = inf }"] {
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
        std::fs::write(&file, "[inner]\nx = nan\n").unwrap();
        let error = read(Some(&file), &[]).unwrap_err().to_string();
        assert!(error.contains("merge.toml: inner.x = NaN: must be a finite number"), "{error}");
        std::fs::write(&file, "lambda = \n").unwrap();
        assert!(read(Some(&file), &[]).unwrap_err().to_string().contains("merge.toml: not valid settings"));
        assert!(read(Some(&folder.path().join("gone")), &[]).unwrap_err().to_string().contains("gone"));
    }
}
