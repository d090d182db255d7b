//! Faults of the safetensors container and of its metadata.

use super::{Attack, Parts, attack, header, header_with, pack, parts, raw, replaced};
use crate::common::raw::LAYER;

const METADATA: &str = r#""__metadata__":{"#;

fn length(bytes: &mut [u8], length: u64) {
    bytes[..8].copy_from_slice(&length.to_le_bytes());
}

/// Padded by 8 of `with`, and with spaces where that is not enough.
fn padded(header: String, with: char) -> String {
    let spaces = " ".repeat((8 - header.len() % 8) % 8);
    header + &spaces + &String::from(with).repeat(8)
}

fn layout() -> Vec<Attack> {
    vec![
        attack("empty", vec![], "truncated: the header's length needs 8 bytes, the file has 0"),
        attack("length_cut", vec![16, 0, 0], "truncated: the header's length needs 8 bytes, the file has 3"),
        attack("length_only", vec![16, 0, 0, 0, 0, 0, 0, 0], "truncated: the header needs 24 bytes"),
        attack("header_cut", raw(|b| b.truncate(300)), "truncated: the header needs"),
        attack("data_missing", raw(|b| b.truncate(b.len() - 80)), "truncated: tensor"),
        attack("data_cut", raw(|b| b.truncate(b.len() - 1)), "truncated: tensor"),
        attack("header_length_huge", raw(|b| length(b, u64::MAX)), "the header claims 18446744073709551615 bytes"),
        attack("header_length_over_limit", raw(|b| length(b, (8 << 20) + 8)), "the header claims 8388616 bytes"),
        attack("header_length_beyond_file", raw(|b| length(b, 1 << 20)), "truncated: the header needs 1048584 bytes"),
        attack("header_length_zero", raw(|b| length(b, 0)), "does not begin with '{'"),
        attack(
            "header_length_odd",
            raw(|b| {
                let n = u64::from_le_bytes(b[..8].try_into().unwrap());
                length(b, n + 1);
                b.insert(8 + n as usize, b' ');
            }),
            "is not a multiple of 8",
        ),
        attack("pickle", b"\x80\x02}q\x00X\x06\x00\x00\x00paramsq\x01}s.".to_vec(), "the header claims"),
        attack("zip", b"PK\x03\x04\0\0\0\0archive/data.pkl".to_vec(), "the header claims 67324752 bytes"),
        attack(
            "trailing_data",
            raw(|b| b.extend(*b"PK\x05\x06hidden")),
            "bytes 80..90 of the data section belong to no",
        ),
    ]
}

