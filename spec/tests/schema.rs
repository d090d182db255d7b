//! manifest.schema.json says the same as the code.
#![allow(clippy::unwrap_used)]

mod common;

use blocklora_spec::{Adapter, Error};
use common::raw::Parts;
use serde_json::{Value, json};

/// Validates by the keywords of JSON Schema 2020-12 that the schema uses, and panics at any other.
struct Schema(Value);

impl Schema {
    fn load() -> Self {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/manifest.schema.json");
        Self(serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap())
    }

    fn accepts(&self, value: &Value) -> bool {
        self.check(&self.0, value)
    }

    fn check(&self, schema: &Value, value: &Value) -> bool {
        schema.as_object().unwrap().iter().all(|(keyword, rule)| self.keyword(schema, keyword, rule, value))
    }

    fn keyword(&self, schema: &Value, keyword: &str, rule: &Value, value: &Value) -> bool {
        let number = |holds: fn(f64, f64) -> bool| value.as_f64().is_none_or(|x| holds(x, rule.as_f64().unwrap()));
        let size = |n: Option<usize>, holds: fn(usize, usize) -> bool| {
            n.is_none_or(|n| holds(n, rule.as_u64().unwrap() as usize))
        };
        let object = || value.as_object().into_iter().flatten();
        match keyword {
            "$schema" | "$defs" | "$comment" | "title" => true,
            "$ref" => self.check(self.0.pointer(rule.as_str().unwrap().trim_start_matches('#')).unwrap(), value),
            "type" => match rule.as_str().unwrap() {
                "object" => value.is_object(),
                "array" => value.is_array(),
                "string" => value.is_string(),
                "number" => value.is_number(),
                "integer" => value.is_u64() || value.is_i64(),
                "null" => value.is_null(),
                other => panic!("type {other}"),
            },
            "enum" => rule.as_array().unwrap().contains(value),
            "anyOf" => rule.as_array().unwrap().iter().any(|s| self.check(s, value)),
            "pattern" => value.as_str().is_none_or(|s| regex::Regex::new(rule.as_str().unwrap()).unwrap().is_match(s)),
            "minLength" => size(value.as_str().map(|s| s.chars().count()), |n, k| n >= k),
            "maxLength" => size(value.as_str().map(|s| s.chars().count()), |n, k| n <= k),
            "maxItems" => size(value.as_array().map(Vec::len), |n, k| n <= k),
            "minimum" => number(|x, k| x >= k),
            "maximum" => number(|x, k| x <= k),
            "exclusiveMaximum" => number(|x, k| x < k),
            "items" => value.as_array().is_none_or(|a| a.iter().all(|v| self.check(rule, v))),
            "required" => rule.as_array().unwrap().iter().all(|k| value.get(k.as_str().unwrap()).is_some()),
            "properties" => object().all(|(k, v)| rule.get(k).is_none_or(|s| self.check(s, v))),
            "propertyNames" => object().all(|(k, _)| self.check(rule, &json!(k))),
            "additionalProperties" => {
                let known = |k: &str| schema.get("properties").is_some_and(|p| p.get(k).is_some());
                object().filter(|(k, _)| !known(k)).all(|(_, v)| rule != false && self.check(rule, v))
            }
            other => panic!("keyword {other} is not known to this test"),
        }
    }
}

/// Whether the code accepts `manifest` for itself; whether the tensors fit it is another matter.
fn code_accepts(manifest: &Value) -> bool {
    let bytes = Parts { manifest: manifest.clone(), ..Parts::valid() }.bytes();
    !matches!(Adapter::from_bytes("f", bytes), Err(Error::Field { .. } | Error::Json { part: "manifest", .. }))
}

/// The pointers of every object in `value` that has fixed fields (not `outputs`, not what is in `config`).
fn objects(value: &Value, at: String, found: &mut Vec<String>) {
    if at == "/outputs" || at == "/algorithm/config" {
        return;
    }
    match value {
        Value::Object(fields) => {
            fields.iter().for_each(|(k, v)| objects(v, format!("{at}/{k}"), found));
            found.push(at);
        }
        Value::Array(items) => items.iter().enumerate().for_each(|(i, v)| objects(v, format!("{at}/{i}"), found)),
        _ => {}
    }
}

