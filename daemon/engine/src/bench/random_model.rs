//! A model folder of a known model's size with random weights: what speed and memory are measured on, without a
//! download.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use candle_core::DType;
use safetensors::Dtype;
use serde_json::{Value, json};

use super::Shape;
use super::merge::{store, stored_as};
use crate::error::{Error, Result};
use crate::model::Component;

/// Writes the model folder `dir` (which must not exist yet) of `shape`, with random weights stored in `precision`.
/// diffusers and this engine load it like the real one; its vocabulary has bytes and pairs of them.
pub fn write_random_model(shape: Shape, precision: DType, dir: &Path) -> Result<()> {
    let Shape::Sd15 = shape;
    if !matches!(precision, DType::F32 | DType::F16 | DType::BF16) {
        return Err(Error::option("precision", format!("{precision:?}"), "it must be f32, f16 or bf16"));
    }
    let create = |path: &Path| fs::create_dir(path).map_err(|e| Error::io(path, e));
    create(dir)?;
    for folder in ["scheduler", "tokenizer"] {
        create(&dir.join(folder))?;
    }
    write_json(&dir.join("model_index.json"), &model_index())?;
    write_json(&dir.join("scheduler/scheduler_config.json"), &scheduler())?;
    write_tokenizer(&dir.join("tokenizer"))?;
    let components = [
        (Component::TextEncoder, text_encoder_config(), text_encoder_tensors()),
        (Component::UNet, unet_config(), unet_tensors()),
        (Component::Vae, vae_config(), vae_tensors()),
    ];
    for (component, config, tensors) in components {
        let folder = dir.join(component.folder());
        create(&folder)?;
        write_json(&folder.join("config.json"), &config)?;
        let random = |(name, shape): (String, Vec<usize>)| {
            let tensor = RandomTensor::new(&name, shape, precision);
            (name, tensor)
        };
        let tensors: BTreeMap<String, RandomTensor> = tensors.0.into_iter().map(random).collect();
        let path = folder.join(component.weight_file());
        safetensors::serialize_to_file(tensors, None, &path).map_err(|e| Error::invalid_file(&path, e.to_string()))?;
    }
    Ok(())
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    fs::write(path, format!("{value:#}\n")).map_err(|e| Error::io(path, e))
}

