//! Adapters as files for other tools: kohya, diffusers, PEFT and textual inversion.
//!
//! B is scattered to all m rows, so that the delta is the same; none of these formats knows partitions, slots or
//! layer-wise tokens. Factors keep their storage type.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::json;

use crate::adapter::{Adapter, LayerFactors};
use crate::builder::write_atomically;
use crate::dtype::Storage;
use crate::error::{Error, Result};
use crate::{header, limits};

/// Tensors to be written, and the header's metadata.
#[derive(Default)]
struct File {
    tensors: BTreeMap<String, (Storage, Vec<usize>, Vec<u8>)>,
    metadata: BTreeMap<&'static str, String>,
}

impl File {
    fn insert(&mut self, name: String, storage: Storage, shape: Vec<usize>, values: &[f32]) {
        let mut bytes = Vec::with_capacity(values.len() * storage.size());
        storage.encode(values, &mut bytes);
        self.tensors.insert(name, (storage, shape, bytes));
    }

    fn write(self, path: &Path) -> Result<()> {
        let mut tensors: Vec<_> = self
            .tensors
            .iter()
            .map(|(name, (storage, shape, bytes))| (&**name, *storage, &**shape, &**bytes))
            .collect();
        // Wide types first keeps every tensor aligned.
        tensors.sort_by_key(|(_, storage, ..)| std::cmp::Reverse(storage.size()));
        write_atomically(path, &header::write(path, &self.metadata, &tensors)?)
    }
}

/// What of a layer goes into a file: names of its two tensors, and the factor that is folded into B.
struct Names {
    a: String,
    b: String,
}

/// Adds A and scale * B, scattered, of every layer that `names` gives names for. A scale other than 1 is folded in
/// f32, which the file then stores.
fn add_factors(file: &mut File, adapter: &Adapter, scale: f32, names: impl Fn(&LayerFactors) -> Option<Names>) {
    for layer in adapter.layers() {
        let Some(Names { a, b }) = names(layer) else { continue };
        let [storage_a, storage_b] = [layer.entries[0].dtype, layer.entries[1].dtype];
        let storage_b = if scale == 1.0 { storage_b } else { Storage::F32 };
        let mut full = layer.b_scattered();
        full.iter_mut().for_each(|x| *x *= scale);
        file.insert(a, storage_a, vec![layer.rank, layer.columns], &layer.a());
        file.insert(b, storage_b, vec![layer.outputs, layer.rank], &full);
    }
}

/// Fails if there is nothing to export, or if the scattered factors would be larger than any adapter file.
fn check(adapter: &Adapter, format: &'static str) -> Result<()> {
    let fail = |reason: String| Err(Error::Export { path: adapter.path().into(), format, reason });
    if adapter.layers().is_empty() {
        return fail("it changes no layer".into());
    }
    let bytes: u64 = adapter.layers().iter().map(|l| 4 * (l.rank * (l.outputs + l.columns)) as u64).sum();
    if bytes > limits::FILE_BYTES_MAX {
        return fail(format!("its factors would take {bytes} bytes, at most {}", limits::FILE_BYTES_MAX));
    }
    Ok(())
}

/// The alpha of a format whose delta is alpha / r B A.
fn alpha_over_rank(adapter: &Adapter) -> f32 {
    match adapter.manifest().delta {
        crate::Delta::Alpha => adapter.manifest().alpha * adapter.manifest().rank as f32,
        crate::Delta::AlphaOverRank => adapter.manifest().alpha,
    }
}

/// Writes a file in the layout of kohya's sd-scripts, which nearly every tool reads: `lora_unet_...` and `lora_te_...`
/// (`lora_te1_...`, `lora_te2_...` where there are two text encoders), each with its `alpha`; delta = alpha / r B A.
///
/// Fails if the adapter changes no layer.
pub fn kohya(adapter: &Adapter, path: impl AsRef<Path>) -> Result<()> {
    check(adapter, "kohya")?;
    let two_encoders = adapter.layers().iter().any(|l| l.name.starts_with("text_encoder_2."));
    let module = |layer: &LayerFactors| {
        let (part, module) = layer.name.split_once('.').unwrap_or_default();
        let part = match part {
            "text_encoder_2" => "te2",
            "text_encoder" if two_encoders => "te1",
            "text_encoder" => "te",
            _ => "unet",
        };
        format!("lora_{part}_{}", module.replace('.', "_"))
    };
    let mut seen = BTreeMap::new();
    for layer in adapter.layers() {
        // Dots and underscores become one, so that two names may.
        if let Some(other) = seen.insert(module(layer), &layer.name) {
            let reason = format!("the layers {other:?} and {:?} would have one name", layer.name);
            return Err(Error::Export { path: adapter.path().into(), format: "kohya", reason });
        }
    }
    let alpha = alpha_over_rank(adapter);
    let mut file = File::default();
    add_factors(&mut file, adapter, 1.0, |layer| {
        let module = module(layer);
        Some(Names { a: format!("{module}.lora_down.weight"), b: format!("{module}.lora_up.weight") })
    });
    for layer in adapter.layers() {
        file.insert(format!("{}.alpha", module(layer)), Storage::F32, vec![], &[alpha]);
    }
    let manifest = adapter.manifest();
    file.metadata = BTreeMap::from([
        ("ss_network_module", "networks.lora".into()),
        ("ss_network_dim", manifest.rank.to_string()),
        ("ss_network_alpha", alpha.to_string()),
        ("ss_seed", manifest.training.seed.to_string()),
        ("ss_steps", manifest.training.steps.to_string()),
        ("modelspec.title", manifest.name.clone()),
    ]);
    if let Some(licence) = &manifest.licence {
        file.metadata.insert("modelspec.license", licence.clone());
    }
    file.write(path.as_ref())
}

