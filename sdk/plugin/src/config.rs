//! Typed settings: a serde struct is the configuration of a method, and its JSON Schema comes from it.

use schemars::JsonSchema;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::error::{Code, Error, Result};

/// The settings of a method; in most plugins the method itself is the struct that holds them.
///
/// Implement it for a struct with
/// ```
/// use blocklora_sdk::Config;
/// use schemars::JsonSchema;
/// use serde::{Deserialize, Serialize};
///
/// /// Adds up what each adapter adds.
/// #[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
/// #[serde(default, deny_unknown_fields)]
/// pub struct Sum {
///     /// Multiplies every adapter.
///     #[schemars(range(min = 0.0, max = 2.0))]
///     pub factor: f32,
/// }
///
/// impl Default for Sum {
///     fn default() -> Self {
///         Self { factor: 1.0 }
///     }
/// }
///
/// impl Config for Sum {}
/// ```
/// The host checks what people write against the schema before the plugin sees it: unknown keys, types, ranges. A doc
/// comment is the setting's description, and `Default` its default. What a schema cannot say belongs into
/// [`Config::check`].
///
/// Settings that people leave out take their values from `Self::default()`, also inside tables: `[learning_rate]` with
/// `unet` alone keeps the other defaults. Shared settings may be put in with `#[serde(flatten)]`.
pub trait Config: Default + Serialize + DeserializeOwned + JsonSchema {
    /// Checks what the schema cannot say: one setting against another. Errors come from [`Error::config`].
    fn check(&self) -> Result<()> {
        Ok(())
    }
}

/// The settings that `json` (an object, or null for none) and the defaults make. Errors name the key.
pub fn resolve<C: Config>(json: &Value) -> Result<C> {
    let mut merged = to_value(&C::default())?;
    match json {
        Value::Null => {}
        Value::Object(_) => overlay(&mut merged, json),
        other => return Err(Error::new(Code::InvalidConfig, format!("the settings must be a table, not {other}"))),
    }
    let config: C = serde_json::from_value(merged)
        .map_err(|e| Error::new(Code::InvalidConfig, format!("the settings do not fit this method: {e}")))?;
    config.check()?;
    Ok(config)
}

/// The settings in full, as a JSON object: what an adapter's file records. 32-bit numbers keep their short form.
pub fn to_value<C: Serialize>(config: &C) -> Result<Value> {
    // Through text: serde_json widens an f32 to the digits of an f64 when it makes a value of it.
    let text = serde_json::to_string(config)
        .map_err(|e| Error::new(Code::Failed, format!("the settings cannot be written as JSON: {e}")))?;
    serde_json::from_str(&text).map_err(|e| Error::new(Code::Failed, format!("the settings are no JSON: {e}")))
}

/// The JSON Schema (draft 2020-12) of the settings, each with its default.
pub fn schema<C: Config>() -> Result<Value> {
    let mut schema = schemars::schema_for!(C).to_value();
    let defaults = to_value(&C::default())?;
    if let (Some(properties), Value::Object(defaults)) =
        (schema.get_mut("properties").and_then(Value::as_object_mut), defaults)
    {
        set_defaults(properties, defaults);
    }
    Ok(schema)
}

fn set_defaults(properties: &mut Map<String, Value>, defaults: Map<String, Value>) {
    for (key, default) in defaults {
        if let Some(property) = properties.get_mut(&key).and_then(Value::as_object_mut) {
            property.insert("default".to_owned(), default);
        }
    }
}

/// Puts `over` on top of `base`: tables key by key, everything else whole.
pub fn overlay(base: &mut Value, over: &Value) {
    match (base, over) {
        (Value::Object(base), Value::Object(over)) => {
            for (key, value) in over {
                overlay(base.entry(key.clone()).or_insert(Value::Null), value);
            }
        }
        (base, over) => base.clone_from(over),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde::Deserialize;
    use serde_json::json;

    use super::*;

    #[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
    #[serde(default, deny_unknown_fields)]
    struct Rates {
        /// Of the UNet.
        #[schemars(range(min = 0.0, max = 10.0))]
        unet: f32,
        tokens: f32,
    }
    impl Default for Rates {
        fn default() -> Self {
            Self { unet: 1e-4, tokens: 1e-3 }
        }
    }

    #[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
    #[serde(default, deny_unknown_fields)]
    struct Shared {
        rank: usize,
        rates: Rates,
    }
    impl Default for Shared {
        fn default() -> Self {
            Self { rank: 4, rates: Rates::default() }
        }
    }

    /// A method.
    #[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
    #[serde(default, deny_unknown_fields)]
    struct Method {
        #[serde(flatten)]
        shared: Shared,
        /// Its own.
        lambda: Option<f32>,
    }
    impl Default for Method {
        fn default() -> Self {
            Self { shared: Shared { rank: 8, rates: Rates { unet: 0.5, tokens: 0.1 } }, lambda: None }
        }
    }
    impl Config for Method {
        fn check(&self) -> Result<()> {
            if self.shared.rank == 0 {
                return Err(Error::config("rank", 0, "must be 1 or more"));
            }
            Ok(())
        }
    }

    #[test]
    fn what_is_left_out_keeps_the_methods_default_at_every_depth() {
        assert_eq!(resolve::<Method>(&Value::Null).unwrap(), Method::default());
        let method: Method = resolve(&json!({"rates": {"tokens": 1}, "lambda": 0.3})).unwrap();
        assert_eq!(method.shared, Shared { rank: 8, rates: Rates { unet: 0.5, tokens: 1.0 } });
        assert_eq!(method.lambda, Some(0.3));
    }

    #[test]
    fn errors_name_the_key() {
        let error = |json| resolve::<Method>(&json).unwrap_err();
        assert!(error(json!({"rang": 4})).message.contains("rang"), "{}", error(json!({"rang": 4})));
        assert!(error(json!({"rates": {"vae": 4}})).message.contains("vae"));
        assert!(error(json!({"rank": 0})).message.contains("rank = 0: must be 1 or more"));
        assert!(error(json!([1])).message.contains("must be a table"));
        assert_eq!(error(json!({"rank": "x"})).code, Code::InvalidConfig);
    }

    #[test]
    fn the_schema_has_the_methods_own_defaults_and_refuses_unknown_keys() {
        let schema = schema::<Method>().unwrap();
        assert_eq!(schema["properties"]["rank"]["default"], 8);
        assert_eq!(schema["properties"]["rates"]["default"], json!({"unet": 0.5, "tokens": 0.1}));
        assert_eq!(schema["properties"]["lambda"]["description"], "Its own.");
        let closed = ["additionalProperties", "unevaluatedProperties"].iter().any(|k| schema[*k] == false);
        assert!(closed, "{schema}");
    }

    #[test]
    fn the_record_has_short_numbers_and_reads_back() {
        let value = to_value(&Method::default()).unwrap();
        assert_eq!(value.to_string(), r#"{"lambda":null,"rank":8,"rates":{"tokens":0.1,"unet":0.5}}"#);
        assert_eq!(resolve::<Method>(&value).unwrap(), Method::default());
    }
}
