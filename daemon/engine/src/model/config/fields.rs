//! Reading a component's JSON config field by field, so that no field that changes the result goes unnoticed.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::error::{Error, Result};

/// No size in a config may be larger, so that products of two do not overflow.
const SIZE_MAX: usize = 1 << 24;
/// No config may be larger, in bytes.
const FILE_BYTES_MAX: u64 = 1 << 24;

/// The fields of a config file that have not been read yet.
pub(crate) struct Fields {
    path: PathBuf,
    fields: BTreeMap<String, Value>,
}

/// Reads a JSON file of reasonable size.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let metadata = std::fs::metadata(path).map_err(|e| Error::io(path, e))?;
    if metadata.len() > FILE_BYTES_MAX {
        return Err(Error::invalid_file(path, format!("{} bytes are too many for a config", metadata.len())));
    }
    let text = std::fs::read(path).map_err(|e| Error::io(path, e))?;
    serde_json::from_slice(&text).map_err(|e| Error::invalid_file(path, format!("not the JSON expected here: {e}")))
}

impl Fields {
    /// Opens a config file. Fields whose names begin with an underscore are notes of the writing library.
    pub fn open(path: &Path) -> Result<Self> {
        let mut fields: BTreeMap<String, Value> = read_json(path)?;
        fields.retain(|name, _| !name.starts_with('_') || name == "_class_name");
        Ok(Self { path: path.to_owned(), fields })
    }

    /// An [`Error::Unsupported`] about `field`.
    pub fn unsupported(&self, field: &str, value: impl ToString, supported: &str) -> Error {
        Error::Unsupported {
            path: self.path.clone(),
            field: field.into(),
            value: value.to_string(),
            supported: supported.into(),
        }
    }

    /// An [`Error::InvalidFile`] about `field`.
    pub fn invalid(&self, field: &str, reason: impl std::fmt::Display) -> Error {
        Error::invalid_file(&self.path, format!("{field}: {reason}"))
    }

    /// Takes a field; absent and null are none.
    pub fn take<T: DeserializeOwned>(&mut self, field: &str) -> Result<Option<T>> {
        match self.fields.remove(field) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => serde_json::from_value(value).map(Some).map_err(|e| self.invalid(field, e)),
        }
    }

    /// Takes a field that has a default.
    pub fn or<T: DeserializeOwned>(&mut self, field: &str, default: T) -> Result<T> {
        Ok(self.take(field)?.unwrap_or(default))
    }

    /// Takes a finite number that has a default.
    pub fn number_or(&mut self, field: &str, default: f64) -> Result<f64> {
        let value = self.or(field, default)?;
        if value.is_finite() { Ok(value) } else { Err(self.invalid(field, "must be finite")) }
    }

    fn check_size(&self, field: &str, value: usize) -> Result<usize> {
        if (1..=SIZE_MAX).contains(&value) {
            Ok(value)
        } else {
            Err(self.invalid(field, format!("{value} is not in 1..={SIZE_MAX}")))
        }
    }

    /// Takes a size that has a default, in 1..=2^24.
    pub fn size_or(&mut self, field: &str, default: usize) -> Result<usize> {
        let value = self.or(field, default)?;
        self.check_size(field, value)
    }

    /// Takes a list of sizes that must be there and not empty.
    pub fn sizes(&mut self, field: &str) -> Result<Vec<usize>> {
        let values: Vec<usize> = self.take(field)?.ok_or_else(|| self.invalid(field, "missing"))?;
        if values.is_empty() || values.len() > 32 {
            return Err(self.invalid(field, "must list 1 to 32 sizes"));
        }
        values.into_iter().map(|value| self.check_size(field, value)).collect()
    }

    /// Takes a field that is one size for all of `count` blocks or a list with one for each.
    pub fn per_block(&mut self, field: &str, count: usize, default: Option<usize>) -> Result<Option<Vec<usize>>> {
        let values = match self.fields.remove(field) {
            None | Some(Value::Null) => match default {
                Some(default) => vec![default; count],
                None => return Ok(None),
            },
            Some(value @ Value::Array(_)) => serde_json::from_value(value).map_err(|e| self.invalid(field, e))?,
            Some(value) => {
                vec![serde_json::from_value(value).map_err(|e| self.invalid(field, e))?; count]
            }
        };
        if values.len() != count {
            return Err(self.invalid(field, format!("{} entries for {count} blocks", values.len())));
        }
        values.into_iter().map(|value| self.check_size(field, value)).collect::<Result<_>>().map(Some)
    }

    /// Takes a field whose only supported value is `only`, which is also what its absence means.
    pub fn only(&mut self, field: &str, only: impl Into<Value>) -> Result<()> {
        let only = only.into();
        match self.fields.remove(field) {
            None | Some(Value::Null) => Ok(()),
            Some(value) if same(&value, &only) => Ok(()),
            Some(value) => Err(self.unsupported(field, value, &format!("only {only}"))),
        }
    }

    /// Takes fields that do not change what the model computes here.
    pub fn ignore(&mut self, fields: &[&str]) {
        for field in fields {
            self.fields.remove(*field);
        }
    }

    /// Fails on a field that nobody has taken, unless it is switched off (null or false).
    pub fn finish(self) -> Result<()> {
        match self.fields.iter().find(|(_, value)| !matches!(value, Value::Null | Value::Bool(false))) {
            None => Ok(()),
            Some((field, value)) => Err(self.unsupported(field, value, "a setting this engine does not know")),
        }
    }
}

/// Equality that does not tell 1 from 1.0.
fn same(a: &Value, b: &Value) -> bool {
    match (a.as_f64(), b.as_f64()) {
        (Some(a), Some(b)) => a == b,
        _ => a == b,
    }
}
