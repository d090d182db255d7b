//! Saving a model: what is merged in is written, everything else keeps its bytes, and nothing appears half.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use blocklora_engine::model::Model;
use blocklora_engine::nn::{Conditioning, Forward, LayerId};
use blocklora_engine::text;
use candle_core::{DType, Device, Tensor};
use support::*;

fn load(dir: &Path, precision: DType) -> Model {
    Model::load(dir, &Device::Cpu, precision).unwrap()
}

/// All files below `dir` with their contents.
fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    fn walk(root: &Path, dir: &Path, out: &mut BTreeMap<String, Vec<u8>>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(root, &path, out);
            } else {
                let name = path.strip_prefix(root).unwrap().to_string_lossy().into_owned();
                out.insert(name, fs::read(&path).unwrap());
            }
        }
    }
    let mut out = BTreeMap::new();
    walk(dir, dir, &mut out);
    out
}

/// Adds `by` times a formula to the live weight of `layer`, in place as merging does.
fn change(model: &Model, layer: LayerId, by: f64) {
    let live = model.live(layer);
    let delta = (tensor(&format!("delta {}", layer.0), live.dims()) * by).unwrap();
    let merged = (live.to_dtype(DType::F32).unwrap() + delta).unwrap().to_dtype(live.dtype()).unwrap();
    live.slice_set(&merged, 0, 0).unwrap();
}

fn output(model: &Model) -> Tensor {
    let context = text::encode(model, &["a photo of the cat"], &[], &Forward::default()).unwrap();
    let latents = tensor("latents", &[1, 8, 8, 8]);
    model.unet().forward(&latents, &[500.0], &context, &Forward::default()).unwrap()
}

#[test]
fn an_unchanged_model_keeps_every_byte() {
    for precision in [DType::F32, DType::F16, DType::BF16] {
        let source = model_folder("starter", DType::F16);
        fs::write(source.path().join("LICENSE.md"), "a licence").unwrap();
        fs::write(source.path().join("whole-model.ckpt"), "not part of the folder").unwrap();
        fs::write(source.path().join("unet/diffusion_pytorch_model.bin"), "another variant").unwrap();
        let out = tempfile::tempdir().unwrap();
        let saved = out.path().join("saved");
        load(source.path(), precision).save(&saved).unwrap();
        let mut expected = files(source.path());
        for gone in ["whole-model.ckpt", "unet/diffusion_pytorch_model.bin", "shapes.json", "golden.safetensors"] {
            expected.remove(gone).unwrap();
        }
        let saved_files = files(&saved);
        assert_eq!(saved_files.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
        assert!(saved_files == expected, "{precision:?}: some file's content changed");
        assert_eq!(fs::read_dir(out.path()).unwrap().count(), 1, "something is left beside the folder");
    }
}

#[test]
fn merged_layers_are_written_in_the_stored_type() {
    for (stored, precision) in [(DType::F32, DType::F32), (DType::F16, DType::F32), (DType::F32, DType::F16)] {
        let source = model_folder("starter", stored);
        let model = load(source.path(), precision);
        let to_q = model.layer("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q").unwrap();
        let q_proj = model.layer("text_encoder.text_model.encoder.layers.1.self_attn.q_proj").unwrap();
        let before = output(&model);
        change(&model, to_q, 0.5);
        change(&model, q_proj, 0.5);
        let after = output(&model);
        assert!(max_diff(&before, &after) > 1e-3, "the forward pass does not read the changed weights");

        let out = tempfile::tempdir().unwrap();
        // An empty folder may be there already.
        model.save(out.path()).unwrap();
        let saved = load(out.path(), stored);
        for id in (0..model.layers().len()).map(LayerId) {
            let name = &model.layers()[id.0].name;
            if id == to_q || id == q_proj {
                let live = model.live(id).to_dtype(stored).unwrap();
                assert_eq!(max_diff(saved.live(id), &live), 0.0, "{name}");
                assert_ne!(saved.pristine(id).bytes(), model.pristine(id).bytes(), "{name}");
            } else {
                assert_eq!(saved.pristine(id).bytes(), model.pristine(id).bytes(), "{name}");
            }
        }
        assert_eq!(files(out.path())["vae/diffusion_pytorch_model.safetensors"], {
            fs::read(weight_path(source.path(), "vae")).unwrap()
        });
        let tolerance = if (stored, precision) == (DType::F32, DType::F32) { 0.0 } else { 5e-3 };
        let diff = max_diff(&output(&saved), &after);
        assert!(diff <= tolerance, "{stored:?} held in {precision:?}: {diff}");
    }
}

#[test]
fn half_variants_are_saved_under_the_plain_name() {
    let source = model_folder("starter", DType::F16);
    for component in ["unet", "vae", "text_encoder"] {
        let path = weight_path(source.path(), component);
        fs::rename(&path, path.with_extension("fp16.safetensors")).unwrap();
    }
    let model = load(source.path(), DType::F32);
    let out = tempfile::tempdir().unwrap();
    model.save(&out.path().join("saved")).unwrap();
    let saved = load(&out.path().join("saved"), DType::F32);
    assert_eq!(saved.digest(), model.digest());
    assert!(!files(out.path()).keys().any(|name| name.contains("fp16")));
}

#[test]
fn nothing_is_left_when_saving_fails() {
    let source = model_folder("starter", DType::F16);
    let model = load(source.path(), DType::F32);
    let out = tempfile::tempdir().unwrap();

    let taken = out.path().join("taken");
    fs::create_dir(&taken).unwrap();
    fs::write(taken.join("file"), "mine").unwrap();
    let error = model.save(&taken).unwrap_err().to_string();
    assert!(error.contains("taken") && error.contains("not empty"), "{error}");
    assert_eq!(files(&taken).len(), 1);
    let error = model.save(&taken.join("file")).unwrap_err().to_string();
    assert!(error.contains("taken/file"), "{error}");
    let error = model.save(&out.path().join("no/such/parent")).unwrap_err().to_string();
    assert!(error.contains("no/such") && error.contains("does not exist"), "{error}");

    // 1e6 is finite in f32, but the file stores f16.
    let layer = model.layer("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q").unwrap();
    change(&model, layer, 1e6);
    let error = model.save(&out.path().join("saved")).unwrap_err().to_string();
    assert!(error.contains("mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"), "{error}");
    assert!(error.contains("not finite in F16"), "{error}");
    assert_eq!(files(out.path()).len(), 1, "something is left");
    assert_eq!(fs::read_dir(out.path()).unwrap().count(), 1, "a folder is left");
}

/// Conditioning of a batch: what guidance puts together it can take apart.
#[test]
fn conditionings_are_put_together_along_the_batch() {
    let [a, b] = ["a", "b"].map(|name| tensor(name, &[2, 3, 4]));
    let shared = Conditioning::Shared(a.clone());
    let layer_wise = Conditioning::LayerWise(vec![b.clone(), a.clone()]);
    let both = Conditioning::cat(&[&shared, &layer_wise]).unwrap();
    assert_eq!(both.batch().unwrap(), 4);
    assert_eq!(max_diff(both.narrow(0, 2).unwrap().layer(1).unwrap(), &a), 0.0);
    assert_eq!(max_diff(both.narrow(2, 2).unwrap().layer(0).unwrap(), &b), 0.0);
    assert_eq!(max_diff(both.narrow(2, 2).unwrap().layer(1).unwrap(), &a), 0.0);
    assert!(matches!(Conditioning::cat(&[&shared, &shared]).unwrap(), Conditioning::Shared(x) if x.dims()[0] == 4));
}
