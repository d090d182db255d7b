//! Small models in the layouts of tests/golden/model, with the weights that make_golden.py gives them.
#![allow(clippy::unwrap_used, dead_code)]

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use safetensors::{Dtype, tensor::TensorView};
use serde_json::Value;

pub fn golden_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/model")
}

/// What PyTorch computed on `layout`.
pub fn golden(layout: &str) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(golden_folder().join(layout).join("golden.safetensors"), &Device::Cpu).unwrap()
}

/// Uniform numbers in [-1, 1): the top 24 bits of splitmix64, seeded with FNV-1a of `name`.
pub fn values(name: &str, count: usize) -> Vec<f32> {
    let seed = name
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ byte as u64).wrapping_mul(0x0000_0100_0000_01b3));
    (1..=count as u64)
        .map(|index| {
            let mut z = seed.wrapping_add(index.wrapping_mul(0x9e37_79b9_7f4a_7c15));
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^= z >> 31;
            (z >> 40) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

/// [`values`] as a tensor of `shape`.
pub fn tensor(name: &str, shape: &[usize]) -> Tensor {
    Tensor::from_vec(values(name, shape.iter().product()), shape, &Device::Cpu).unwrap()
}

/// The values of a weight: see `values` in make_golden.py.
fn weight(name: &str, shape: &[usize]) -> Vec<f32> {
    let mut x = values(name, shape.iter().product());
    let inputs: usize = shape[1..].iter().product();
    for x in &mut x {
        if name.contains("embedding.weight") {
            *x *= 0.5;
        } else if shape.len() > 1 {
            *x *= (3.0 / inputs as f32).sqrt();
        } else if name.contains("norm") && name.ends_with(".weight") {
            *x = 1.0 + *x * 0.2;
        } else {
            *x *= 0.1;
        }
    }
    x
}

fn flatten(path: &str, tree: &Value, out: &mut Vec<(String, Vec<usize>)>) {
    match tree {
        Value::Object(children) => {
            for (name, child) in children {
                flatten(&if path.is_empty() { name.clone() } else { format!("{path}.{name}") }, child, out);
            }
        }
        shape => out.push((path.to_owned(), serde_json::from_value(shape.clone()).unwrap())),
    }
}

pub fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() { copy_folder(&path, &target) } else { assert!(fs::copy(&path, &target).unwrap() > 0) }
    }
}

/// One weight file's tensors: name -> (shape, values).
pub type Weights = Vec<(String, Vec<usize>, Vec<f32>)>;

/// Writes `weights` in `dtype`, with the metadata that Python wants.
pub fn write_weights(path: &Path, weights: &Weights, dtype: DType) {
    let stored = match dtype {
        DType::F32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
        other => panic!("{other:?}"),
    };
    let bytes: Vec<Vec<u8>> = weights
        .iter()
        .map(|(_, _, values)| {
            let mut bytes = Vec::new();
            let tensor = Tensor::from_slice(values, values.len(), &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
            tensor.write_bytes(&mut bytes).unwrap();
            bytes
        })
        .collect();
    let views = weights
        .iter()
        .zip(&bytes)
        .map(|((name, shape, _), bytes)| (name, TensorView::new(stored, shape.clone(), bytes).unwrap()));
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    fs::write(path, safetensors::serialize(views, Some(metadata)).unwrap()).unwrap();
}

/// The weights of one component of `layout`.
pub fn weights(layout: &str, component: &str) -> Weights {
    let shapes = fs::read(golden_folder().join(layout).join("shapes.json")).unwrap();
    let shapes: Value = serde_json::from_slice(&shapes).unwrap();
    let mut names = Vec::new();
    flatten("", &shapes[component], &mut names);
    let fill = |(name, shape): (String, Vec<usize>)| {
        let values = weight(&format!("{component}.{name}"), &shape);
        (name, shape, values)
    };
    names.into_iter().map(fill).collect()
}

pub fn weight_path(dir: &Path, component: &str) -> PathBuf {
    let name = if component == "text_encoder" { "model" } else { "diffusion_pytorch_model" };
    dir.join(component).join(format!("{name}.safetensors"))
}

/// A model folder of `layout` with its weights stored in `dtype`.
pub fn model_folder(layout: &str, dtype: DType) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    copy_folder(&golden_folder().join(layout), dir.path());
    for component in ["text_encoder", "unet", "vae"] {
        write_weights(&weight_path(dir.path(), component), &weights(layout, component), dtype);
    }
    dir
}

/// Largest absolute difference.
#[track_caller]
pub fn max_diff(a: &Tensor, b: &Tensor) -> f32 {
    assert_eq!(a.dims(), b.dims());
    let values = |x: &Tensor| x.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let diffs = values(a).into_iter().zip(values(b)).map(|(a, b)| (a - b).abs());
    // NaN must not pass for a small difference.
    diffs.fold(0.0, |max, diff| if diff.is_nan() || diff > max { diff } else { max })
}
