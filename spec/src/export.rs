//! Adapters as files for other tools: kohya, diffusers, PEFT and textual inversion.
//!
//! B is scattered to all m rows, so that the delta is the same; none of these formats knows partitions, slots or
//! layer-wise tokens. Factors keep their storage type. A few owned rows become a large file, which is written block by
//! block: [`files`] gives what can be written to anything, the other functions write to paths.

mod file;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::json;

use crate::adapter::{Adapter, LayerFactors};
use crate::error::{Error, Result};
use crate::format::Format;
use file::Draft;
pub use file::File;

/// The adapter as files of a format: one, or for [`Format::Peft`] two in a folder for each part of the model. Fails
/// where the format cannot hold the adapter, before anything is written.
pub fn files(adapter: &Adapter, format: Format) -> Result<Vec<File<'_>>> {
    match format {
        Format::Kohya => Ok(vec![kohya_file(adapter)?]),
        Format::Diffusers => Ok(vec![diffusers_file(adapter)?]),
        Format::Peft => Ok(peft_files(adapter)?.into_iter().flat_map(|(_, files)| files).collect()),
        Format::TextualInversion => Ok(vec![textual_inversion_file(adapter)?]),
    }
}

/// Writes a file in the layout of kohya's sd-scripts, which nearly every tool reads: `lora_unet_...` and `lora_te_...`
/// (`lora_te1_...`, `lora_te2_...` where there are two text encoders), each with its `alpha`; delta = alpha / r B A.
///
/// Fails if the adapter changes no layer, and if the alpha is not finite.
pub fn kohya(adapter: &Adapter, path: impl AsRef<Path>) -> Result<()> {
    kohya_file(adapter)?.write_at(path.as_ref())
}

/// Writes a file as diffusers' training scripts do (`pytorch_lora_weights.safetensors`): `unet.<path>.lora.down.weight`
/// and `text_encoder.<path>.lora_linear_layer.down.weight`. The format has no alpha: the scale is folded into B.
///
/// Fails if the adapter changes no layer, and if a folded number is not finite.
pub fn diffusers(adapter: &Adapter, path: impl AsRef<Path>) -> Result<()> {
    diffusers_file(adapter)?.write_at(path.as_ref())
}

/// Writes one PEFT folder (`adapter_model.safetensors`, `adapter_config.json`) for each part of the model that the
/// adapter changes: `<folder>/unet`, `<folder>/text_encoder`, `<folder>/text_encoder_2`; returns them.
/// delta = lora_alpha / r B A.
///
/// Fails if the adapter changes no layer, and if lora_alpha is not finite.
pub fn peft(adapter: &Adapter, folder: impl AsRef<Path>) -> Result<Vec<PathBuf>> {
    let folder = folder.as_ref();
    let mut folders = Vec::new();
    for (part, files) in peft_files(adapter)? {
        let out = folder.join(part);
        std::fs::create_dir_all(&out).map_err(|e| Error::io(&out, e))?;
        files.iter().try_for_each(|file| file.write_at(&folder.join(file.name())))?;
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
    textual_inversion_file(adapter)?.write_at(path.as_ref())
}

fn fail<T>(adapter: &Adapter, format: Format, reason: impl Into<String>) -> Result<T> {
    Err(Error::Export { path: adapter.path().into(), format: format.title(), reason: reason.into() })
}

fn file_name(adapter: &Adapter) -> String {
    format!("{}.safetensors", adapter.manifest().name)
}

fn check_layers(adapter: &Adapter, format: Format) -> Result<()> {
    if adapter.layers().is_empty() { fail(adapter, format, "it changes no layer") } else { Ok(()) }
}

/// The alpha of a format whose delta is alpha / r B A.
fn alpha_over_rank(adapter: &Adapter, format: Format) -> Result<f32> {
    let (alpha, rank) = (adapter.manifest().alpha, adapter.manifest().rank);
    let product = match adapter.manifest().delta {
        crate::Delta::Alpha => alpha * rank as f32,
        crate::Delta::AlphaOverRank => alpha,
    };
    if product.is_finite() {
        return Ok(product);
    }
    let reason =
        format!("alpha {alpha:e} times rank {rank} is not a finite number; train it again with a smaller alpha");
    fail(adapter, format, reason)
}

fn kohya_file(adapter: &Adapter) -> Result<File<'_>> {
    check_layers(adapter, Format::Kohya)?;
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
    let alpha = alpha_over_rank(adapter, Format::Kohya)?;
    let mut draft = Draft::default();
    draft.metadata = kohya_metadata(adapter, alpha);
    let mut seen = BTreeMap::new();
    for layer in adapter.layers() {
        let module = module(layer);
        draft.add_a(&[format!("{module}.lora_down.weight")], layer);
        draft.add_b(&[format!("{module}.lora_up.weight")], layer, 1.0);
        draft.add(format!("{module}.alpha"), vec![], &[alpha]);
        // Dots and underscores become one, so that two names may.
        if let Some(other) = seen.insert(module, &layer.name) {
            let reason = format!("the layers {other:?} and {:?} would have one name", layer.name);
            return fail(adapter, Format::Kohya, reason);
        }
    }
    draft.file(file_name(adapter), adapter, Format::Kohya)
}

/// The architecture of Stable Diffusion 1.x in a manifest, which is the engine's name for the shape of its layers.
const SD_1: &str = "stable-diffusion/unet-320-640-1280-1280x2-2-2-2-attn16-ctx768/clip-768x12";

