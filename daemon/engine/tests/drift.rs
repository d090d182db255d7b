//! The drift from the model as it is, and its gradients, on the engine's host for trainers.
#![allow(clippy::unwrap_used)]

mod support;

use blocklora_engine::image::Picture;
use blocklora_engine::model::Model;
use blocklora_engine::rng::{Rng, Stream};
use blocklora_engine::train::{
    Concept, Dataset, EngineHost, ErasureMasks, LayerFactors, Parameters, Placement, Sample, TokenFactors, TrainHost,
};
use blocklora_spec::Kind;
use candle_core::{DType, Device};
use support::*;

fn parameters(model: &Model, size_of_b: f32) -> Parameters {
    let random = |layer: usize, n: usize| Rng::new(1, Stream::Test, 0, layer as u16).normals(n);
    let factors = |(layer, info): (usize, &blocklora_engine::merge::strategy::LayerInfo)| LayerFactors {
        layer,
        rows: (0..info.rows as u32).step_by(5).collect(),
        rank: 2,
        scale: 1.0,
        a: random(layer, 2 * info.columns).iter().map(|x| 0.1 * x).collect(),
        b: random(1000 + layer, 2 * info.rows.div_ceil(5)).iter().map(|x| size_of_b * x).collect(),
        a_is_frozen: false,
    };
    let width = model.text_encoder().config().hidden_size;
    let token = |i: usize| TokenFactors { name: format!("c-{i}"), layers: 1, values: random(2000 + i, width) };
    Parameters { factors: model.layers().iter().enumerate().map(factors).collect(), tokens: vec![token(1), token(2)] }
}

fn sample(latent: usize, prompt: &str, timestep: usize) -> Sample {
    let random = |lane| Rng::new(2, Stream::Test, timestep as u32, lane).normals(latent);
    let placement = Placement { scale: 1.0, offset: [0.5; 2], flip: false };
    let (noise, posterior) = (random(0), random(1));
    Sample { picture: 0, placement, prompt: prompt.into(), timestep, noise, posterior, weight: 1.0 }
}

#[test]
fn drift_is_zero_without_a_change_and_its_gradient_is_its_slope() {
    let dir = model_folder("starter", DType::F32);
    let model = Model::load(dir.path(), &Device::Cpu, DType::F32).unwrap();
    let concept = Concept { name: "c".into(), class_word: "dog".into(), kind: Kind::Subject };
    let pictures = vec![(Picture::filled(64, 64, [200, 120, 40]).unwrap(), None)];
    let dataset = Dataset::from_pictures(pictures).unwrap();
    let mut progress = |_| Ok(());
    let mut host = EngineHost::new(&model, &concept, &dataset, 0, None, false, &mut progress);
    let latent = host.latent_shape().iter().product();
    let batch = [sample(latent, "a photo of {}", 700), sample(latent, "a dog", 30)];
    let mut gradients = Parameters::default();
    let mut drift = |parameters: &Parameters, gradients: &mut Parameters| {
        host.drift_and_gradients(parameters, &ErasureMasks::new(), &batch, gradients).unwrap()
    };

    let silent = parameters(&model, 0.0);
    assert_eq!(drift(&silent, &mut gradients), 0.0);
    assert!(gradients.tensors().flatten().all(|g| *g == 0.0));

    let loud = parameters(&model, 0.1);
    let value = drift(&loud, &mut gradients);
    assert!(value > 1e-4, "{value}");
    // Along the gradient the drift rises by its squared length.
    let squared: f32 = gradients.factors.iter().flat_map(|f| f.a.iter().chain(&f.b)).map(|g| g * g).sum();
    let mut unused = Parameters::default();
    let mut moved = |step: f32| {
        let mut there = loud.clone();
        for (to, by) in there.factors.iter_mut().zip(&gradients.factors) {
            to.a.iter_mut().zip(&by.a).for_each(|(x, g)| *x += step * g / squared.sqrt());
            to.b.iter_mut().zip(&by.b).for_each(|(x, g)| *x += step * g / squared.sqrt());
        }
        drift(&there, &mut unused)
    };
    let slope = (moved(1e-2) - moved(-1e-2)) / 2e-2;
    assert!((slope / squared.sqrt() - 1.0).abs() < 1e-2, "{slope} against {}", squared.sqrt());
}
