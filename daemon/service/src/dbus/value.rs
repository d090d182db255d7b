//! Dictionaries of options: taken apart key by key, so that an unknown key or a wrong type is an error with its name.

use std::collections::HashMap;

use serde_json::{Map, Value, json};
use zbus::{OwnedVariant, Variant};

use crate::error::{Error, Result};

/// a{sv}.
pub type Dict = HashMap<String, OwnedVariant>;

/// A value to be sent. Only file descriptors can fail to be owned, and none is ever put into a variant here.
pub fn own(value: impl Into<Variant<'static>>) -> OwnedVariant {
    let value: Variant<'static> = value.into();
    value.try_into_owned().unwrap_or_else(|_| OwnedVariant::from(0u8))
}

/// Builds an a{sv}: `dict([("width", own(64u32))])`.
pub fn dict<const N: usize>(entries: [(&str, OwnedVariant); N]) -> Dict {
    entries.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
}

/// A list of strings.
pub fn strings(values: &[String]) -> OwnedVariant {
    own(Variant::from(values.to_vec()))
}

/// Copies a dictionary.
pub fn clone_dict(from: &Dict) -> Dict {
    from.iter().filter_map(|(key, value)| Some((key.clone(), value.try_clone().ok()?))).collect()
}

/// The options of one call.
pub struct Options {
    map: Dict,
}

/// Strips variants in variants.
fn plain<'a>(mut value: &'a Variant<'a>) -> &'a Variant<'a> {
    while let Variant::Variant(inner) = value {
        value = inner;
    }
    value
}

