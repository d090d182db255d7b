//! Whole pictures, sampled by plugins, equal diffusers' on a tiny random model (tests/parity/make_pipeline_golden.py).
#![allow(clippy::unwrap_used)]

mod support;

use std::path::{Path, PathBuf};

use blocklora_engine::generate::{GenerateRequest, generate, generate_batch};
use blocklora_engine::image::{AdapterUse, Picture, read_parameters};
use blocklora_engine::model::Model;
use blocklora_engine::sample::Sampler;
use blocklora_engine::text::{Concept, TokenVectors};
use blocklora_engine::{DType, Device, Error, Result};
use support::sampler;

#[derive(serde::Deserialize)]
struct Case {
    sampler: String,
    prompt: String,
    negative: String,
    steps: usize,
    guidance: f32,
    seed: u64,
    width: usize,
    height: usize,
    prediction: String,
    pixels: String,
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/pipeline")
}

fn model() -> Model {
    Model::load(&folder(), &Device::Cpu, DType::F32).unwrap()
}

/// The same model, predicting v.
fn v_model() -> Model {
    let copy = tempfile::tempdir().unwrap();
    for part in ["tokenizer", "text_encoder", "unet", "vae", "scheduler"] {
        std::fs::create_dir(copy.path().join(part)).unwrap();
        for entry in std::fs::read_dir(folder().join(part)).unwrap() {
            let path = entry.unwrap().path();
            std::fs::copy(&path, copy.path().join(part).join(path.file_name().unwrap())).unwrap();
        }
    }
    std::fs::copy(folder().join("model_index.json"), copy.path().join("model_index.json")).unwrap();
    let path = copy.path().join("scheduler/scheduler_config.json");
    let config = std::fs::read_to_string(&path).unwrap();
    assert!(config.contains("\"epsilon\""));
    std::fs::write(&path, config.replace("\"epsilon\"", "\"v_prediction\"")).unwrap();
    Model::load(copy.path(), &Device::Cpu, DType::F32).unwrap()
}

fn request<'a>(sampler: &'a dyn Sampler) -> GenerateRequest<'a> {
    GenerateRequest {
        prompt: "a photo of a cat",
        negative_prompt: "",
        concepts: &[],
        steps: 4,
        guidance_scale: 7.5,
        sampler,
        seed: 3,
        width: 16,
        height: 16,
        count: 1,
    }
}

fn quiet(model: &Model, request: &GenerateRequest) -> Result<Vec<Picture>> {
    generate(model, request, &mut |_| Ok(()))
}

#[test]
fn pictures_equal_diffusers() {
    let cases: Vec<Case> =
        serde_json::from_str(&std::fs::read_to_string(folder().join("pictures.json")).unwrap()).unwrap();
    assert_eq!(cases.len(), 7);
    let (eps, v) = (model(), v_model());
    for case in cases {
        let sampler = sampler(&case.sampler);
        let request = GenerateRequest {
            prompt: &case.prompt,
            negative_prompt: &case.negative,
            steps: case.steps,
            guidance_scale: case.guidance,
            seed: case.seed,
            width: case.width,
            height: case.height,
            ..request(&*sampler)
        };
        let model = if case.prediction == "epsilon" { &eps } else { &v };
        let picture = quiet(model, &request).unwrap().remove(0);
        assert_eq!((picture.width(), picture.height()), (case.width, case.height));
        let theirs = case.pixels.as_bytes().chunks(2).map(|d| u8::from_str_radix(std::str::from_utf8(d).unwrap(), 16));
        let worst = picture.pixels().iter().zip(theirs).map(|(a, b)| a.abs_diff(b.unwrap())).max();
        let name = format!("{} {} {:?} guidance {}", case.sampler, case.prediction, case.prompt, case.guidance);
        println!("{name}: {worst:?} / 255");
        assert!(worst <= Some(2), "{name}: off by {worst:?} / 255");
    }
}

#[test]
fn picture_i_is_the_picture_of_seed_plus_i() {
    let (model, sampler) = (model(), sampler("euler-a"));
    let many = quiet(&model, &GenerateRequest { count: 3, seed: u64::MAX - 1, ..request(&*sampler) }).unwrap();
    assert_eq!(many.len(), 3);
    for (picture, seed) in many.iter().zip([u64::MAX - 1, u64::MAX, 0]) {
        assert_eq!(quiet(&model, &GenerateRequest { seed, ..request(&*sampler) }).unwrap()[0], *picture, "{seed}");
    }
    assert_ne!(many[0], many[1]);
}