fn json() -> Vec<Attack> {
    vec![
        attack("header_not_json", pack("{not json}", &[]), "header: not valid JSON: key must be a string"),
        attack("header_not_utf8", raw(|b| b[20] = 0xFF), "header: not valid JSON: invalid unicode"),
        attack("header_array", pack("[]", &[]), "does not begin with '{'"),
        attack("header_padded_with_tabs", header(|h| padded(h, '\t')), "padded with something other than spaces"),
        attack("header_padded_with_line_feeds", header(|h| padded(h, '\n')), "padded with something other than spaces"),
        attack("header_leading_space", header(|h| format!(" {h}")), "does not begin with '{'"),
        attack("header_two_values", header(|h| h + "{}"), "header: not valid JSON: trailing characters"),
        attack("header_unterminated", header(|h| h[..h.len() - 1].to_owned()), "header: not valid JSON: EOF"),
        attack("header_deep", pack(&format!(r#"{{"a":{}"#, "[".repeat(20_000)), &[]), "nested deeper than 3 levels"),
        attack(
            "header_duplicate_tensor",
            header(|h| replaced(h, r#""tokens.milo":"#, r#""tokens.milo":{"dtype":"F32"},"tokens.milo":"#)),
            r#"header: the key "tokens.milo" occurs twice"#,
        ),
        attack(
            "header_duplicate_escaped",
            header(|h| replaced(h, r#""tokens.milo":"#, r#""tokens.mil\u006f":{"dtype":"F32"},"tokens.milo":"#)),
            r#"header: the key "tokens.milo" occurs twice"#,
        ),
        attack(
            "header_duplicate_shape",
            header_with(r#""shape":[2,4]"#, r#""shape":[2,4],"shape":[4,2]"#),
            r#".shape" occurs twice"#,
        ),
        attack(
            "header_duplicate_manifest",
            header_with(METADATA, r#""__metadata__":{"blocklora.manifest":"{}","#),
            r#"the key "__metadata__.blocklora.manifest" occurs twice"#,
        ),
        attack(
            "header_unknown_field",
            header_with(r#""dtype":"F32""#, r#""dtype":"F32","strides":[1,2]"#),
            "\"tokens.milo\": header entry: unknown field `strides`",
        ),
        attack(
            "header_missing_field",
            header_with(r#""dtype":"F32","#, ""),
            "\"tokens.milo\": header entry: missing field `dtype`",
        ),
        attack(
            "header_tensor_array",
            header_with(r#"{"data_offsets":[0,32],"dtype":"F32","shape":[2,4]}"#, r#"["F32",[2,4],[0,32]]"#),
            "\"tokens.milo\": header entry: must be an object",
        ),
        attack(
            "header_shape_negative",
            header_with(r#""shape":[2,4]"#, r#""shape":[-2,4]"#),
            "\"tokens.milo\": header entry: invalid value",
        ),
        attack(
            "header_shape_fraction",
            header_with(r#""shape":[2,4]"#, r#""shape":[2.0,4]"#),
            "header entry: invalid type",
        ),
        attack(
            "header_shape_string",
            header_with(r#""shape":[2,4]"#, r#""shape":"2,4""#),
            "header entry: invalid type",
        ),
        attack(
            "header_shape_beyond_64_bits",
            header_with(r#""shape":[2,4]"#, r#""shape":[18446744073709551618,4]"#),
            "header entry: invalid type",
        ),
        attack(
            "header_tensor_null",
            header(|h| replaced(h, "{\"__metadata__\"", "{\"a\":null,\"__metadata__\"")),
            "tensor \"a\": header entry: must be an object",
        ),
    ]
}

fn metadata() -> Vec<Attack> {
    let without_metadata = |h: String| {
        let begin = h.find(METADATA).unwrap();
        let end = begin + h[begin..].find("},").unwrap() + 2;
        let end = end.max(h.rfind(r#""1.0"},"#).unwrap() + 7);
        format!("{}{}", &h[..begin], &h[end..])
    };
    vec![
        attack("metadata_missing", header(without_metadata), "no metadata \"blocklora.spec\"; this is not a BlockLoRA"),
        attack("metadata_no_spec", header_with(r#","blocklora.spec":"1.0""#, ""), "no metadata \"blocklora.spec\""),
        attack(
            "metadata_no_manifest",
            header_with(r#""blocklora.manifest":"#, r#""blocklora_manifest":"#),
            "unknown header metadata \"blocklora_manifest\"",
        ),
        attack(
            "metadata_unknown",
            header_with(METADATA, r#""__metadata__":{"format":"pt","#),
            "unknown header metadata \"format\"",
        ),
        attack(
            "metadata_not_text",
            header_with(r#""blocklora.spec":"1.0""#, r#""blocklora.spec":1.0"#),
            "header: __metadata__: invalid type",
        ),
        attack("metadata_array", pack(r#"{"__metadata__":[]}"#, &[]), "header: __metadata__: invalid type"),
        attack(
            "version_newer",
            header_with(r#"spec":"1.0""#, r#"spec":"1.1""#),
            "adapter format \"1.1\", but this reader",
        ),
        attack("version_major", header_with(r#"spec":"1.0""#, r#"spec":"2.0""#), "adapter format \"2.0\""),
        attack("version_spaced", header_with(r#"spec":"1.0""#, r#"spec":"1.0 ""#), "adapter format \"1.0 \""),
        attack("version_escapes", header_with(r#"spec":"1.0""#, r#"spec":"\u001b[2J""#), "adapter format"),
        attack("manifest_digest_missing", header_with(r#"_digest":"#, r#"_digests":"#), "unknown header metadata"),
        attack(
            "manifest_digest_wrong",
            header(|h| {
                let begin = h.find(r#"manifest_digest":""#).unwrap() + 18;
                format!("{}{}{}", &h[..begin], "0".repeat(64), &h[begin + 64..])
            }),
            "the digest of the manifest is",
        ),
        attack(
            "manifest_altered",
            header(|h| replaced(h, r#"\"class_word\":\"dog\""#, r#"\"class_word\":\"god\""#)),
            "the digest of the manifest is",
        ),
    ]
}

fn offsets() -> Vec<Attack> {
    vec![
        attack("offsets_overlap", parts(|p| p.tensor("lora_B").offsets = [16, 32]), "overlap"),
        attack("offsets_equal", parts(|p| p.tensor("lora_A").offsets = [0, 32]), "overlap"),
        attack(
            "offsets_hole",
            parts(|p| {
                p.tensor("lora_B").offsets = [80, 96];
                p.data.extend([0; 16]);
            }),
            "bytes 64..80 of the data section belong to no tensor",
        ),
        attack(
            "offsets_hole_at_begin",
            parts(|p| {
                p.tensors.iter_mut().for_each(|t| t.offsets = t.offsets.map(|o| o + 8));
                p.data.splice(0..0, [0; 8]);
            }),
            "bytes 0..8 of the data section belong to no tensor",
        ),
        attack("offsets_reversed", parts(|p| p.tensor("lora_B").offsets = [48, 32]), "end before they begin"),
        attack(
            "offsets_beyond_file",
            parts(|p| p.tensor("milo").offsets = [80, 112]),
            "truncated: tensor \"tokens.milo\"",
        ),
        attack("offsets_huge", parts(|p| p.tensor("milo").offsets = [u64::MAX - 31, u64::MAX]), "truncated: tensor"),
        attack(
            "offsets_too_many",
            header(|h| replaced(h, "\"data_offsets\":[0,32]", "\"data_offsets\":[0,32,64]")),
            "header entry: invalid length 3",
        ),
        attack(
            "offsets_misaligned",
            parts(|p| {
                let b = p.tensor("lora_B");
                (b.dtype, b.shape, b.offsets) = ("F16".into(), vec![1, 1], [0, 2]);
                p.tensor("lora_A").offsets = [2, 34];
                p.tensor("milo").offsets = [34, 66];
                p.data.truncate(66);
            }),
            "not aligned to the 4 bytes of F32",
        ),
        attack("zero_tensors", parts(clear), "no tensors; an adapter has at least one"),
        attack("shape_lies", parts(|p| p.tensor("lora_A").shape = vec![2, 5]), "span 32 bytes, shape and type need 40"),
        attack(
            "shape_lies_small",
            parts(|p| p.tensor("lora_A").shape = vec![2, 2]),
            "span 32 bytes, shape and type need 16",
        ),
        attack("shape_overflows", parts(|p| p.tensor("lora_A").shape = vec![1 << 63, 4]), "its size overflows"),
        attack(
            "shape_overflows_to_fit",
            parts(|p| p.tensor("lora_A").shape = vec![(1 << 62) + 2, 4]),
            "its size overflows",
        ),
        attack("shape_huge", parts(|p| p.tensor("lora_A").shape = vec![1 << 40, 1 << 10]), "shape and type need"),
        attack("shape_zero", parts(|p| p.tensor("lora_A").shape = vec![0, 4]), "has no elements"),
        attack("shape_scalar", parts(|p| p.tensor("lora_A").shape = vec![]), "must have two dimensions"),
        attack("shape_flat", parts(|p| p.tensor("lora_A").shape = vec![8]), "must have two dimensions"),
        attack("shape_of_many", parts(|p| p.tensor("lora_A").shape = vec![1; 5000]), "must have two dimensions"),
        attack("dtype_integer", parts(|p| p.tensor("lora_A").dtype = "I32".into()), "type \"I32\", expected F32"),
        attack("dtype_double", parts(|p| p.tensor("lora_A").dtype = "F64".into()), "type \"F64\", expected F32"),
        attack("dtype_lower_case", parts(|p| p.tensor("lora_A").dtype = "f32".into()), "type \"f32\", expected F32"),
        attack("dtype_long", parts(|p| p.tensor("lora_A").dtype = "F".repeat(9000)), "expected F32"),
        attack("dtype_narrower", parts(|p| p.tensor("lora_A").dtype = "BF16".into()), "shape and type need 16"),
    ]
}

fn clear(p: &mut Parts) {
    p.tensors.clear();
    p.data.clear();
    p.manifest["tokens"] = serde_json::json!([]);
    p.manifest["outputs"] = serde_json::json!({});
}

pub(super) fn attacks() -> Vec<Attack> {
    assert_eq!(LAYER, "unet.block.to_q");
    [layout(), json(), metadata(), offsets()].into_iter().flatten().collect()
}