/// Writes a file as diffusers' training scripts do (`pytorch_lora_weights.safetensors`): `unet.<path>.lora.down.weight`
/// and `text_encoder.<path>.lora_linear_layer.down.weight`. The format has no alpha: the scale is folded into B.
///
/// Fails if the adapter changes no layer.
pub fn diffusers(adapter: &Adapter, path: impl AsRef<Path>) -> Result<()> {
    check(adapter, "diffusers")?;
    let mut file = File::default();
    add_factors(&mut file, adapter, adapter.scale(), |layer| {
        let infix = if layer.name.starts_with("unet.") { "lora" } else { "lora_linear_layer" };
        let name = &layer.name;
        Some(Names { a: format!("{name}.{infix}.down.weight"), b: format!("{name}.{infix}.up.weight") })
    });
    file.metadata.insert("format", "pt".into());
    file.write(path.as_ref())
}

/// Writes one PEFT folder (`adapter_model.safetensors`, `adapter_config.json`) for each part of the model that the
/// adapter changes: `<folder>/unet`, `<folder>/text_encoder`, `<folder>/text_encoder_2`; returns them.
/// delta = lora_alpha / r B A.
///
/// Fails if the adapter changes no layer.
pub fn peft(adapter: &Adapter, folder: impl AsRef<Path>) -> Result<Vec<PathBuf>> {
    check(adapter, "PEFT")?;
    let mut folders = Vec::new();
    for part in ["text_encoder", "text_encoder_2", "unet"] {
        let module = |layer: &LayerFactors| match layer.name.split_once('.') {
            Some((p, module)) if p == part => Some(module.to_owned()),
            _ => None,
        };
        // PEFT matches the ends of names: without the first part they fit CLIP in older and newer transformers.
        let target = |name: String| name.strip_prefix("text_model.").map_or(name.clone(), str::to_owned);
        let modules: Vec<String> = adapter.layers().iter().filter_map(module).map(target).collect();
        if modules.is_empty() {
            continue;
        }
        let mut file = File::default();
        add_factors(&mut file, adapter, 1.0, |layer| {
            let name = format!("base_model.model.{}", module(layer)?);
            Some(Names { a: format!("{name}.lora_A.weight"), b: format!("{name}.lora_B.weight") })
        });
        file.metadata.insert("format", "pt".into());
        let config = json!({
            "peft_type": "LORA",
            "r": adapter.manifest().rank,
            "lora_alpha": alpha_over_rank(adapter),
            "target_modules": modules,
            "lora_dropout": 0.0,
            "bias": "none",
            "use_rslora": false,
            "use_dora": false,
            "fan_in_fan_out": false,
            "inference_mode": true,
        });
        let out = folder.as_ref().join(part);
        std::fs::create_dir_all(&out).map_err(|e| Error::io(&out, e))?;
        file.write(&out.join("adapter_model.safetensors"))?;
        write_atomically(out.join("adapter_config.json"), format!("{config:#}\n").as_bytes())?;
        folders.push(out);
    }
    Ok(folders)
}

/// Writes the concept's tokens as one textual inversion: the key `<name>` and one vector per token, [tokens, d].
/// diffusers puts the vectors where a prompt says `<name>`, as this project does; tools that call an embedding by its file
/// (AUTOMATIC1111's, ComfyUI) do so where a prompt says the file's name without its ending.
///
/// Fails if there are no tokens, or if they are layer-wise: other tools give every cross-attention layer the same
/// vectors.
pub fn textual_inversion(adapter: &Adapter, path: impl AsRef<Path>) -> Result<()> {
    let fail = |reason: String| Err(Error::Export { path: adapter.path().into(), format: "textual inversion", reason });
    let tokens = adapter.tokens();
    let Some(first) = tokens.first() else {
        return fail("it has no tokens".into());
    };
    if let Some(token) = tokens.iter().find(|t| t.layers != 1) {
        let reason = "other tools know one vector for all layers; train with plain tokens";
        return fail(format!("token {:?} is layer-wise ({} vectors): {reason}", token.name, token.layers));
    }
    let values: Vec<f32> = tokens.iter().flat_map(|t| t.values.iter().copied()).collect();
    let mut file = File::default();
    file.insert(format!("<{}>", adapter.manifest().name), Storage::F32, vec![tokens.len(), first.width], &values);
    file.write(path.as_ref())
}
