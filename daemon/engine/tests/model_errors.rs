//! What is wrong with a model folder is said, with file and field or tensor; nothing is ignored that changes the result.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::path::Path;

use blocklora_engine::model::Model;
use blocklora_engine::model::config::SchedulerConfig;
use blocklora_engine::sample::TimestepSpacing;
use candle_core::{DType, Device};
use serde_json::{Value, json};
use support::*;

fn error(dir: &Path) -> String {
    match Model::load(dir, &Device::Cpu, DType::F32) {
        Ok(_) => panic!("the model loads"),
        Err(error) => error.to_string(),
    }
}

/// Sets `field` of a config to `value` (null removes it) and expects an error with all of `words` in it; none: that it
/// still loads.
#[track_caller]
fn check(dir: &Path, file: &str, field: &str, value: Value, words: &[&str]) {
    let path = dir.join(file);
    let before = fs::read(&path).unwrap();
    let mut config: Value = serde_json::from_slice(&before).unwrap();
    config[field] = value.clone();
    fs::write(&path, config.to_string()).unwrap();
    if words.is_empty() {
        Model::load(dir, &Device::Cpu, DType::F32).unwrap_or_else(|e| panic!("{field} = {value}: {e}"));
    } else {
        let error = error(dir);
        for word in [&[file], words].concat() {
            assert!(error.contains(word), "{field} = {value}: {word:?} is not in: {error}");
        }
    }
    fs::write(&path, before).unwrap();
}

#[test]
fn unsupported_settings_are_named() {
    let folder = model_folder("starter", DType::F16);
    let dir = folder.path();
    for (field, value) in [
        ("act_fn", json!("mish")),
        ("center_input_sample", json!(true)),
        ("class_embed_type", json!("timestep")),
        ("addition_embed_type", json!("text_time")),
        ("encoder_hid_dim", json!(8)),
        ("dual_cross_attention", json!(true)),
        ("only_cross_attention", json!(true)),
        ("mid_block_type", json!("UNetMidBlock2D")),
        ("resnet_time_scale_shift", json!("scale_shift")),
        ("time_embedding_type", json!("fourier")),
        ("timestep_post_act", json!("silu")),
        ("cross_attention_norm", json!("layer_norm")),
        ("attention_type", json!("gated")),
        ("downsample_padding", json!(0)),
        ("time_cond_proj_dim", json!(256)),
        ("num_class_embeds", json!(3)),
        ("conv_in_kernel", json!(4)),
        ("down_block_types", json!(["AttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"])),
        ("_class_name", json!("UNet3DConditionModel")),
        ("a_setting_of_the_future", json!(1)),
    ] {
        check(dir, "unet/config.json", field, value, &[field, "not supported"]);
    }
    for (field, value) in [
        ("act_fn", json!("relu")),
        ("shift_factor", json!(0.1)),
        ("latents_mean", json!([0.1])),
        ("up_block_types", json!(["UpDecoderBlock2D", "AttnUpDecoderBlock2D", "UpDecoderBlock2D"])),
        ("in_channels", json!(1)),
    ] {
        check(dir, "vae/config.json", field, value, &[field, "not supported"]);
    }
    for (field, value) in [("hidden_act", json!("relu")), ("architectures", json!(["CLIPTextModelWithProjection"]))] {
        check(dir, "text_encoder/config.json", field, value, &[field, "not supported"]);
    }
    for (field, value) in [
        ("prediction_type", json!("sample")),
        ("beta_schedule", json!("squaredcos_cap_v2")),
        ("rescale_betas_zero_snr", json!(true)),
        ("clip_sample", json!(true)),
        // DDIMScheduler clips unless told otherwise.
        ("clip_sample", Value::Null),
        ("timestep_spacing", json!("random")),
    ] {
        check(dir, "scheduler/scheduler_config.json", field, value, &[field, "not supported"]);
    }
    for (field, value) in [
        ("_class_name", json!("StableDiffusionXLPipeline")),
        ("text_encoder", json!(["transformers", "T5EncoderModel"])),
        ("text_encoder_2", json!(["transformers", "CLIPTextModelWithProjection"])),
        ("tokenizer", json!(["transformers", "T5Tokenizer"])),
    ] {
        check(dir, "model_index.json", field, value, &[field, "not supported"]);
    }
}

