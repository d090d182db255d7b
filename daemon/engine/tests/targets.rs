//! What a training step compares the prediction with, for both kinds of models (methods: noise, or velocity).
#![allow(clippy::unwrap_used)]

mod support;

use blocklora_engine::image::Picture;
use blocklora_engine::model::{Model, Prediction};
use blocklora_engine::nn::Forward;
use blocklora_engine::rng::{Rng, Stream};
use blocklora_engine::text::{self, Prompt};
use blocklora_engine::train::{Concept, Dataset, EngineHost, ErasureMasks, Parameters, Placement, Sample, TrainHost};
use blocklora_spec::Kind;
use candle_core::{DType, Device, Tensor};
use support::*;

const COLOUR: [u8; 3] = [200, 120, 40];
const PROMPT: &str = "a dog";

/// The loss by its definition: the mean of (prediction - target)^2, with v = sqrt(a) eps - sqrt(1 - a) z_0 as velocity.
fn by_definition(model: &Model, sample: &Sample, side: usize) -> f32 {
    let (channels, height, width) = model.latent_shape();
    let pixel: Vec<f32> = COLOUR.map(|c| f32::from(c) / 127.5 - 1.0).into();
    let pixels = Tensor::from_vec(pixel, (1, 3, 1, 1), &Device::Cpu).unwrap();
    let (mean, log_variance) = model.vae().encode(&pixels.repeat((1, 1, side, side)).unwrap()).unwrap();
    let flat = |x: &Tensor| -> Vec<f32> { x.flatten_all().unwrap().to_vec1().unwrap() };
    let scaling = model.vae().scaling_factor() as f32;
    let posterior = flat(&mean).into_iter().zip(flat(&log_variance)).zip(&sample.posterior);
    let z: Vec<f32> = posterior.map(|((mean, log), n)| (mean + (0.5 * log).exp() * n) * scaling).collect();
    let alpha = model.schedule().alphas_cumprod[sample.timestep];
    let (signal, sigma) = (alpha.sqrt(), (1.0 - alpha).sqrt());
    let noised: Vec<f32> = z.iter().zip(&sample.noise).map(|(z, eps)| signal * z + sigma * eps).collect();
    let target: Vec<f32> = match model.prediction() {
        Prediction::Epsilon => sample.noise.clone(),
        Prediction::VPrediction => z.iter().zip(&sample.noise).map(|(z, eps)| signal * eps - sigma * z).collect(),
    };
    let prompt = Prompt::parse(PROMPT).tokenise(model.tokenizer(), &[]).unwrap();
    let context = text::encode_with(model, &[prompt], &[], &Forward::default()).unwrap();
    let noised = Tensor::from_vec(noised, (1, channels, height, width), &Device::Cpu).unwrap();
    let predicted = model.unet().forward(&noised, &[sample.timestep as f32], &context, &Forward::default()).unwrap();
    let errors = flat(&predicted).into_iter().zip(&target).map(|(p, t)| (p - t).powi(2));
    errors.sum::<f32>() / target.len() as f32
}

#[test]
fn the_loss_is_that_of_the_models_kind_of_prediction() {
    for (layout, kind) in [("starter", Prediction::Epsilon), ("sd21", Prediction::VPrediction)] {
        let dir = model_folder(layout, DType::F32);
        let model = Model::load(dir.path(), &Device::Cpu, DType::F32).unwrap();
        assert_eq!(model.prediction(), kind);
        let (channels, height, width) = model.latent_shape();
        let side = height * model.vae().downscale();
        let concept = Concept { name: "c".into(), class_word: "dog".into(), kind: Kind::Subject };
        let dataset = Dataset::from_pictures(vec![(Picture::filled(side, side, COLOUR).unwrap(), None)]).unwrap();
        let mut progress = |_| Ok(());
        let mut host = EngineHost::new(&model, &concept, &dataset, 0, None, false, &mut progress);
        for timestep in [30, 700] {
            let random = |lane| Rng::new(2, Stream::Test, timestep as u32, lane).normals(channels * height * width);
            let placement = Placement { scale: 1.0, offset: [0.5; 2], flip: false };
            let (noise, posterior) = (random(0), random(1));
            let sample =
                Sample { picture: 0, placement, prompt: PROMPT.into(), timestep, noise, posterior, weight: 1.0 };
            let mut unused = Parameters::default();
            let batch = std::slice::from_ref(&sample);
            let loss =
                host.loss_and_gradients(&Parameters::default(), &ErasureMasks::new(), batch, &mut unused).unwrap();
            let expected = by_definition(&model, &sample, side);
            assert!((loss / expected - 1.0).abs() < 1e-4, "{layout}, t = {timestep}: {loss} against {expected}");
        }
    }
}