/// What sd-scripts' own files say of themselves, as far as it is known of this one.
fn kohya_metadata(adapter: &Adapter, alpha: f32) -> BTreeMap<&'static str, String> {
    let manifest = adapter.manifest();
    let mut metadata = BTreeMap::from([
        ("ss_network_module", "networks.lora".to_owned()),
        ("ss_network_dim", manifest.rank.to_string()),
        ("ss_network_alpha", alpha.to_string()),
        ("ss_output_name", manifest.name.clone()),
        ("ss_seed", manifest.training.seed.to_string()),
        ("ss_steps", manifest.training.steps.to_string()),
    ]);
    // ModelSpec 1.0.1 has four keys that must be there together, and names for the models that everybody knows: of
    // another one nothing is said.
    if manifest.base.architecture != SD_1 {
        return metadata;
    }
    metadata.extend([
        ("ss_base_model_version", "sd_v1".to_owned()),
        ("modelspec.sai_model_spec", "1.0.1".to_owned()),
        ("modelspec.architecture", "stable-diffusion-v1/lora".to_owned()),
        // Whose names of modules these are.
        ("modelspec.implementation", "diffusers".to_owned()),
        ("modelspec.title", manifest.name.clone()),
    ]);
    // Layer-wise words exist here only, so that there is no phrase for other tools.
    if !adapter.tokens().is_empty() && adapter.tokens().iter().all(|t| t.layers == 1) {
        metadata.insert("modelspec.trigger_phrase", format!("<{}>", manifest.name));
    }
    metadata.extend(manifest.licence.clone().map(|licence| ("modelspec.license", licence)));
    metadata.extend(manifest.created.clone().map(|created| ("modelspec.date", created)));
    metadata
}

fn diffusers_file(adapter: &Adapter) -> Result<File<'_>> {
    check_layers(adapter, Format::Diffusers)?;
    let scale = adapter.scale();
    let mut draft = Draft::default();
    for layer in adapter.layers() {
        let name = &layer.name;
        let mut folded = layer.bytes_of_b_rows().flat_map(|row| layer.entries[1].dtype.decode(row)).map(|x| x * scale);
        if let Some(value) = folded.find(|x| !x.is_finite()) {
            let reason = format!(
                "B of the layer {name:?} times the scale {scale:e} is {value}; train it again with a smaller alpha"
            );
            return fail(adapter, Format::Diffusers, reason);
        }
        let infix = if name.starts_with("unet.") { "lora" } else { "lora_linear_layer" };
        draft.add_a(&[format!("{name}.{infix}.down.weight")], layer);
        draft.add_b(&[format!("{name}.{infix}.up.weight")], layer, scale);
    }
    draft.metadata.insert("format", "pt".into());
    draft.file(file_name(adapter), adapter, Format::Diffusers)
}

/// The parts that are changed, and the files of each.
fn peft_files(adapter: &Adapter) -> Result<Vec<(&'static str, Vec<File<'_>>)>> {
    check_layers(adapter, Format::Peft)?;
    let alpha = alpha_over_rank(adapter, Format::Peft)?;
    let mut parts = Vec::new();
    for part in ["text_encoder", "text_encoder_2", "unet"] {
        let mut draft = Draft::default();
        let mut targets = Vec::new();
        for layer in adapter.layers() {
            let Some((_, module)) = layer.name.split_once('.').filter(|(of, _)| *of == part) else { continue };
            // PEFT matches the ends of names: without the first part they fit CLIP in older and newer transformers.
            let short = module.strip_prefix("text_model.").unwrap_or(module);
            targets.push(short.to_owned());
            // Tensors' names it wants whole, and leaves out what no module has. Transformers 5 took `text_model` out of
            // a CLIPTextModel, not out of the one with a projection.
            let modules = match part {
                "text_encoder" => vec![format!("text_model.{short}"), short.to_owned()],
                _ => vec![module.to_owned()],
            };
            let names = |factor: &str| -> Vec<String> {
                modules.iter().map(|module| format!("base_model.model.{module}.{factor}.weight")).collect()
            };
            draft.add_a(&names("lora_A"), layer);
            draft.add_b(&names("lora_B"), layer, 1.0);
        }
        if targets.is_empty() {
            continue;
        }
        draft.metadata.insert("format", "pt".into());
        let config = json!({
            "peft_type": "LORA",
            "r": adapter.manifest().rank,
            "lora_alpha": alpha,
            "target_modules": targets,
            "lora_dropout": 0.0,
            "bias": "none",
            "use_rslora": false,
            "use_dora": false,
            "fan_in_fan_out": false,
            "inference_mode": true,
        });
        let model = draft.file(format!("{part}/adapter_model.safetensors"), adapter, Format::Peft)?;
        let config = File::text(format!("{part}/adapter_config.json"), format!("{config:#}\n"));
        parts.push((part, vec![config, model]));
    }
    Ok(parts)
}

fn textual_inversion_file(adapter: &Adapter) -> Result<File<'_>> {
    let tokens = adapter.tokens();
    let Some(first) = tokens.first() else {
        return fail(adapter, Format::TextualInversion, "it has no tokens");
    };
    if let Some(token) = tokens.iter().find(|t| t.layers != 1) {
        let reason = "other tools know one vector for all layers; train with plain tokens";
        let reason = format!("token {:?} is layer-wise ({} vectors): {reason}", token.name, token.layers);
        return fail(adapter, Format::TextualInversion, reason);
    }
    let values: Vec<f32> = tokens.iter().flat_map(|t| t.values.iter().copied()).collect();
    let mut draft = Draft::default();
    draft.add(format!("<{}>", adapter.manifest().name), vec![tokens.len(), first.width], &values);
    draft.file(file_name(adapter), adapter, Format::TextualInversion)
}