#[test]
fn settings_that_change_nothing_are_accepted() {
    let folder = model_folder("starter", DType::F16);
    let dir = folder.path();
    for (field, value) in [
        ("upcast_attention", json!(true)),
        ("a_setting_of_the_future", json!(false)),
        ("another", Value::Null),
        ("_note", json!("anything")),
        ("mid_block_scale_factor", json!(1.0)),
        ("dropout", json!(0)),
        ("transformer_layers_per_block", json!([1, 1, 1])),
        ("reverse_transformer_layers_per_block", json!([1, 1, 1])),
        ("sample_size", json!([8, 16])),
    ] {
        check(dir, "unet/config.json", field, value, &[]);
    }
    check(dir, "vae/config.json", "force_upcast", json!(false), &[]);
    check(dir, "text_encoder/config.json", "top_k", json!(50), &[]);
    check(dir, "scheduler/scheduler_config.json", "skip_prk_steps", json!(true), &[]);
    check(dir, "model_index.json", "safety_checker", json!([null, null]), &[]);
}

/// As in diffusers, where a sampler that is put in the place of the folder's own keeps its own spacing.
#[test]
fn a_folder_that_does_not_say_its_spacing_leaves_it_to_the_sampler() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("scheduler_config.json");
    let spacing = |class: &str, said: Value| {
        let config = json!({"_class_name": class, "clip_sample": false, "timestep_spacing": said});
        fs::write(&path, config.to_string()).unwrap();
        SchedulerConfig::open(&path).unwrap().schedule.spacing
    };
    for class in ["PNDMScheduler", "EulerDiscreteScheduler"] {
        assert_eq!(spacing(class, Value::Null), None, "{class}");
        assert_eq!(spacing(class, json!("linspace")), Some(TimestepSpacing::Linspace), "{class}");
        assert_eq!(spacing(class, json!("trailing")), Some(TimestepSpacing::Trailing), "{class}");
    }
}

#[test]
fn impossible_settings_are_errors_not_panics() {
    let folder = model_folder("starter", DType::F16);
    let dir = folder.path();
    for (field, value) in [
        ("block_out_channels", json!([])),
        ("block_out_channels", json!([0, 24, 32])),
        ("block_out_channels", json!([16, 24, 1e15])),
        ("block_out_channels", json!([16, -24, 32])),
        ("block_out_channels", json!("16")),
        ("block_out_channels", Value::Null),
        ("norm_num_groups", json!(0)),
        ("norm_num_groups", json!(7)),
        ("norm_eps", json!("small")),
        ("attention_head_dim", json!([2, 5, 4])),
        ("attention_head_dim", json!([2, 3])),
        ("attention_head_dim", json!(0)),
        ("layers_per_block", json!([1, 1, 1, 1])),
        ("freq_shift", json!(8)),
        ("resnet_out_scale_factor", json!(0)),
        ("up_block_types", json!(["UpBlock2D"])),
        ("sample_size", json!("large")),
        ("cross_attention_dim", json!(32)),
        ("out_channels", json!(4)),
    ] {
        check(dir, "unet/config.json", field, value, &[field]);
    }
    // More layers than the file has tensors for: the first that is missing is named, and nothing is allocated for them.
    let path = dir.join("unet/config.json");
    let before = fs::read_to_string(&path).unwrap();
    let mut config: Value = serde_json::from_str(&before).unwrap();
    config["layers_per_block"] = json!(16_000_000);
    fs::write(&path, config.to_string()).unwrap();
    let message = error(dir);
    assert!(message.contains("down_blocks.0.resnets.1") && message.contains("missing"), "{message}");
    fs::write(&path, before).unwrap();

    for (field, value) in [("norm_num_groups", json!(5)), ("scaling_factor", json!(0)), ("layers_per_block", json!(0))]
    {
        check(dir, "vae/config.json", field, value, &[field]);
    }
    for (field, value) in [("num_attention_heads", json!(5)), ("hidden_size", json!(0)), ("vocab_size", json!(-1))] {
        check(dir, "text_encoder/config.json", field, value, &[field]);
    }
    for (field, value) in [
        ("num_train_timesteps", json!(0)),
        ("num_train_timesteps", json!(1e12)),
        ("steps_offset", json!(1000)),
        ("beta_end", json!(2.0)),
        ("trained_betas", json!([0.1, 0.2])),
    ] {
        check(dir, "scheduler/scheduler_config.json", field, value, &[field]);
    }
    check(dir, "model_index.json", "unet", Value::Null, &["unet"]);
}

