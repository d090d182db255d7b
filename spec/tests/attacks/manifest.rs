//! Faults of the manifest. Its digest fits, so that only the fault can be found.

use serde_json::{Value, json};

use super::{Attack, attack, manifest_text, manifest_with, parts, replaced};

fn text() -> Vec<Attack> {
    let insert = |field: &'static str| move |m: String| replaced(m, "{", &format!("{{{field},"));
    vec![
        attack("manifest_not_json", manifest_text(|_| "name = milo".into()), "manifest: not valid JSON"),
        attack("manifest_empty", manifest_text(|_| String::new()), "manifest: not valid JSON: EOF"),
        attack("manifest_array", manifest_text(|m| format!("[{m}]")), "manifest: all of it: must be an object"),
        attack("manifest_two_values", manifest_text(|m| m + "1"), "manifest: not valid JSON: trailing"),
        attack("manifest_duplicate", manifest_text(insert(r#""rank":2"#)), "manifest: the key \"rank\" occurs twice"),
        attack(
            "manifest_duplicate_slot",
            manifest_text(|m| replaced(m, r#""slot":1"#, r#""slot":1,"slot":2"#)),
            "manifest: the key \"partition.slot\" occurs twice",
        ),
        attack(
            "manifest_duplicate_layer",
            manifest_text(|m| replaced(m, r#""outputs":{"#, r#""outputs":{"unet.block.to_q":12,"#)),
            "manifest: the key \"outputs.unet.block.to_q\" occurs twice",
        ),
        attack(
            "manifest_duplicate_in_config",
            manifest_text(|m| replaced(m, r#""config":{"#, r#""config":{"steps":1,"#)),
            "manifest: the key \"algorithm.config.steps\" occurs twice",
        ),
        attack(
            "manifest_deep",
            manifest_text(|m| {
                let deep = format!(r#""config":{{"a":{}{},"#, "[".repeat(5000), "]".repeat(5000));
                replaced(m, r#""config":{"#, &deep)
            }),
            "manifest: nested deeper than 32 levels",
        ),
        attack(
            "manifest_deep_by_one",
            manifest_text(|m| {
                let deep = format!(r#""config":{{"a":{}{},"#, "[".repeat(30), "]".repeat(30));
                replaced(m, r#""config":{"#, &deep)
            }),
            "manifest: nested deeper than 32 levels",
        ),
        attack(
            "manifest_unknown",
            manifest_text(insert(r#""trusted":true"#)),
            "manifest: trusted: unknown field `trusted`",
        ),
        attack("manifest_unknown_escapes", manifest_text(insert("\"\\u001b[31m\":1")), "unknown field"),
        attack(
            "manifest_unknown_in_partition",
            manifest_text(|m| replaced(m, r#""slot":1"#, r#""slot":1,"slots":[1,2]"#)),
            "manifest: partition.slots: unknown field `slots`",
        ),
        attack(
            "manifest_missing_partition",
            manifest_text(|m| {
                replaced(m, r#""partition":{"capacity":4,"scheme":"contiguous","seed":0,"slot":1},"#, "")
            }),
            "manifest: missing field `partition`",
        ),
        attack(
            "manifest_overflowing_number",
            manifest_text(|m| replaced(m, r#""rank":2"#, r#""rank":1e999"#)),
            "manifest: not valid JSON: number out of range",
        ),
        attack(
            "manifest_nan",
            manifest_text(|m| replaced(m, r#""rank":2"#, r#""rank":NaN"#)),
            "manifest: not valid JSON",
        ),
    ]
}

fn fields() -> Vec<Attack> {
    let field = |name, pointer: &str, value: Value, expected| attack(name, manifest_with(pointer, value), expected);
    vec![
        field("name_path", "/name", json!("../../etc/cron.d/milo"), "manifest: name: \""),
        field("name_absolute", "/name", json!("/etc/passwd"), "manifest: name: \""),
        field("name_windows", "/name", json!("C:\\milo"), "manifest: name: \""),
        field("name_option", "/name", json!("--help"), "manifest: name: \""),
        field("name_nul", "/name", json!("milo\0.txt"), "manifest: name: \""),
        field("name_escapes", "/name", json!("\u{1b}]0;milo\u{7}"), "manifest: name: \""),
        field("name_homoglyph", "/name", json!("mil\u{43e}"), "manifest: name: \""),
        field("name_empty", "/name", json!(""), "manifest: name: \""),
        field("name_long", "/name", json!("m".repeat(65)), "manifest: name: \""),
        field("kind_unknown", "/kind", json!("animal"), "manifest: kind: unknown variant `animal`"),
        field("class_word_escapes", "/class_word", json!("dog\u{1b}[2J"), "manifest: class_word: must be"),
        field("base_digest_short", "/base/digest", json!("abc"), "manifest: base.digest: must be a SHA-256"),
        field("base_digest_upper_case", "/base/digest", json!("AB".repeat(32)), "manifest: base.digest: must be"),
        field(
            "algorithm_id_path",
            "/algorithm/id",
            json!("../libevil.so"),
            "manifest: algorithm.id: \"../libevil.so\" must be",
        ),
        field(
            "config_not_object",
            "/algorithm/config",
            json!(["steps"]),
            "manifest: algorithm.config: must be an object",
        ),
        field("rank_zero", "/rank", json!(0), "manifest: rank: 0 is not in 1..=1024"),
        field("rank_huge", "/rank", json!(u64::MAX), "manifest: rank: 18446744073709551615 is not in"),
        field("rank_text", "/rank", json!("2"), "manifest: rank: invalid type: string \"2\""),
        field("alpha_zero", "/alpha", json!(0), "manifest: alpha: 0 is not a positive"),
        field("alpha_negative", "/alpha", json!(-1), "manifest: alpha: -1 is not a positive"),
        field("alpha_overflows", "/alpha", json!(1e39), "manifest: alpha: number out of range"),
        field("alpha_vanishes", "/alpha", json!(1e-60), "manifest: alpha: 0 is not a positive"),
        field("delta_unknown", "/delta", json!("alpha / sqrt(rank) * B * A"), "manifest: delta: unknown variant"),
        field("lambda_one", "/erasure_lambda", json!(1.0), "manifest: erasure_lambda: 1 is not in 0..1"),
        field("licence_empty", "/licence", json!(""), "manifest: licence: must be null or"),
        field("created_free_text", "/created", json!("yesterday"), "manifest: created: must be null or a time"),
        field(
            "created_no_time",
            "/created",
            json!("2026-99-99T99:99:99Z"),
            "manifest: created: must be null or a time",
        ),
        field(
            "created_leap_second",
            "/created",
            json!("2016-12-31T23:59:60Z"),
            "manifest: created: must be null or a time",
        ),
        field(
            "created_no_leap_year",
            "/created",
            json!("2026-02-29T00:00:00Z"),
            "manifest: created: must be null or a time",
        ),
        field("kind_object", "/kind", json!({"subject": null}), "manifest: kind: must be a string, not an object"),
        field(
            "partition_array",
            "/partition",
            json!(["contiguous", 4, 0, 1]),
            "manifest: partition: must be an object, not an array",
        ),
        field(
            "slot_at_capacity",
            "/partition/slot",
            json!(4),
            "manifest: partition.slot: 4 is not below the capacity 4",
        ),
        field("slot_huge", "/partition/slot", json!(u32::MAX), "manifest: partition.slot: 4294967295 is not below"),
        field("slot_negative", "/partition/slot", json!(-1), "manifest: partition.slot: invalid value: integer `-1`"),
        field("capacity_zero", "/partition/capacity", json!(0), "manifest: partition.capacity: 0 is not in 1..=65536"),
        field("capacity_huge", "/partition/capacity", json!(u32::MAX), "partition.capacity: 4294967295 is not in"),
        field(
            "scheme_unknown",
            "/partition/scheme",
            json!("random"),
            "manifest: partition.scheme: unknown variant `random`",
        ),
        field(
            "outputs_zero",
            "/outputs/unet.block.to_q",
            json!(0),
            "manifest: outputs[\"unet.block.to_q\"]: 0 is not in",
        ),
        field(
            "outputs_huge",
            "/outputs/unet.block.to_q",
            json!(1_u64 << 62),
            "4611686018427387904 is not in 1..=65536",
        ),
        field("outputs_path", "/outputs", json!({"unet./etc/passwd": 6}), "must be a module path"),
        field("outputs_other_part", "/outputs", json!({"vae.decoder": 6}), "must begin with unet., text_encoder."),
        field(
            "outputs_flood",
            "/outputs",
            (1..=2000).map(|i| (format!("unet.a{i}"), json!(60_000 + i))).collect::<serde_json::Map<_, _>>().into(),
            "manifest: outputs: the distinct values add up to",
        ),
        field("token_path", "/tokens/0/name", json!("../milo"), "manifest: tokens[0].name: \""),
        field("token_markup", "/tokens/0/name", json!("<milo>"), "manifest: tokens[0].name: \""),
        field("token_vectors_zero", "/tokens/0/vectors", json!(0), "manifest: tokens[0].vectors: 0 is not in 1..=1024"),
        attack(
            "token_twice",
            parts(|p| p.manifest["tokens"] = json!([{"name": "milo", "vectors": 2}, {"name": "milo", "vectors": 2}])),
            "manifest: tokens[1].name: \"milo\" occurs twice",
        ),
        attack(
            "token_flood",
            parts(|p| p.manifest["tokens"] = json!(vec![json!({"name": "milo", "vectors": 2}); 17])),
            "manifest: tokens: 17 tokens, at most 16",
        ),
    ]
}

pub(super) fn attacks() -> Vec<Attack> {
    [text(), fields()].into_iter().flatten().collect()
}
