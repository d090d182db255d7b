//! Settings against a plugin's JSON Schema, before the plugin sees them: errors name the key and what is allowed.

use blocklora_spec::shortened_to;
use jsonschema::ValidationError;
use jsonschema::error::ValidationErrorKind;
use serde_json::Value;

/// Checks `settings` (an object; null stands for none) against `schema`. The error is one line for people.
pub fn check(schema: &Value, settings: &Value) -> Result<(), String> {
    if settings.is_null() {
        return Ok(());
    }
    if !settings.is_object() {
        return Err(format!("the settings must be a table of keys and values, not {settings}"));
    }
    let validator =
        jsonschema::validator_for(schema).map_err(|e| format!("the plugin's settings schema is not valid: {e}"))?;
    match validator.iter_errors(settings).min_by_key(|e| e.instance_path().to_string().len()) {
        None => Ok(()),
        Some(error) => Err(line(&error, schema)),
    }
}

/// Every float that is a whole number as an integer: clients whose language knows one kind of number send 2 as 2.0, and
/// what wants a float takes an integer, too.
pub fn with_whole_numbers(value: Value) -> Value {
    /// Up to here every whole number is a float.
    const MOST: f64 = (1_u64 << 53) as f64;
    match value {
        Value::Number(number) => match number.as_f64() {
            Some(float) if number.is_f64() && float.fract() == 0.0 && float.abs() <= MOST => (float as i64).into(),
            _ => number.into(),
        },
        Value::Array(items) => items.into_iter().map(with_whole_numbers).collect(),
        Value::Object(table) => table.into_iter().map(|(key, value)| (key, with_whole_numbers(value))).collect(),
        value => value,
    }
}

/// `key = value: what is allowed`.
fn line(error: &ValidationError<'_>, schema: &Value) -> String {
    // A choice that fails in its only reasonable branch is that branch's error.
    if let ValidationErrorKind::AnyOf { context } | ValidationErrorKind::OneOfNotValid { context } = error.kind() {
        let deeper = context
            .iter()
            .flatten()
            .filter(|e| !is_choice(e) && !is_null_branch(e))
            .max_by_key(|e| e.instance_path().to_string().len());
        if let Some(deeper) = deeper {
            return line(deeper, schema);
        }
    }
    let path = key(&error.instance_path().to_string());
    match error.kind() {
        ValidationErrorKind::AdditionalProperties { unexpected }
        | ValidationErrorKind::UnevaluatedProperties { unexpected } => {
            let unknown = unexpected.first().map_or("", String::as_str);
            let known = keys_at(schema, &error.instance_path().to_string());
            let place = if path.is_empty() { String::new() } else { format!("{path}.") };
            format!("unknown key {place}{unknown}: the keys are {}", known.join(", "))
        }
        kind => {
            format!("{path} = {}: must be {}", shortened_to(&error.instance().to_string(), 60), allowed(kind, error))
        }
    }
}

/// What a setting may be, as far as its schema says it in a few words: " [a, b]", " [0 to 1]", or nothing.
pub fn range(schema: &Value, property: &Value) -> String {
    let property = resolve(schema, property);
    let branches = property.get("oneOf").or_else(|| property.get("anyOf")).and_then(Value::as_array);
    let choices = branches.into_iter().flatten().chain([property]).flat_map(|branch| {
        branch.get("const").into_iter().chain(branch.get("enum").and_then(Value::as_array).into_iter().flatten())
    });
    let choices: Vec<String> = choices.map(ToString::to_string).collect();
    let bound = |key: &str| property.get(key).map(ToString::to_string);
    match (choices.is_empty(), bound("minimum"), bound("maximum")) {
        (false, ..) => format!(" [{}]", choices.join(", ")),
        (_, Some(least), Some(most)) => format!(" [{least} to {most}]"),
        (_, Some(least), None) => format!(" [{least} or more]"),
        (_, None, Some(most)) => format!(" [{most} or less]"),
        _ => String::new(),
    }
}

/// Whether the error is that a value is none of some choices. (Those with a description have a branch each.)
fn is_choice(error: &ValidationError<'_>) -> bool {
    matches!(error.kind(), ValidationErrorKind::Constant { .. } | ValidationErrorKind::Enum { .. })
}

/// Whether the error comes from the `null` branch of an optional setting.
fn is_null_branch(error: &ValidationError<'_>) -> bool {
    matches!(error.kind(), ValidationErrorKind::Type { .. }) && error.to_string().ends_with("\"null\"")
}

fn allowed(kind: &ValidationErrorKind, error: &ValidationError<'_>) -> String {
    match kind {
        ValidationErrorKind::Minimum { limit } => format!("{limit} or more"),
        ValidationErrorKind::Maximum { limit } => format!("{limit} or less"),
        ValidationErrorKind::ExclusiveMinimum { limit } => format!("more than {limit}"),
        ValidationErrorKind::ExclusiveMaximum { limit } => format!("less than {limit}"),
        ValidationErrorKind::Enum { options } => one_of(options.as_array().into_iter().flatten()),
        ValidationErrorKind::OneOfNotValid { context } | ValidationErrorKind::AnyOf { context } => {
            let values: Vec<Value> = context
                .iter()
                .flatten()
                .flat_map(|e| match e.kind() {
                    ValidationErrorKind::Constant { expected_value } => vec![(**expected_value).clone()],
                    ValidationErrorKind::Enum { options } => options.as_array().cloned().unwrap_or_default(),
                    _ => Vec::new(),
                })
                .collect();
            one_of(values.iter())
        }
        ValidationErrorKind::Constant { expected_value } => expected_value.to_string(),
        ValidationErrorKind::Required { property } => format!("a table with the key {property}"),
        ValidationErrorKind::Type { .. } => {
            // "5 is not of type "string""
            let text = error.to_string();
            let kind = text.rsplit(" of type").next().unwrap_or_default().trim_start_matches('s').trim();
            format!("of the type {}", kind.replace('"', ""))
        }
        _ => format!("valid ({error})"),
    }
}