#[test]
fn a_batch_gives_the_same_pictures_as_one_by_one() {
    let model = model();
    for (id, guidance_scale) in [("euler-a", 7.5), ("ddim", 1.0)] {
        let sampler = sampler(id);
        let base = GenerateRequest { guidance_scale, ..request(&*sampler) };
        let items = [("a photo of a cat", 5), ("dog", 5), ("dog", 6)];
        let together = generate_batch(&model, &base, &items, &mut |step| {
            assert_eq!((step.images, step.latents.len()), (3, 3 * 4 * 8 * 8));
            Ok(())
        })
        .unwrap();
        assert_eq!(together.len(), 3);
        for ((prompt, seed), picture) in items.into_iter().zip(&together) {
            let alone = quiet(&model, &GenerateRequest { prompt, seed, ..base }).unwrap().remove(0);
            let worst = alone.pixels().iter().zip(picture.pixels()).map(|(a, b)| a.abs_diff(*b)).max();
            assert!(worst <= Some(1), "{id} {prompt:?} {seed}: off by {worst:?} / 255");
        }
        assert!(generate_batch(&model, &base, &[], &mut |_| Ok(())).unwrap().is_empty());
    }
}

#[test]
fn a_concept_in_the_prompt_changes_the_picture() {
    let model = model();
    let sampler = sampler("ddim");
    let concept = |layers: usize, slope: f32| {
        let values = (0..layers * 16).map(|i| slope * (i % 16) as f32).collect();
        let token = TokenVectors { name: "milo".into(), layers, width: 16, values };
        Concept { name: "milo".into(), tokens: vec![token] }
    };
    let picture = |concepts: &[Concept]| {
        quiet(&model, &GenerateRequest { prompt: "a photo of <milo>", concepts, ..request(&*sampler) })
    };
    let layers = model.cross_attention_layers();
    let one = picture(&[concept(1, 0.5)]).unwrap();
    assert_eq!(one, picture(&[concept(layers, 0.5)]).unwrap(), "the same vector in every layer is one vector");
    assert_ne!(one, picture(&[concept(1, -2.0)]).unwrap());
    assert!(matches!(picture(&[]), Err(Error::Prompt { .. })));
}

#[test]
fn progress_counts_and_cancels() {
    let (model, sampler) = (model(), sampler("ddim"));
    let mut seen = Vec::new();
    let two = GenerateRequest { count: 2, ..request(&*sampler) };
    generate(&model, &two, &mut |step| {
        assert_eq!((step.images, step.steps, step.latents.len()), (2, 4, 4 * 8 * 8));
        seen.push((step.image, step.step));
        Ok(())
    })
    .unwrap();
    assert_eq!(seen, (0..2).flat_map(|image| (0..4).map(move |step| (image, step))).collect::<Vec<_>>());
    let result = generate(&model, &two, &mut |step| if step.step == 1 { Err(Error::Cancelled) } else { Ok(()) });
    assert!(matches!(result, Err(Error::Cancelled)));
}

#[test]
fn a_file_says_how_to_make_the_picture_again() {
    let (model, drawn_with) = (model(), sampler("dpmpp-2m"));
    let two = GenerateRequest { negative_prompt: "dog", count: 2, ..request(&*drawn_with) };
    let adapters = [AdapterUse { name: "milo".into(), digest: "ab".into(), weight: 0.5 }];
    let path = tempfile::tempdir().unwrap().keep().join("picture.png");
    let pictures = quiet(&model, &two).unwrap();
    pictures[1].save_png(&path, Some(&two.parameters(&model, 1, &adapters))).unwrap();
    let read = read_parameters(&path).unwrap().unwrap();
    assert_eq!((read.model_digest.as_str(), read.adapters.as_slice()), (model.digest(), &adapters[..]));
    let sampler = sampler(&read.sampler);
    let again = GenerateRequest {
        prompt: &read.prompt,
        negative_prompt: &read.negative_prompt,
        concepts: &[],
        steps: read.steps,
        guidance_scale: read.guidance_scale,
        sampler: &*sampler,
        seed: read.seed,
        width: read.width,
        height: read.height,
        count: 1,
    };
    assert_eq!(quiet(&model, &again).unwrap()[0], pictures[1]);
    std::fs::remove_dir_all(path.parent().unwrap()).unwrap();
}

#[test]
fn bad_settings_are_refused_before_any_work() {
    let (model, sampler) = (model(), sampler("ddim"));
    let long = "cat ".repeat(30);
    let good = request(&*sampler);
    let cases = [
        (GenerateRequest { width: 17, ..good }, "width = 17: must be a multiple of 2"),
        (GenerateRequest { height: 0, ..good }, "height = 0"),
        (GenerateRequest { width: 1 << 20, ..good }, "width = 1048576"),
        (GenerateRequest { steps: 0, ..good }, "steps = 0"),
        (GenerateRequest { steps: 5000, ..good }, "steps = 5000"),
        (GenerateRequest { count: 0, ..good }, "count = 0"),
        (GenerateRequest { guidance_scale: f32::NAN, ..good }, "guidance scale = NaN"),
        (GenerateRequest { guidance_scale: -1.0, ..good }, "guidance scale = -1"),
        (GenerateRequest { prompt: &long, ..good }, "too long"),
    ];
    for (request, expected) in cases {
        let mut steps = 0;
        let error = generate(&model, &request, &mut |_| {
            steps += 1;
            Ok(())
        });
        let message = error.unwrap_err().to_string();
        assert!(message.contains(expected) && steps == 0, "{message}");
    }
}
