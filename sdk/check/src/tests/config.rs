//! The settings.

use blocklora_sdk::{Code, Value};
use serde_json::{Map, json};

use crate::subject::{Subject, Verdict, wrong};

fn properties(schema: &Value) -> Result<&Map<String, Value>, String> {
    static NONE: std::sync::LazyLock<Map<String, Value>> = std::sync::LazyLock::new(Map::new);
    match schema.get("properties") {
        None => Ok(&NONE),
        Some(Value::Object(properties)) => Ok(properties),
        Some(_) => wrong("the schema's properties are no object"),
    }
}

fn validator(schema: &Value) -> Result<jsonschema::Validator, String> {
    jsonschema::validator_for(schema).map_err(|e| format!("the schema is no JSON Schema: {e}"))
}

fn schema_of(subject: &Subject) -> Result<Value, String> {
    subject.library.schema().map_err(|e| format!("no schema: {e}"))
}

/// Valid; closed; every setting explained and with its default.
pub fn schema(subject: &Subject) -> Verdict {
    let schema = schema_of(subject)?;
    validator(&schema)?;
    let is_closed = ["additionalProperties", "unevaluatedProperties"].iter().any(|key| schema[*key] == false);
    if !is_closed {
        return wrong("the schema allows unknown keys: put #[serde(deny_unknown_fields)] on the settings");
    }
    for (key, property) in properties(&schema)? {
        let has = |word: &str| property.get(word).is_some();
        if !has("description") {
            return wrong(format!("{key} has no description: give the field a doc comment"));
        }
        if !has("default") {
            return wrong(format!("{key} has no default: put #[serde(default)] on the settings"));
        }
    }
    Ok(())
}

/// The defaults fit the schema; completing completed settings changes nothing; aliases are settings.
pub fn round_trip(subject: &Subject) -> Verdict {
    let resolve = |settings: &Value| subject.library.resolve(settings).map_err(|e| e.to_string());
    let schema = schema_of(subject)?;
    let validator = validator(&schema)?;
    let defaults = resolve(&Value::Null).map_err(|e| format!("the defaults are refused: {e}"))?;
    if let Err(e) = validator.validate(&defaults) {
        return wrong(format!("the defaults do not fit the schema: {e} at {}", e.instance_path()));
    }
    if resolve(&defaults)? != defaults || resolve(&json!({}))? != defaults {
        return wrong("completed settings, completed again, are others");
    }
    for (key, property) in properties(&schema)? {
        if property.get("default") != defaults.get(key) {
            return wrong(format!("{key}: the schema's default is not the one that is used"));
        }
        let Some(default) = defaults.get(key) else {
            return wrong(format!("{key} is missing in the completed settings"));
        };
        if resolve(&json!({ key: default }))? != defaults {
            return wrong(format!("{key}: setting it to its default changes the settings"));
        }
    }
    for (alias, settings) in &subject.manifest.aliases {
        if let Err(e) = validator.validate(settings) {
            return wrong(format!("aliases.{alias}: {e}"));
        }
        resolve(settings).map_err(|e| format!("aliases.{alias}: {e}"))?;
    }
    Ok(())
}

/// Values of a wrong type, which the schema refuses, the plugin refuses, too, and it names unknown keys. Lengths,
/// patterns and ranges the host has checked before the plugin sees a value.
pub fn refuses(subject: &Subject) -> Verdict {
    let schema = types_of(schema_of(subject)?);
    let validator = validator(&schema)?;
    let unknown = "no_such_setting";
    if validator.is_valid(&json!({ unknown: 1 })) {
        return wrong("the schema allows a key that the settings do not have");
    }
    named(subject, unknown, &json!({ unknown: 1 }))?;
    for key in properties(&schema)?.keys() {
        for value in [json!([{}]), json!("no such value"), json!({"no": "such"}), json!(true)] {
            let settings = json!({ key: value });
            if !validator.is_valid(&settings) && !value.is_boolean() {
                refused(subject, &settings)?;
            }
        }
    }
    for settings in [json!([1]), json!("text"), json!(1)] {
        refused(subject, &settings)?;
    }
    Ok(())
}

/// A schema without what it says of a value beside its type.
fn types_of(mut schema: Value) -> Value {
    match &mut schema {
        Value::Object(object) => {
            // A setting may have such a name, and its schema is an object.
            object.retain(|key, value| {
                value.is_object()
                    || !["pattern", "format", "minLength", "maxLength", "minItems", "maxItems", "uniqueItems"]
                        .contains(&key.as_str())
            });
            object.values_mut().for_each(|value| *value = types_of(value.take()));
        }
        Value::Array(items) => items.iter_mut().for_each(|item| *item = types_of(item.take())),
        _ => {}
    }
    schema
}

fn refused(subject: &Subject, settings: &Value) -> Result<String, String> {
    match subject.library.resolve(settings) {
        Err(e) if e.code == Code::InvalidConfig => Ok(e.message),
        Ok(taken) => wrong(format!(
            "the settings {settings}, which do not fit the schema, are taken as {taken}: let the settings' types be those of \
             the schema"
        )),
        Err(e) => wrong(format!("the settings {settings} must be an InvalidConfig error, not {e:?}")),
    }
}

fn named(subject: &Subject, key: &str, settings: &Value) -> Verdict {
    let message = refused(subject, settings)?;
    if message.contains(key) { Ok(()) } else { wrong(format!("the error about {key} does not name it: {message}")) }
}

/// Five hundred settings made at random: an error or not, but no panic, and instances only of what resolves.
pub fn fuzz(subject: &Subject) -> Verdict {
    let schema = schema_of(subject)?;
    let keys: Vec<&String> = properties(&schema)?.keys().collect();
    let mut rng = subject.rng(1);
    let mut below = move |n: usize| rng.below(n);
    for _ in 0..500 {
        let mut settings = Map::new();
        for key in &keys {
            if below(3) == 0 {
                settings.insert((*key).clone(), any_value(&mut below, 2));
            }
        }
        let settings = Value::Object(settings);
        let resolved = subject.library.resolve(&settings);
        let made = match subject.manifest.kind.as_str() {
            "merge" => subject.library.strategy(&settings).map(drop),
            "train" => subject.library.trainer(&settings).map(drop),
            _ => subject.library.sampler(&settings).map(drop),
        };
        match (resolved, made) {
            (Err(e), _) | (_, Err(e)) if e.code == Code::Panicked => {
                return wrong(format!("the settings {settings}: {e}"));
            }
            (Ok(_), Ok(())) | (Err(_), Err(_)) => {}
            (resolved, made) => return wrong(format!("the settings {settings} resolve to {resolved:?}, but {made:?}")),
        }
    }
    Ok(())
}

fn any_value(below: &mut impl FnMut(usize) -> usize, depth: usize) -> Value {
    match below(if depth == 0 { 7 } else { 9 }) {
        0 => Value::Null,
        1 => json!(below(2) == 1),
        2 => json!(below(5)),
        3 => json!(-(below(1000) as i64)),
        4 => json!([0.0, 0.5, 1.0, -1.0, 1e300, 1e-300, 4e9, 1e18][below(8)]),
        5 => json!(u64::MAX),
        6 => json!(["", "a", "\u{0}", "no such value"][below(4)]),
        7 => Value::Array((0..below(3)).map(|_| any_value(below, depth - 1)).collect()),
        _ => (0..below(3)).map(|i| (format!("k{i}"), any_value(below, depth - 1))).collect::<Map<_, _>>().into(),
    }
}
