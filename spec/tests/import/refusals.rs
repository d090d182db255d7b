//! What is refused, and that it is named.

use blocklora_spec::Error;
use blocklora_spec::import::{Module, Options, import};
use serde_json::json;

use crate::common;
use crate::foreign::*;

#[test]
fn every_key_is_applied_or_named() {
    let conv = ["lora_unet_down_blocks_0_proj_in.lora_down.weight", "lora_unet_down_blocks_0_proj_in.lora_up.weight"];
    let time = "lora_unet_time_embedding_linear_1.alpha";
    let file = kohya().factors(conv, 1, 4).f32(time, &[], &[1.0]).f32("what.is.this", &[1], &[0.0]).f32(
        KOHYA_OUT[0],
        &[1, 2],
        &[0.0; 2],
    );
    let error = refused(&file, &["5 of its keys", conv[0], "and 1 more", "a convolution", "--allow-unmatched"]);
    assert!(matches!(&error, Error::Unmatched { keys, .. } if keys.len() == 5), "{error:?}");
    let folder = tempfile::tempdir().unwrap();
    let lenient = Options { allow_unmatched: true, ..options() };
    let imported = import(file.write(&folder, "x.safetensors"), &target(), &lenient).unwrap();
    close(&delta(&to_adapter(&imported), Q), &expected(2, 1, 1.0));
    let reason = |key: &str| &imported.unmatched.iter().find(|u| u.key == key).unwrap().reason;
    assert_eq!((imported.layers, imported.unmatched.len()), (1, 5));
    assert!(reason(conv[1]).contains("a convolution"), "{}", reason(conv[1]));
    assert!(reason(time).contains("not one of the Linears"), "{}", reason(time));
    assert!(reason(KOHYA_OUT[0]).contains("B (up) beside it is missing"), "{}", reason(KOHYA_OUT[0]));
    assert!(reason("what.is.this").contains("not a key of"), "{}", reason("what.is.this"));
    // Nothing is left.
    refused_with(&Foreign::default().factors(conv, 1, 4), &lenient, &["none of its keys", "a convolution"]);
    refused_with(&Foreign::default(), &lenient, &["no tensors"]);
}

#[test]
fn other_methods_are_named() {
    let with = |key: &str| kohya().f32(key, &[1, 1], &[1.0]);
    for (key, needle) in [
        ("lora_unet_down_blocks_0_attn1_to_k.hada_w1_a", "LoHa"),
        ("lora_unet_down_blocks_0_attn1_to_k.lokr_w1", "LoKr"),
        ("lora_unet_down_blocks_0_attn1_to_k.oft_blocks", "OFT"),
        ("lora_unet_down_blocks_0_attn1_to_k.on_input", "IA3"),
        ("lora_unet_down_blocks_0_attn1_to_k.b2.weight", "GLoRA"),
        ("lora_unet_down_blocks_0_proj_in.lora_mid.weight", "Tucker"),
        ("lora_unet_down_blocks_0_attn1_to_k.diff", "full difference"),
        ("lora_te2_text_model_encoder_layers_0_self_attn_q_proj.alpha", "SDXL"),
        ("lora_unet_input_blocks_4_1_proj_in.lora_up.weight", "SDXL"),
        ("text_encoder_2.text_model.x.lora_A.weight", "SDXL"),
        ("transformer.x.lora_A.weight", "Flux"),
        ("model.diffusion_model.x.weight", "whole model"),
    ] {
        let error = refused(&with(key), &[key, needle]);
        assert!(matches!(error, Error::Unmatched { .. }), "{error:?}");
    }
    // Without its magnitudes DoRA's A and B are another change.
    let lenient = Options { allow_unmatched: true, ..options() };
    refused_with(&with("lora_unet_down_blocks_0_attn1_to_q.dora_scale"), &lenient, &["dora_scale", "DoRA"]);
    refused_with(&with("unet.down_blocks.0.attn1.to_q.lora_magnitude_vector"), &lenient, &["DoRA"]);
}

#[test]
fn factors_that_do_not_fit_are_refused() {
    let pair = |a: &[usize], b: &[usize]| {
        let zeros = |shape: &[usize]| vec![0.0; shape.iter().product()];
        Foreign::default().f32(KOHYA_Q[0], a, &zeros(a)).f32(KOHYA_Q[1], b, &zeros(b))
    };
    refused(&pair(&[2, 2], &[3, 1]), &["rank 2", "has 1"]);
    refused(&pair(&[1, 5], &[3, 1]), &[Q, "3 outputs of 5 inputs", "3 of 2", "base model"]);
    refused(&pair(&[0, 2], &[3, 0]), &["rank 0"]);
    refused(&pair(&[1025, 2], &[3, 1025]), &["rank 1025", "1 to 1024"]);
    refused(&pair(&[2], &[3, 1]), &[KOHYA_Q[0], "two dimensions"]);
    let not_finite = |at: usize, value: f32| {
        let mut up = [1.0; 3];
        up[at] = value;
        Foreign::default().f32(KOHYA_Q[0], &[1, 2], &[1.0; 2]).f32(KOHYA_Q[1], &[3, 1], &up)
    };
    refused(&not_finite(2, f32::NAN), &[KOHYA_Q[1], "element 2", "NaN"]);
    refused(&not_finite(0, f32::INFINITY), &[KOHYA_Q[1], "element 0", "inf"]);
    refused(&kohya().f32(ALPHA_Q, &[], &[f32::NAN]), &[ALPHA_Q, "NaN"]);
    refused(&kohya().f32(ALPHA_Q, &[], &[0.0]), &[ALPHA_Q, "alpha of 0"]);
    refused(&kohya().f32(ALPHA_Q, &[2], &[1.0, 1.0]), &[ALPHA_Q, "1 numbers"]);
    // Two names of one layer, with other factors.
    refused(&kohya().factors(PEFT_Q, 2, 2), &[KOHYA_Q[0], PEFT_Q[0], "leave one out"]);
}