/// The vocabulary of CLIP's size: the bytes, the bytes at a word's end, and merges of any two.
fn write_tokenizer(dir: &Path) -> Result<()> {
    let printable = |byte: u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let others = (0..256).filter(|&byte| !printable(byte)).zip(256..).map(|(_, code)| code);
    let bytes: Vec<String> =
        (0..256).filter(|&byte| printable(byte)).chain(others).filter_map(char::from_u32).map(String::from).collect();
    let mut tokens = bytes.clone();
    tokens.extend(bytes.iter().map(|byte| format!("{byte}</w>")));
    let mut merges = String::from("#version: 0.2\n");
    let pairs = bytes.iter().flat_map(|one| bytes.iter().map(move |other| (one, other)));
    for (one, other) in pairs.take(VOCABULARY - 2 - tokens.len()) {
        tokens.push(format!("{one}{other}"));
        merges += &format!("{one} {other}\n");
    }
    tokens.extend(["<|startoftext|>", "<|endoftext|>"].map(String::from));
    let vocabulary: serde_json::Map<String, Value> =
        tokens.into_iter().zip(0..).map(|(token, id)| (token, Value::from(id))).collect();
    write_json(&dir.join("vocab.json"), &vocabulary.into())?;
    let path = dir.join("merges.txt");
    fs::write(&path, merges).map_err(|e| Error::io(path, e))?;
    let special = json!({
        "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    });
    write_json(&dir.join("special_tokens_map.json"), &special)?;
    let config = json!({ "model_max_length": POSITIONS, "tokenizer_class": "CLIPTokenizer" });
    write_json(&dir.join("tokenizer_config.json"), &config)
}

const VOCABULARY: usize = 49_408;
const POSITIONS: usize = 77;
/// Width, layers and MLP width of the text encoder.
const TEXT: (usize, usize, usize) = (768, 12, 3072);
/// Channels of the UNet's resolutions.
const UNET: [usize; 4] = [320, 640, 1280, 1280];
/// Channels of the VAE's resolutions.
const VAE: [usize; 4] = [128, 256, 512, 512];

fn model_index() -> Value {
    json!({
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [null, null],
        "image_encoder": [null, null],
        "requires_safety_checker": false,
        "safety_checker": [null, null],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    })
}

fn scheduler() -> Value {
    json!({
        "_class_name": "DDIMScheduler",
        "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": false,
        "num_train_timesteps": 1000, "prediction_type": "epsilon", "set_alpha_to_one": false, "steps_offset": 1,
    })
}

fn text_encoder_config() -> Value {
    let (width, layers, mlp) = TEXT;
    json!({
        "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "hidden_act": "quick_gelu",
        "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": 12,
        "max_position_embeddings": POSITIONS, "vocab_size": VOCABULARY, "layer_norm_eps": 1e-5,
        "bos_token_id": VOCABULARY - 2, "eos_token_id": VOCABULARY - 1, "pad_token_id": VOCABULARY - 1,
        "projection_dim": width,
    })
}

fn unet_config() -> Value {
    let (down, up) = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D");
    json!({
        "_class_name": "UNet2DConditionModel", "act_fn": "silu", "attention_head_dim": 8,
        "block_out_channels": UNET, "center_input_sample": false, "cross_attention_dim": TEXT.0,
        "down_block_types": [down, down, down, "DownBlock2D"], "up_block_types": ["UpBlock2D", up, up, up],
        "downsample_padding": 1, "flip_sin_to_cos": true, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2,
        "mid_block_scale_factor": 1, "norm_eps": 1e-5, "norm_num_groups": 32, "out_channels": 4, "sample_size": 64,
    })
}

fn vae_config() -> Value {
    json!({
        "_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": VAE,
        "down_block_types": vec!["DownEncoderBlock2D"; 4], "up_block_types": vec!["UpDecoderBlock2D"; 4],
        "in_channels": 3, "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32, "out_channels": 3,
        "sample_size": 512, "scaling_factor": 0.18215,
    })
}

/// Names and shapes.
#[derive(Default)]
struct Tensors(Vec<(String, Vec<usize>)>);

impl Tensors {
    fn add(&mut self, path: &str, shape: &[usize]) {
        self.0.push((path.to_owned(), shape.to_vec()));
    }
    fn norm(&mut self, path: &str, width: usize) {
        self.add(&format!("{path}.weight"), &[width]);
        self.add(&format!("{path}.bias"), &[width]);
    }
    fn linear(&mut self, path: &str, inputs: usize, outputs: usize, bias: bool) {
        self.add(&format!("{path}.weight"), &[outputs, inputs]);
        if bias {
            self.add(&format!("{path}.bias"), &[outputs]);
        }
    }
    fn conv(&mut self, path: &str, inputs: usize, outputs: usize, kernel: usize) {
        self.add(&format!("{path}.weight"), &[outputs, inputs, kernel, kernel]);
        self.add(&format!("{path}.bias"), &[outputs]);
    }
    fn resnet(&mut self, path: &str, inputs: usize, outputs: usize, time: Option<usize>) {
        self.norm(&format!("{path}.norm1"), inputs);
        self.conv(&format!("{path}.conv1"), inputs, outputs, 3);
        if let Some(width) = time {
            self.linear(&format!("{path}.time_emb_proj"), width, outputs, true);
        }
        self.norm(&format!("{path}.norm2"), outputs);
        self.conv(&format!("{path}.conv2"), outputs, outputs, 3);
        if inputs != outputs {
            self.conv(&format!("{path}.conv_shortcut"), inputs, outputs, 1);
        }
    }
    fn transformer(&mut self, path: &str, width: usize) {
        self.norm(&format!("{path}.norm"), width);
        self.conv(&format!("{path}.proj_in"), width, width, 1);
        let block = format!("{path}.transformer_blocks.0");
        for (attention, context) in [("attn1", width), ("attn2", TEXT.0)] {
            for (linear, inputs) in [("to_q", width), ("to_k", context), ("to_v", context)] {
                self.linear(&format!("{block}.{attention}.{linear}"), inputs, width, false);
            }
            self.linear(&format!("{block}.{attention}.to_out.0"), width, width, true);
        }
        for norm in ["norm1", "norm2", "norm3"] {
            self.norm(&format!("{block}.{norm}"), width);
        }
        self.linear(&format!("{block}.ff.net.0.proj"), width, 8 * width, true);
        self.linear(&format!("{block}.ff.net.2"), 4 * width, width, true);
        self.conv(&format!("{path}.proj_out"), width, width, 1);
    }
}

fn text_encoder_tensors() -> Tensors {
    let (width, layers, mlp) = TEXT;
    let mut tensors = Tensors::default();
    tensors.add("text_model.embeddings.token_embedding.weight", &[VOCABULARY, width]);
    tensors.add("text_model.embeddings.position_embedding.weight", &[POSITIONS, width]);
    for layer in 0..layers {
        let path = format!("text_model.encoder.layers.{layer}");
        for linear in ["q_proj", "k_proj", "v_proj", "out_proj"] {
            tensors.linear(&format!("{path}.self_attn.{linear}"), width, width, true);
        }
        tensors.linear(&format!("{path}.mlp.fc1"), width, mlp, true);
        tensors.linear(&format!("{path}.mlp.fc2"), mlp, width, true);
        tensors.norm(&format!("{path}.layer_norm1"), width);
        tensors.norm(&format!("{path}.layer_norm2"), width);
    }
    tensors.norm("text_model.final_layer_norm", width);
    tensors
}

fn unet_tensors() -> Tensors {
    let time = 4 * UNET[0];
    let mut tensors = Tensors::default();
    tensors.conv("conv_in", 4, UNET[0], 3);
    tensors.linear("time_embedding.linear_1", UNET[0], time, true);
    tensors.linear("time_embedding.linear_2", time, time, true);
    let mut skips = vec![UNET[0]];
    let mut inputs = UNET[0];
    for (block, outputs) in UNET.into_iter().enumerate() {
        for layer in 0..2 {
            tensors.resnet(&format!("down_blocks.{block}.resnets.{layer}"), inputs, outputs, Some(time));
            if block < 3 {
                tensors.transformer(&format!("down_blocks.{block}.attentions.{layer}"), outputs);
            }
            inputs = outputs;
            skips.push(outputs);
        }
        if block < 3 {
            tensors.conv(&format!("down_blocks.{block}.downsamplers.0.conv"), outputs, outputs, 3);
            skips.push(outputs);
        }
    }
    tensors.resnet("mid_block.resnets.0", inputs, inputs, Some(time));
    tensors.transformer("mid_block.attentions.0", inputs);
    tensors.resnet("mid_block.resnets.1", inputs, inputs, Some(time));
    for (block, outputs) in UNET.into_iter().rev().enumerate() {
        for layer in 0..3 {
            let skip = skips.pop().unwrap_or_default();
            tensors.resnet(&format!("up_blocks.{block}.resnets.{layer}"), inputs + skip, outputs, Some(time));
            if block > 0 {
                tensors.transformer(&format!("up_blocks.{block}.attentions.{layer}"), outputs);
            }
            inputs = outputs;
        }
        if block < 3 {
            tensors.conv(&format!("up_blocks.{block}.upsamplers.0.conv"), outputs, outputs, 3);
        }
    }
    tensors.norm("conv_norm_out", inputs);
    tensors.conv("conv_out", inputs, 4, 3);
    tensors
}

fn vae_tensors() -> Tensors {
    let mut tensors = Tensors::default();
    let last = VAE[VAE.len() - 1];
    let middle = |tensors: &mut Tensors, side: &str| {
        let path = format!("{side}.mid_block");
        tensors.resnet(&format!("{path}.resnets.0"), last, last, None);
        tensors.norm(&format!("{path}.attentions.0.group_norm"), last);
        for linear in ["to_q", "to_k", "to_v", "to_out.0"] {
            tensors.linear(&format!("{path}.attentions.0.{linear}"), last, last, true);
        }
        tensors.resnet(&format!("{path}.resnets.1"), last, last, None);
    };
    tensors.conv("encoder.conv_in", 3, VAE[0], 3);
    let mut inputs = VAE[0];
    for (block, outputs) in VAE.into_iter().enumerate() {
        for layer in 0..2 {
            tensors.resnet(&format!("encoder.down_blocks.{block}.resnets.{layer}"), inputs, outputs, None);
            inputs = outputs;
        }
        if block < 3 {
            tensors.conv(&format!("encoder.down_blocks.{block}.downsamplers.0.conv"), outputs, outputs, 3);
        }
    }
    middle(&mut tensors, "encoder");
    tensors.norm("encoder.conv_norm_out", last);
    tensors.conv("encoder.conv_out", last, 8, 3);
    tensors.conv("quant_conv", 8, 8, 1);
    tensors.conv("post_quant_conv", 4, 4, 1);
    tensors.conv("decoder.conv_in", 4, last, 3);
    middle(&mut tensors, "decoder");
    for (block, outputs) in VAE.into_iter().rev().enumerate() {
        for layer in 0..3 {
            tensors.resnet(&format!("decoder.up_blocks.{block}.resnets.{layer}"), inputs, outputs, None);
            inputs = outputs;
        }
        if block < 3 {
            tensors.conv(&format!("decoder.up_blocks.{block}.upsamplers.0.conv"), outputs, outputs, 3);
        }
    }
    tensors.norm("decoder.conv_norm_out", inputs);
    tensors.conv("decoder.conv_out", inputs, 3, 3);
    tensors
}

/// Random values, made when they are written: uniform, of variance 1 / inputs for a weight; 1 for a norm's scale.
struct RandomTensor {
    seed: u64,
    scale: f32,
    offset: f32,
    shape: Vec<usize>,
    precision: DType,
}

impl RandomTensor {
    fn new(name: &str, shape: Vec<usize>, precision: DType) -> Self {
        let seed = name.bytes().fold(17, |seed: u64, byte| seed.wrapping_mul(31).wrapping_add(u64::from(byte)));
        let inputs: usize = shape[1..].iter().product();
        let is_norm = shape.len() == 1 && name.contains("norm") && name.ends_with("weight");
        let scale = match shape.len() {
            1 => 0.05,
            _ if name.contains("embedding.weight") => 0.05,
            _ => (3.0 / inputs as f32).sqrt(),
        };
        Self { seed, scale, offset: if is_norm { 1.0 } else { 0.0 }, shape, precision }
    }
}

impl safetensors::View for RandomTensor {
    fn dtype(&self) -> Dtype {
        stored_as(self.precision)
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        let mut state = self.seed;
        let mut bytes = Vec::with_capacity(self.data_len());
        for _ in 0..self.shape.iter().product::<usize>() {
            // Knuth's MMIX generator; its upper bits are random enough.
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let unit = (state >> 40) as f32 / (1 << 23) as f32 - 1.0;
            store(self.offset + self.scale * unit, self.precision, &mut bytes);
        }
        bytes.into()
    }
    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.precision.size_in_bytes()
    }
}