fn one_of<'a>(values: impl Iterator<Item = &'a Value>) -> String {
    let texts: Vec<String> = values.map(|v| v.as_str().map_or_else(|| v.to_string(), str::to_owned)).collect();
    format!("one of {}", texts.join(", "))
}

/// `/learning_rate/unet` as `learning_rate.unet`.
fn key(pointer: &str) -> String {
    pointer.trim_start_matches('/').replace('/', ".")
}

/// The keys of the table that an instance's path leads to.
fn keys_at(schema: &Value, pointer: &str) -> Vec<String> {
    let mut at = resolve(schema, schema);
    for part in pointer.split('/').filter(|p| !p.is_empty()) {
        let Some(next) = at.get("properties").and_then(|p| p.get(part)) else { return Vec::new() };
        at = resolve(schema, next);
    }
    at.get("properties").and_then(Value::as_object).map_or_else(Vec::new, |p| p.keys().cloned().collect())
}

/// Follows `$ref`, and the branch of an optional setting that is not null.
fn resolve<'a>(root: &'a Value, schema: &'a Value) -> &'a Value {
    if let Some(reference) = schema.get("$ref").and_then(Value::as_str) {
        return root.pointer(reference.trim_start_matches('#')).map_or(schema, |target| resolve(root, target));
    }
    let branches = schema.get("anyOf").and_then(Value::as_array);
    match branches.and_then(|b| b.iter().find(|b| b.get("type").is_none_or(|t| t != "null"))) {
        Some(branch) if schema.get("properties").is_none() => resolve(root, branch),
        _ => schema,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde_json::json;

    use super::*;

    /// What schemars makes of settings with a range, a choice, a table and an optional table.
    fn schema() -> Value {
        json!({
            "type": "object",
            "properties": {
                "rank": {"type": "integer", "minimum": 1, "maximum": 1024},
                "normalise": {"$ref": "#/$defs/Normalise"},
                "mode": {"oneOf": [{"type": "string", "enum": ["fast", "slow"]}, {"type": "string", "const": "good"}]},
                "learning_rate": {"$ref": "#/$defs/Rates"},
                "partition": {"anyOf": [{"$ref": "#/$defs/Partition"}, {"type": "null"}]},
            },
            "additionalProperties": false,
            "$defs": {
                "Normalise": {"oneOf": [{"type": "string", "const": "owners"}, {"type": "string", "const": "sum1"}]},
                "Rates": {
                    "type": "object",
                    "properties": {"unet": {"type": "number", "maximum": 10}, "tokens": {"type": "number"}},
                    "additionalProperties": false,
                },
                "Partition": {
                    "type": "object",
                    "properties": {"capacity": {"type": "integer", "minimum": 1}, "slot": {"type": "integer"}},
                    "required": ["capacity", "slot"],
                    "additionalProperties": false,
                },
            },
        })
    }

    #[test]
    fn good_settings_pass() {
        for good in [
            json!(null),
            json!({}),
            json!({"rank": 4, "normalise": "sum1", "partition": null}),
            json!({"learning_rate": {"unet": 0.1}, "partition": {"capacity": 4, "slot": 3}}),
        ] {
            assert_eq!(check(&schema(), &good), Ok(()), "{good}");
        }
    }

    #[test]
    fn whole_floats_are_integers() {
        let given = json!({"a": 2.0, "b": [0.5, -3.0, 1e300], "c": {"d": 7, "e": "2.0"}, "f": null});
        let same = json!({"a": 2, "b": [0.5, -3, 1e300], "c": {"d": 7, "e": "2.0"}, "f": null});
        assert_eq!(with_whole_numbers(given), same);
        assert_eq!(check(&schema(), &with_whole_numbers(json!({"rank": 4.0}))), Ok(()));
        assert!(check(&schema(), &with_whole_numbers(json!({"rank": 4.5}))).is_err());
    }

    #[test]
    fn errors_name_the_key_and_what_is_allowed() {
        for (bad, expected) in [
            (json!({"rank": 0}), "rank = 0: must be 1 or more"),
            (json!({"rank": "four"}), "rank = \"four\": must be of the type integer"),
            (json!({"rang": 4}), "unknown key rang: the keys are learning_rate, mode, normalise, partition, rank"),
            (json!({"mode": "bad"}), "mode = \"bad\": must be one of fast, slow, good"),
            (json!({"normalise": "sum"}), "normalise = \"sum\": must be one of owners, sum1"),
            (json!({"learning_rate": {"unet": 11}}), "learning_rate.unet = 11: must be 10 or less"),
            (json!({"learning_rate": {"vae": 1}}), "unknown key learning_rate.vae: the keys are tokens, unet"),
            (json!({"partition": {"capacity": 0, "slot": 1}}), "partition.capacity = 0: must be 1 or more"),
            (json!({"partition": {"slot": 1}}), "partition = {\"slot\":1}: must be a table with the key \"capacity\""),
            (json!([1]), "the settings must be a table of keys and values, not [1]"),
        ] {
            assert_eq!(check(&schema(), &bad), Err(expected.to_owned()));
        }
    }
}
