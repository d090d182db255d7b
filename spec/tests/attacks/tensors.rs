//! Tensors that do not fit the manifest, and numbers that are none.

use serde_json::json;

use super::{Attack, Parts, attack, parts, raw};
use crate::common::raw::{LAYER, Tensor};

fn rename(suffix: &'static str, name: &'static str) -> Vec<u8> {
    parts(|p| p.tensor(suffix).name = name.into())
}

/// Takes a tensor out, with its bytes.
fn remove(p: &mut Parts, suffix: &str) {
    let i = p.tensors.iter().position(|t| t.name.ends_with(suffix)).unwrap();
    let [begin, end] = p.tensors.remove(i).offsets;
    p.data.drain(begin as usize..end as usize);
    for t in p.tensors.iter_mut().filter(|t| t.offsets[0] >= end) {
        t.offsets = t.offsets.map(|o| o - (end - begin));
    }
}

/// Appends a tensor of ones.
fn append(p: &mut Parts, name: &str, shape: [u64; 2]) {
    let begin = p.data.len() as u64;
    for _ in 0..shape[0] * shape[1] {
        p.data.extend(1_f32.to_le_bytes());
    }
    let offsets = [begin, p.data.len() as u64];
    p.tensors.push(Tensor { name: name.into(), dtype: "F32".into(), shape: shape.into(), offsets });
}

/// Puts a tensor of ones in the place of another.
fn reshape(p: &mut Parts, suffix: &str, shape: [u64; 2]) {
    let name = p.tensor(suffix).name.clone();
    remove(p, suffix);
    append(p, &name, shape);
}

fn names() -> Vec<Attack> {
    vec![
        attack("tensor_path", rename("lora_A", "../../etc/passwd"), "must be tokens.<name>, <layer>.lora_A or"),
        attack("tensor_path_in_layer", rename("lora_A", "unet./../../x.lora_A"), "must be a module path"),
        attack("tensor_dots", rename("lora_A", "unet..block.lora_A"), "must be a module path"),
        attack("tensor_backslash", rename("lora_A", "unet.a\\b.lora_A"), "must be a module path"),
        attack("tensor_escapes", rename("lora_A", "unet.\u{1b}[2J.lora_A"), "must be a module path"),
        attack("tensor_nul", rename("lora_A", "unet.a\0.lora_A"), "must be a module path"),
        attack("tensor_no_layer", rename("lora_A", ".lora_A"), "must begin with unet."),
        attack("tensor_empty_name", rename("lora_A", ""), "must be tokens.<name>"),
        attack("tensor_other_part", rename("lora_A", "vae.block.lora_A"), "must begin with unet."),
        attack("tensor_long_name", parts(|p| p.tensor("lora_A").name = "unet.a".repeat(5000)), "longer than 256 bytes"),
        attack("token_tensor_path", rename("milo", "tokens.../../x"), "not a token's name"),
        attack("tensor_unknown_layer", rename("lora_A", "unet.block.to_k.lora_A"), "outputs do not list the layer"),
        attack("tensor_unknown_factor", rename("lora_A", "unet.block.to_q.lora_mid"), "must be tokens.<name>"),
        attack("tensor_kohya", rename("lora_A", "lora_unet_block_to_q.lora_down.weight"), "must be tokens.<name>"),
        attack("tensor_unknown_token", rename("milo", "tokens.kitty"), "tokens do not list it"),
        attack("lora_a_missing", parts(|p| remove(p, "lora_A")), "\"unet.block.to_q.lora_A\" is missing"),
        attack("lora_b_missing", parts(|p| remove(p, "lora_B")), "\"unet.block.to_q.lora_B\" is missing"),
        attack("token_missing", parts(|p| remove(p, "milo")), "\"tokens.milo\" is missing"),
        attack(
            "layer_missing",
            parts(|p| p.manifest["outputs"]["unet.block.to_k"] = json!(6)),
            "\"unet.block.to_k.lora_A\" is missing",
        ),
    ]
}