#[test]
fn every_field_is_required_and_no_other_is_allowed() {
    let (schema, valid) = (Schema::load(), Parts::valid().manifest);
    assert!(schema.accepts(&valid) && code_accepts(&valid));
    let mut found = Vec::new();
    objects(&valid, String::new(), &mut found);
    assert_eq!(found, ["/algorithm", "/base", "/partition", "/tokens/0", "/training", ""]);
    let mut cases = 0;
    for at in found {
        let fields: Vec<String> = valid.pointer(&at).unwrap().as_object().unwrap().keys().cloned().collect();
        for field in fields {
            let mut bad = valid.clone();
            bad.pointer_mut(&at).unwrap().as_object_mut().unwrap().remove(&field);
            assert!(!schema.accepts(&bad), "the schema accepts a manifest without {at}/{field}");
            assert!(!code_accepts(&bad), "the code accepts a manifest without {at}/{field}");
            cases += 1;
        }
        let mut bad = valid.clone();
        bad.pointer_mut(&at).unwrap()["extra"] = json!(1);
        assert!(!schema.accepts(&bad) && !code_accepts(&bad), "an unknown key in {at:?}");
    }
    assert_eq!(cases, 16 + 4 + 2 + 4 + 2 + 3);
}

/// In the form of times, and no times.
const TIMES: [&str; 9] = [
    "2026-00-01T00:00:00Z",
    "2026-13-01T00:00:00Z",
    "2026-01-00T00:00:00Z",
    "2026-01-32T00:00:00Z",
    "2026-04-31T00:00:00Z",
    "2026-02-30T00:00:00Z",
    "2026-01-01T24:00:00Z",
    "2026-01-01T00:60:00Z",
    "2026-01-01T00:00:60Z",
];