macro_rules! scalar {
    ($(#[$doc:meta])* $name:ident, $type:ty, $text:literal, $($pattern:pat => $value:expr),+) => {
        $(#[$doc])*
        pub fn $name(&mut self, key: &str) -> Result<Option<$type>> {
            let Some(found) = self.map.remove(key) else { return Ok(None) };
            #[allow(clippy::cast_lossless)]
            let value = match plain(&found) {
                $($pattern => $value,)+
                other => return Err(wrong_type(key, $text, other)),
            };
            Ok(Some(value))
        }
    };
}

fn wrong_type(key: &str, expected: &str, found: &Variant) -> Error {
    Error::option(format!("option {key:?} must be of type {expected}, not {}", found.value_signature()))
}

impl Options {
    /// The options in `map`.
    pub fn new(map: Dict) -> Self {
        Self { map }
    }

    scalar!(
        /// A string.
        string, String, "s", Variant::Str(text) => text.as_str().to_owned());
    scalar!(
        /// A truth value.
        boolean, bool, "b", Variant::Bool(value) => *value);
    scalar!(
        /// A 32-bit number; smaller types are taken, too.
        u32, u32, "u", Variant::U32(value) => *value, Variant::U16(value) => *value as u32, Variant::U8(value) => *value as u32);
    scalar!(
        /// A 64-bit number; smaller types are taken, too.
        u64, u64, "t", Variant::U64(value) => *value, Variant::U32(value) => *value as u64, Variant::U16(value) => *value as u64, Variant::U8(value) => *value as u64);
    scalar!(
        /// A real number; whole numbers are taken, too.
        f64, f64, "d", Variant::F64(value) => *value, Variant::U32(value) => *value as f64, Variant::I32(value) => *value as f64);

    /// A list of strings.
    pub fn strings(&mut self, key: &str) -> Result<Option<Vec<String>>> {
        let Some(found) = self.map.remove(key) else { return Ok(None) };
        let Variant::Array(array) = plain(&found) else { return Err(wrong_type(key, "as", &found)) };
        let string = |value: &Variant| match plain(value) {
            Variant::Str(text) => Ok(text.as_str().to_owned()),
            other => Err(wrong_type(key, "as", other)),
        };
        array.inner().iter().map(string).collect::<Result<_>>().map(Some)
    }

    /// A list of 64-bit numbers.
    pub fn u64s(&mut self, key: &str) -> Result<Option<Vec<u64>>> {
        let Some(found) = self.map.remove(key) else { return Ok(None) };
        let Variant::Array(array) = plain(&found) else { return Err(wrong_type(key, "at", &found)) };
        let number = |value: &Variant| match plain(value) {
            Variant::U64(number) => Ok(*number),
            other => Err(wrong_type(key, "at", other)),
        };
        array.inner().iter().map(number).collect::<Result<_>>().map(Some)
    }

    /// A dictionary as a JSON object.
    pub fn object(&mut self, key: &str) -> Result<Option<Map<String, Value>>> {
        let Some(found) = self.map.remove(key) else { return Ok(None) };
        match json_of(key, &found)? {
            Value::Object(map) => Ok(Some(map)),
            _ => Err(wrong_type(key, "a{sv}", &found)),
        }
    }

    /// A dictionary as options of its own.
    pub fn options(&mut self, key: &str) -> Result<Option<Options>> {
        let Some(found) = self.map.remove(key) else { return Ok(None) };
        let Variant::Dict(entries) = plain(&found) else { return Err(wrong_type(key, "a{sv}", &found)) };
        let mut map = Dict::new();
        for (name, value) in entries.iter() {
            let Variant::Str(name) = name else { return Err(wrong_type(key, "a{sv}", &found)) };
            let value = plain(value).try_to_owned().map_err(|e| Error::option(format!("option {key:?}: {e}")))?;
            map.insert(name.as_str().to_owned(), value);
        }
        Ok(Some(Self::new(map)))
    }

    /// A list of (object path, options): a(oa{sv}).
    pub fn entries(&mut self, key: &str) -> Result<Option<Vec<(String, Options)>>> {
        let Some(found) = self.map.remove(key) else { return Ok(None) };
        let wrong = || wrong_type(key, "a(oa{sv})", &found);
        let Variant::Array(array) = plain(&found) else { return Err(wrong()) };
        let mut list = Vec::new();
        for item in array.inner() {
            let Variant::Structure(item) = plain(item) else { return Err(wrong()) };
            let [Variant::ObjectPath(path), Variant::Dict(entries)] = item.fields() else { return Err(wrong()) };
            let mut map = Dict::new();
            for (name, value) in entries.iter() {
                let Variant::Str(name) = name else { return Err(wrong()) };
                let value = plain(value).try_to_owned().map_err(|e| Error::option(format!("option {key:?}: {e}")))?;
                map.insert(name.as_str().to_owned(), value);
            }
            list.push((path.as_str().to_owned(), Self::new(map)));
        }
        Ok(Some(list))
    }

    /// A required string.
    pub fn required(&mut self, key: &str) -> Result<String> {
        self.string(key)?.ok_or_else(|| Error::option(format!("option {key:?} is required")))
    }

    /// Fails on a key that nobody took.
    pub fn finish(self) -> Result<()> {
        let mut left: Vec<&String> = self.map.keys().collect();
        left.sort();
        match left.first() {
            None => Ok(()),
            Some(key) => Err(Error::option(format!("unknown option {key:?}"))),
        }
    }

    /// Everything that is left, as JSON.
    pub fn into_json(self) -> Result<Map<String, Value>> {
        self.map.iter().map(|(key, value)| Ok((key.clone(), json_of(key, value)?))).collect()
    }
}

/// A D-Bus value as JSON; `key` names it in errors.
pub fn json_of(key: &str, value: &Variant) -> Result<Value> {
    Ok(match plain(value) {
        Variant::U8(v) => json!(v),
        Variant::Bool(v) => json!(v),
        Variant::I16(v) => json!(v),
        Variant::U16(v) => json!(v),
        Variant::I32(v) => json!(v),
        Variant::U32(v) => json!(v),
        Variant::I64(v) => json!(v),
        Variant::U64(v) => json!(v),
        Variant::F64(v) if v.is_finite() => json!(v),
        Variant::Str(v) => json!(v.as_str()),
        Variant::Array(v) => Value::Array(v.inner().iter().map(|v| json_of(key, v)).collect::<Result<_>>()?),
        Variant::Dict(v) => {
            let mut map = Map::new();
            for (name, value) in v.iter() {
                let Variant::Str(name) = name else { return Err(wrong_type(key, "a{sv}", value)) };
                map.insert(name.as_str().to_owned(), json_of(&format!("{key}.{}", name.as_str()), value)?);
            }
            Value::Object(map)
        }
        other => return Err(wrong_type(key, "a number, string, list or dictionary", other)),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn options_name_the_key_at_fault() {
        let mut options = Options::new(dict([("steps", own("many")), ("x", own(1u32))]));
        assert_eq!(options.u32("steps").unwrap_err().message, "option \"steps\" must be of type u, not s");
        assert_eq!(options.u32("none").unwrap(), None);
        assert_eq!(options.finish().unwrap_err().message, "unknown option \"x\"");
        let mut options = Options::new(dict([("seed", own(7u32))]));
        assert_eq!(options.u64("seed").unwrap(), Some(7));
        options.finish().unwrap();
        assert_eq!(Options::new(Dict::new()).required("name").unwrap_err().message, "option \"name\" is required");
    }

    #[test]
    fn nested_dictionaries_become_json() {
        let inner = dict([("unet", own(1e-4f64)), ("flags", strings(&["a".into()]))]);
        let options = Options::new(dict([("learning_rate", own(Variant::from(inner))), ("steps", own(3u32))]));
        let json = Value::Object(options.into_json().unwrap());
        assert_eq!(json, json!({"learning_rate": {"unet": 1e-4, "flags": ["a"]}, "steps": 3}));
    }
}