fn shapes() -> Vec<Attack> {
    vec![
        attack(
            "slot_of_others",
            parts(|p| p.manifest["partition"]["slot"] = json!(2)),
            "slot 2 of 4 owns 1 of the 6 rows",
        ),
        attack(
            "slot_owns_nothing",
            parts(|p| {
                p.manifest["partition"]["slot"] = json!(0);
                p.manifest["outputs"][LAYER] = json!(2);
            }),
            "the slot owns none of the layer's 2 rows",
        ),
        attack(
            "rows_of_all",
            parts(|p| reshape(p, "lora_B", [6, 2])),
            "must be [2, 2]: slot 1 of 4 owns 2 of the 6 rows",
        ),
        attack("rows_too_few", parts(|p| reshape(p, "lora_B", [1, 2])), "must be [2, 2]: slot 1 of 4"),
        attack(
            "partition_removed",
            parts(|p| p.manifest["partition"] = json!(null)),
            "without a partition it owns all 6",
        ),
        attack("outputs_other", parts(|p| p.manifest["outputs"][LAYER] = json!(13)), "owns 3 of the 13 rows"),
        attack(
            "outputs_claimed",
            parts(|p| p.manifest["outputs"][LAYER] = json!(65536)),
            "owns 16384 of the 65536 rows",
        ),
        attack("rank_of_manifest", parts(|p| p.manifest["rank"] = json!(3)), "the manifest's rank is 3"),
        attack("rank_of_a", parts(|p| reshape(p, "lora_A", [1, 4])), "the manifest's rank is 2"),
        attack("rank_of_b", parts(|p| reshape(p, "lora_B", [2, 1])), "must be [2, 2]"),
        attack("b_transposed", parts(|p| reshape(p, "lora_B", [1, 4])), "must be [2, 2]"),
        attack("token_too_long", parts(|p| reshape(p, "milo", [3, 4])), "the manifest gives the token 2 vectors"),
        attack(
            "token_widths_differ",
            parts(|p| {
                p.manifest["tokens"] = json!([{"name": "milo", "vectors": 2}, {"name": "other", "vectors": 2}]);
                append(p, "tokens.other", [2, 5]);
            }),
            "token \"milo\" has vectors of 4 elements; all must agree",
        ),
    ]
}

fn numbers() -> Vec<Attack> {
    let set = |suffix: &'static str, index: usize, value: f32| {
        parts(|p| {
            let at = p.tensor(suffix).offsets[0] as usize + 4 * index;
            p.data[at..at + 4].copy_from_slice(&value.to_le_bytes());
        })
    };
    let narrow = |dtype: &'static str, bits: u16| {
        parts(|p| {
            remove(p, "lora_A");
            append(p, "unet.block.to_q.lora_A", [2, 2]);
            let a = p.tensor("lora_A");
            (a.dtype, a.shape) = (dtype.into(), vec![2, 4]);
            let at = a.offsets[0] as usize + 6;
            p.data[at..at + 2].copy_from_slice(&bits.to_le_bytes());
        })
    };
    vec![
        attack("nan", set("lora_A", 5, f32::NAN), "\"unet.block.to_q.lora_A\": element 5 is NaN"),
        attack("nan_signalling", set("lora_A", 0, f32::from_bits(0xFF80_0001)), "element 0 is NaN"),
        attack("infinity", set("lora_B", 3, f32::INFINITY), "\"unet.block.to_q.lora_B\": element 3 is inf"),
        attack("infinity_negative", set("milo", 7, f32::NEG_INFINITY), "\"tokens.milo\": element 7 is -inf"),
        attack("nan_f16", narrow("F16", 0x7E00), "element 3 is NaN"),
        attack("infinity_f16", narrow("F16", 0xFC00), "element 3 is -inf"),
        attack("infinity_bf16", narrow("BF16", 0x7F80), "element 3 is inf"),
        attack(
            "tensor_altered",
            raw(|b| {
                let last = b.len() - 4;
                b[last] ^= 1;
            }),
            "the digest of the tensors is",
        ),
        attack(
            "tensors_exchanged",
            {
                let mut p = Parts::valid();
                p.tensor("lora_A").name = "x".into();
                p.tensor("milo").name = "unet.block.to_q.lora_A".into();
                p.tensor("x").name = "tokens.milo".into();
                p.bytes()
            },
            "the digest of the tensors is",
        ),
        attack(
            "tensor_digest_wrong",
            {
                let mut p = Parts::valid();
                p.manifest["tensor_digest"] = json!("0".repeat(64));
                p.bytes()
            },
            "the file says 0000",
        ),
        attack(
            "tensor_digest_not_hex",
            {
                let mut p = Parts::valid();
                p.manifest["tensor_digest"] = json!("z".repeat(64));
                p.bytes()
            },
            "manifest: tensor_digest: must be a SHA-256",
        ),
    ]
}

pub(super) fn attacks() -> Vec<Attack> {
    [names(), shapes(), numbers()].into_iter().flatten().collect()
}