#[test]
fn values_are_judged_alike() {
    let (schema, valid) = (Schema::load(), Parts::valid().manifest);
    let (long, big) = (|n: usize| json!("x".repeat(n)), json!(u64::MAX));
    let digest = json!("0".repeat(64));
    // Pointer, then values.
    let accepted: &[(&str, &[Value])] = &[
        ("/name", &[json!("A"), json!("0-_z"), long(64)]),
        ("/kind", &[json!("person"), json!("scene"), json!("style")]),
        ("/class_word", &[json!("été"), json!("oil painting"), json!("é".repeat(64))]),
        ("/tokens", &[json!([])]),
        ("/tokens/0/vectors", &[json!(1), json!(1024)]),
        ("/algorithm/digest", &[Value::Null, digest.clone()]),
        ("/algorithm/config", &[json!({}), json!({"a": [null, {"b": 1.5}]})]),
        ("/partition", &[Value::Null]),
        ("/partition/scheme", &[json!("strided"), json!("permuted")]),
        ("/partition/capacity", &[json!(65536)]),
        ("/partition/seed", std::slice::from_ref(&big)),
        ("/rank", &[json!(1), json!(1024)]),
        ("/alpha", &[json!(1), json!(1e-30), json!(f32::MAX), json!(f32::MIN_POSITIVE)]),
        ("/delta", &[json!("alpha / rank * B * A")]),
        ("/outputs", &[json!({}), json!({"text_encoder.a": 1, "text_encoder_2.a.0.b_c": 65536})]),
        ("/erasure_lambda", &[json!(0), json!(0.999)]),
        ("/training/steps", &[json!(0), big.clone()]),
        ("/licence", &[Value::Null, long(256)]),
        ("/created", &[Value::Null, json!("0000-01-01T00:00:00Z"), json!("2024-02-29T23:59:59Z")]),
    ];
    let mut rejected: Vec<(&str, Vec<Value>)> = vec![
        ("/name", vec![json!(""), json!("../x"), json!("-x"), json!("a b"), json!("a/b"), json!("é"), long(65)]),
        ("/kind", vec![json!("Subject"), json!("object")]),
        ("/class_word", vec![json!(""), json!("a\nb"), json!("a\u{7f}"), json!("a\u{85}"), long(65)]),
        ("/tokens", vec![json!({}), json!([1]), json!(vec![json!({"name": "a", "vectors": 1}); 17])]),
        ("/tokens/0/name", vec![json!("<milo>"), json!(""), long(65)]),
        ("/tokens/0/vectors", vec![json!(0), json!(1025), json!(1.5), json!("1")]),
        ("/base/architecture", vec![json!(""), long(257)]),
        ("/base/digest", vec![json!("0".repeat(63)), json!("A".repeat(64)), json!("g".repeat(64)), Value::Null]),
        ("/algorithm/digest", vec![json!(""), json!("0".repeat(65))]),
        ("/algorithm/id", vec![json!("a/b"), json!("")]),
        ("/algorithm/version", vec![json!(""), long(65), json!(1)]),
        ("/algorithm/config", vec![json!([]), json!("x"), Value::Null]),
        ("", vec![json!([]), json!(1), Value::Null]),
        ("/partition", vec![json!({}), json!([]), json!("contiguous"), json!(["contiguous", 4, 0, 1])]),
        ("/kind", vec![json!({"subject": null}), Value::Null]),
        ("/delta", vec![json!({"alpha * B * A": null}), Value::Null]),
        ("/partition/scheme", vec![json!({"contiguous": null})]),
        ("/base", vec![json!(["sd-1", digest]), Value::Null]),
        ("/algorithm", vec![json!(["blocklora", "1", null, {}])]),
        ("/training", vec![json!([1, 2, digest])]),
        ("/tokens/0", vec![json!(["milo", 2])]),
        ("/partition/scheme", vec![json!("random"), Value::Null]),
        ("/partition/capacity", vec![json!(0), json!(-1), json!(65537)]),
        ("/partition/slot", vec![json!(-1), json!(65536), json!(0.5)]),
        ("/partition/seed", vec![json!(-1), json!("1")]),
        ("/rank", vec![json!(0), json!(-1), json!(1025), json!("2"), json!(2.5)]),
        ("/alpha", vec![json!(0), json!(-1), json!(1e39), json!(1e-40), json!("1"), Value::Null]),
        ("/delta", vec![json!("alpha*B*A"), json!("")]),
        ("/outputs", vec![json!([]), json!({"vae.a": 1}), json!({"unet": 1}), json!({"unet..a": 1})]),
        ("/erasure_lambda", vec![json!(1), json!(-0.1), Value::Null]),
        ("/training/steps", vec![json!(-1), json!(1.5)]),
        ("/licence", vec![json!(""), long(257), json!("a\u{1b}[31m")]),
        ("/created", vec![json!("2026-01-31"), json!("2026-01-31T00:00:00+00:00"), json!("")]),
        ("/created", TIMES.map(|time| json!(time)).into()),
        ("/tensor_digest", vec![json!(""), Value::Null]),
    ];
    for value in ["unet./a", "unet.a.", "unet.a b", "unet.é", "unet.../a"] {
        rejected.push(("/outputs", vec![json!({value: 1})]));
    }
    for m in [json!(0), json!(65537), json!(-1), json!(1.5)] {
        rejected.push(("/outputs", vec![json!({"unet.a": m})]));
    }
    rejected.push(("/outputs", vec![json!({format!("unet.{}", "a".repeat(245)): 1})]));
    let set = |at: &str, value: &Value| {
        let mut manifest = valid.clone();
        *manifest.pointer_mut(at).unwrap() = value.clone();
        manifest
    };
    for (at, values) in accepted {
        for value in *values {
            let manifest = set(at, value);
            assert!(schema.accepts(&manifest), "the schema rejects {at} = {value}");
            assert!(code_accepts(&manifest), "the code rejects {at} = {value}");
        }
    }
    for (at, values) in &rejected {
        for value in values {
            let manifest = set(at, value);
            assert!(!schema.accepts(&manifest), "the schema accepts {at} = {value}");
            assert!(!code_accepts(&manifest), "the code accepts {at} = {value}");
        }
    }
}

/// What the schema's comment says that it cannot say.
#[test]
fn beyond_the_schema() {
    let (schema, valid) = (Schema::load(), Parts::valid().manifest);
    let token = json!({"name": "a", "vectors": 1});
    let wide: serde_json::Map<String, Value> = (0..17).map(|i| (format!("unet.a{i}"), json!(65536 - i))).collect();
    let cases = [
        ("/tokens", json!([token, token])),
        ("/partition/slot", json!(4)),
        ("/outputs", wide.into()),
        ("/created", json!("2100-02-29T00:00:00Z")),
    ];
    for (at, value) in cases {
        let mut bad = valid.clone();
        *bad.pointer_mut(at).unwrap() = value;
        assert!(schema.accepts(&bad) && !code_accepts(&bad), "{at}");
    }
}
