//! Dictionaries of the interface, a{sv}: built from typed values, read into typed values or JSON.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use zbus::Variant;

use crate::error::{Error, Result};
use crate::proxies::Dict;

/// Options of a call, built key by key; a key that was never set is left to the daemon's default.
#[derive(Debug, Default)]
pub struct Options(Dict);

impl Options {
    /// No options.
    pub fn new() -> Self {
        Self::default()
    }

    /// With `key` set to `value`. File descriptors cannot stand in a dictionary and are left out.
    pub fn with(mut self, key: &str, value: impl Into<Variant<'static>>) -> Self {
        if let Ok(value) = value.into().try_into_owned() {
            self.0.insert(key.to_owned(), value);
        }
        self
    }

    /// With `key` set, if there is a value.
    pub fn maybe(self, key: &str, value: Option<impl Into<Variant<'static>>>) -> Self {
        match value {
            Some(value) => self.with(key, value),
            None => self,
        }
    }

    /// As what is sent.
    pub fn into_dict(self) -> Dict {
        self.0
    }
}

/// A JSON object as a{sv}. Lists of one type become arrays of it, others arrays of variants; null is an error.
pub fn dict_of_json(object: &Map<String, Value>) -> Result<Dict> {
    let entry = |(key, value): (&String, &Value)| {
        let value = variant_of_json(value).ok_or_else(|| invalid(format!("{key}: null is not a value")))?;
        Ok((key.clone(), value.try_into_owned().map_err(Error::protocol)?))
    };
    object.iter().map(entry).collect()
}

fn invalid(message: String) -> Error {
    Error::Daemon { kind: crate::ErrorKind::InvalidOption, message }
}

fn variant_of_json(value: &Value) -> Option<Variant<'static>> {
    Some(match value {
        Value::Null => return None,
        Value::Bool(value) => (*value).into(),
        Value::Number(number) => match (number.as_u64(), number.as_i64(), number.as_f64()) {
            (Some(value), ..) => value.into(),
            (_, Some(value), _) => value.into(),
            (.., value) => value?.into(),
        },
        Value::String(text) => text.clone().into(),
        Value::Array(items) => {
            let items = items.iter().map(variant_of_json).collect::<Option<Vec<_>>>()?;
            let same = items.windows(2).all(|pair| pair[0].value_signature() == pair[1].value_signature());
            match items.first() {
                Some(first) if same => {
                    let mut array = zbus::Array::new(first.value_signature());
                    for item in items {
                        array.append(item).ok()?;
                    }
                    array.into()
                }
                _ => items.into(),
            }
        }
        Value::Object(object) => {
            let entries = object.iter().map(|(key, value)| Some((key.clone(), variant_of_json(value)?)));
            entries.collect::<Option<std::collections::HashMap<_, _>>>()?.into()
        }
    })
}

/// A value of the interface as JSON. Object paths and signatures are strings, structures are lists; a file descriptor
/// and a number that is not finite are null.
pub fn json_of(value: &Variant<'_>) -> Value {
    match value {
        Variant::U8(v) => (*v).into(),
        Variant::Bool(v) => (*v).into(),
        Variant::I16(v) => (*v).into(),
        Variant::U16(v) => (*v).into(),
        Variant::I32(v) => (*v).into(),
        Variant::U32(v) => (*v).into(),
        Variant::I64(v) => (*v).into(),
        Variant::U64(v) => (*v).into(),
        Variant::F64(v) => (*v).into(),
        Variant::Str(v) => v.as_str().into(),
        Variant::Signature(v) => v.to_string().into(),
        Variant::ObjectPath(v) => v.as_str().into(),
        Variant::Variant(v) => json_of(v),
        Variant::Array(v) => v.inner().iter().map(json_of).collect(),
        Variant::Structure(v) => v.fields().iter().map(json_of).collect(),
        Variant::Dict(v) => {
            let entry = |(key, value): (&Variant<'_>, &Variant<'_>)| {
                let key = match json_of(key) {
                    Value::String(key) => key,
                    other => other.to_string(),
                };
                (key, json_of(value))
            };
            Value::Object(v.iter().map(entry).collect())
        }
        Variant::Fd(_) => Value::Null,
    }
}

/// A dictionary as a JSON object.
pub fn object_of(dict: &Dict) -> Map<String, Value> {
    dict.iter().map(|(key, value)| (key.clone(), json_of(value))).collect()
}

/// A dictionary as a typed value; keys that the type does not know are passed over, so that a newer daemon can say
/// more.
pub fn read<T: DeserializeOwned>(dict: &Dict) -> Result<T> {
    serde_json::from_value(Value::Object(object_of(dict))).map_err(Error::protocol)
}

/// Likewise for a page of them.
pub fn read_all<T: DeserializeOwned>(dicts: &[Dict]) -> Result<Vec<T>> {
    dicts.iter().map(read).collect()
}

/// A dictionary as a value of another dictionary.
pub(crate) fn nested(dict: Dict) -> Variant<'static> {
    let entries: std::collections::HashMap<String, Variant<'static>> =
        dict.into_iter().map(|(key, value)| (key, Variant::from(value))).collect();
    entries.into()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde_json::json;

    use super::*;

    #[test]
    fn json_survives_the_way_there_and_back() {
        let object = json!({
            "steps": 1000, "negative": -3, "rate": 1e-4, "name": "x", "flag": true, "empty": [], "numbers": [1, 2],
            "words": ["a", "b"], "mixed": [1, "a", [true]], "table": {"unet": 1e-4, "deep": {"list": [0.5]}}
        });
        let dict = dict_of_json(object.as_object().unwrap()).unwrap();
        assert_eq!(Value::Object(object_of(&dict)), object);
        assert_eq!(dict["words"].value_signature().to_string(), "as");
        assert_eq!(dict["mixed"].value_signature().to_string(), "av");
        assert_eq!(dict["table"].value_signature().to_string(), "a{sv}");
        assert!(dict_of_json(json!({"a": null}).as_object().unwrap()).is_err());
    }

    #[test]
    fn options_have_the_types_of_their_values() {
        let dict = Options::new().with("seed", 7u64).maybe("width", Some(32u32)).maybe("height", None::<u32>);
        let dict = dict.into_dict();
        assert_eq!(dict.len(), 2);
        assert_eq!(dict["seed"].value_signature().to_string(), "t");
        assert_eq!(dict["width"].value_signature().to_string(), "u");
    }
}