#[test]
fn weights_must_be_those_of_the_config() {
    let folder = model_folder("starter", DType::F16);
    let dir = folder.path();
    let path = weight_path(dir, "unet");
    let before = fs::read(&path).unwrap();
    let good = weights("starter", "unet");
    let index = |name: &str| good.iter().position(|(n, ..)| n == name).unwrap();
    let to_q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight";
    let check = |change: &dyn Fn(&mut Weights), words: &[&str]| {
        let mut weights = good.clone();
        change(&mut weights);
        write_weights(&path, &weights, DType::F16);
        let error = error(dir);
        for word in [&["diffusion_pytorch_model.safetensors"], words].concat() {
            assert!(error.contains(word), "{word:?} is not in: {error}");
        }
    };
    check(&|weights| drop(weights.remove(index(to_q))), &[to_q, "missing"]);
    check(&|weights| weights[index(to_q)].1 = vec![16, 64], &[to_q, "[16, 64]", "[32, 32]"]);
    check(
        &|weights| weights.push(("mid_block.extra.weight".into(), vec![1], vec![0.0])),
        &["mid_block.extra.weight", "belong together"],
    );
    for (length, words) in [(before.len() - 1, "safetensors"), (4, "safetensors"), (0, "diffusion_pytorch_model")] {
        fs::write(&path, &before[..length]).unwrap();
        let error = error(dir);
        assert!(error.contains(words) && error.contains("unet"), "{error}");
    }
    fs::remove_file(&path).unwrap();
    fs::write(dir.join("unet/diffusion_pytorch_model.bin"), "pickle").unwrap();
    let error = error(dir);
    assert!(error.contains("no weights") && error.contains("save_pretrained"), "{error}");
}

#[test]
fn other_folders_are_not_models() {
    let empty = tempfile::tempdir().unwrap();
    assert!(error(empty.path()).contains("model_index.json"));
    assert!(error(&empty.path().join("nowhere")).contains("nowhere"));
    let folder = model_folder("sd15", DType::F16);
    let dir = folder.path();
    let error = Model::load(dir, &Device::Cpu, DType::U8).unwrap_err().to_string();
    assert!(error.contains("precision"), "{error}");
    for file in ["model_index.json", "unet/config.json", "tokenizer/vocab.json", "scheduler/scheduler_config.json"] {
        let path = dir.join(file);
        let before = fs::read(&path).unwrap();
        for content in [&b"{"[..], b"[1, 2]", b"\xff\xfe", &[b'['; 100_000]] {
            fs::write(&path, content).unwrap();
            assert!(self::error(dir).contains(file), "{file}");
        }
        fs::write(&path, before).unwrap();
    }
}

#[test]
fn tokenizers_must_fit_the_text_encoder() {
    let folder = model_folder("sd15", DType::F16);
    let dir = folder.path();
    check_tokenizer(dir, "vocab.json", &|text| text.replace("\"<|endoftext|>\":531", "\"<|endoftext|>\":532"), "532");
    check_tokenizer(dir, "vocab.json", &|text| text.replace("\"<|endoftext|>\":531", "\"<|endoftext|>\":7"), "same id");
    check_tokenizer(dir, "vocab.json", &|text| text.replace("<|endoftext|>", "<|end|>"), "eos_token");
    check_tokenizer(dir, "merges.txt", &|text| text + "nothing\n", "nothing");
    check_tokenizer(dir, "merges.txt", &|text| text + "no such\n", "no");
    check_tokenizer(dir, "special_tokens_map.json", &|text| text.replace("\"<|endoftext|>\"", "[1]"), "token");
    check_tokenizer(dir, "tokenizer_config.json", &|text| text.replace("24", "1"), "model_max_length");
}

#[track_caller]
fn check_tokenizer(dir: &Path, file: &str, change: &dyn Fn(String) -> String, word: &str) {
    let path = dir.join("tokenizer").join(file);
    let before = fs::read_to_string(&path).unwrap();
    let after = change(before.clone());
    assert_ne!(before, after, "the change to {file} does nothing");
    fs::write(&path, after).unwrap();
    let error = error(dir);
    assert!(error.contains("tokenizer") && error.contains(word), "{file}: {word:?} is not in: {error}");
    fs::write(&path, before).unwrap();
}