/// Two of the base's modules may have one name with underscores; none is guessed at.
#[test]
fn a_name_of_two_modules_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = kohya().write(&folder, "x.safetensors");
    let mut target = target();
    let twin = Module { name: "unet.down_blocks.0.attn1_to_q".into(), shape: vec![3, 2], adaptable: true };
    target.modules.push(twin.clone());
    let error = import(&path, &target, &options()).unwrap_err().to_string();
    assert!(error.contains(Q) && error.contains(&twin.name), "{error}");
}

#[test]
fn what_is_no_safetensors_file_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let fails = |name: &str, bytes: &[u8], needles: &[&str]| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        let error = import(&path, &target(), &options()).unwrap_err().to_string();
        for needle in [name].iter().chain(needles) {
            assert!(error.contains(needle), "{needle:?} is not in: {error}");
        }
    };
    fails("a.pt", b"PK\x03\x04\x00\x00\x08\x08\x00\x00", &["pickle", "save_file(torch.load("]);
    fails("b.safetensors", b"PK\x03\x04\x00\x00\x08\x08\x00\x00", &["pickle"]);
    fails("c.ckpt", b"\x80\x02}q\x00(X\x0a\x00", &["pickle"]);
    fails("d.safetensors", b"", &["truncated"]);
    fails("e.safetensors", b"not a safetensors file at all", &["header"]);
    let tensor = |offsets: [u64; 2], second: [u64; 2]| {
        let entry = |offsets| json!({"dtype": "F32", "shape": [1], "data_offsets": offsets});
        common::raw::container(&json!({"a": entry(offsets), "b": entry(second)}).to_string(), &[0; 8])
    };
    fails("f.safetensors", &tensor([0, 12], [4, 8]), &["\"a\"", "truncated"]);
    fails("g.safetensors", &tensor([8, 4], [4, 8]), &["\"a\"", "8 and 4"]);
    fails("h.safetensors", &tensor([0, 8], [0, 8]), &["\"b\"", "overlaps"]);
    fails("i.safetensors", &tensor([0, u64::MAX], [4, 8]), &["\"a\""]);
    // A safetensors file whatever it is called.
    std::fs::write(folder.path().join("j.bin"), kohya().bytes()).unwrap();
    assert!(import(folder.path().join("j.bin"), &target(), &options()).is_ok());
    // A shape that is not that of its bytes.
    let mut short = kohya();
    short.tensors[0].2 = vec![1 << 40, 2];
    fails("k.safetensors", &short.bytes(), &["rank 1099511627776"]);
}

/// One byte after the other is changed: whatever that makes of the file, it is read or refused.
#[test]
fn damaged_files_are_no_reason_to_panic() {
    let folder = tempfile::tempdir().unwrap();
    let config = json!({"unet.r": 2, "unet.lora_alpha": 3, "unet.alpha_pattern": {"to_q": 5}}).to_string();
    let file = Foreign::default().factors(PEFT_Q, 2, 1).factors(KOHYA_OUT, 1, 2).f32(ALPHA_OUT, &[], &[1.0]);
    let bytes = file.f32("bundle_emb.cat.clip_l", &[1, 4], &vectors(1)).meta("lora_adapter_metadata", &config).bytes();
    let lenient = Options { allow_unmatched: true, ..options() };
    let (mut read, mut refused) = (0, 0);
    for at in 0..bytes.len() {
        for byte in [bytes[at] ^ 1, bytes[at] ^ 0x10, 0xff] {
            let mut damaged = bytes.clone();
            damaged[at] = byte;
            let path = folder.path().join(format!("{at}-{byte}.safetensors"));
            std::fs::write(&path, damaged).unwrap();
            match import(&path, &target(), &lenient) {
                Ok(imported) => {
                    imported.builder.to_bytes("x").unwrap();
                    read += 1;
                }
                Err(error) => {
                    assert!(error.to_string().contains(&format!("{at}-{byte}.safetensors")), "{error}");
                    refused += 1;
                }
            }
            std::fs::remove_file(path).unwrap();
        }
    }
    assert!(read > 0 && refused > 0);
}

/// Ranks that would be filled up to more than an adapter may have are found before that is done.
#[test]
fn filling_up_is_bounded() {
    let folder = tempfile::tempdir().unwrap();
    let mut target = target();
    let mut file = Foreign::default().factors(KOHYA_Q, 1024, 1);
    for i in 0..20 {
        target.modules.push(Module { name: format!("unet.wide.{i}"), shape: vec![1, 1 << 16], adaptable: true });
        let keys = ["down", "up"].map(|f| format!("lora_unet_wide_{i}.lora_{f}.weight"));
        file = file.f32(&keys[0], &[1, 1 << 16], &[0.0; 1 << 16]).f32(&keys[1], &[1, 1], &[0.0]);
    }
    let error = import(file.write(&folder, "x.safetensors"), &target, &options()).unwrap_err().to_string();
    assert!(error.contains("rank 1024 in all 21 layers"), "{error}");
}
