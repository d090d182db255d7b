//! Gradients of every adapter parameter and token vector equal PyTorch's (tests/parity/make_gradient_golden.py) and
//! finite differences.
#![allow(clippy::unwrap_used)]

mod support;

use std::sync::Arc;

use blocklora_engine::model::Model;
use blocklora_engine::nn::{Conditioning, Forward, TrainingAdapter};
use blocklora_engine::ops::LoraBranch;
use blocklora_engine::text::{self, ConceptSlots, Prompt, TokenisedPrompt};
use candle_core::{DType, Device, Tensor, Var};
use support::*;

const RANK: usize = 2;
const SCALE: f64 = 0.7;
const SHRINK: f64 = 0.3;
const TIMESTEPS: [f32; 2] = [981.0, 1.0];
const LATENTS: [usize; 4] = [2, 8, 8, 8];

fn adapted(name: &str) -> bool {
    let ends = |ends: &[&str]| ends.iter().any(|end| name.ends_with(end));
    if name.starts_with("text_encoder.") {
        return ends(&[".q_proj", ".k_proj", ".v_proj", ".out_proj", ".fc1", ".fc2"]);
    }
    ends(&[".to_q", ".to_k", ".to_v", ".to_out.0"])
        || name.starts_with("unet.mid_block.") && ends(&["ff.net.0.proj", "ff.net.2"])
}

/// One parameter: what a finite difference moves and what a gradient is for.
struct Parameter {
    name: String,
    var: Var,
}

/// The training set-up of the golden values.
struct Setup {
    model: Model,
    /// (A, B) by layer name, sorted; then the two token vectors.
    parameters: Vec<Parameter>,
    branches: Vec<(usize, LoraBranch)>,
    prompts: Vec<TokenisedPrompt>,
    _dir: tempfile::TempDir,
}

impl Setup {
    fn new() -> Self {
        let dir = model_folder("starter", DType::F32);
        let model = Model::load(dir.path(), &Device::Cpu, DType::F32).unwrap();
        let mut layers: Vec<_> = model.layers().iter().enumerate().filter(|(_, info)| adapted(&info.name)).collect();
        layers.sort_by(|(_, a), (_, b)| a.name.cmp(&b.name));
        let mut parameters = Vec::new();
        let mut branches = Vec::new();
        for (id, info) in layers {
            let name = &info.name;
            let rows: Arc<[u32]> = (1..info.rows as u32).step_by(3).collect();
            let factor = |kind: &str, shape: &[usize]| {
                let name = format!("{kind}.{name}");
                let var = Var::from_tensor(&(tensor(&name, shape) * SHRINK).unwrap()).unwrap();
                Parameter { name, var }
            };
            parameters.push(factor("A", &[RANK, info.columns]));
            parameters.push(factor("B", &[rows.len(), RANK]));
            let shape = if name.contains(".attn1.") { vec![LATENTS[0], rows.len()] } else { vec![rows.len()] };
            let mask = tensor(&format!("mask.{name}"), &shape).ge(-0.4).unwrap().to_dtype(DType::F32).unwrap();
            branches.push((id, LoraBranch { rows, mask: Some(mask), scale: SCALE }));
        }
        for (name, vectors) in [("token.0", 10), ("token.1", 1)] {
            let var = Var::from_tensor(&tensor(name, &[vectors, 24])).unwrap();
            parameters.push(Parameter { name: name.into(), var });
        }
        let concepts = [ConceptSlots { name: "c", tokens: 2 }];
        let prompts = ["a photo of <c> on a beach", "<c>'s dog"]
            .map(|prompt| Prompt::parse(prompt).tokenise(model.tokenizer(), &concepts).unwrap())
            .to_vec();
        Self { model, parameters, branches, prompts, _dir: dir }
    }

    /// What the UNet reads under the parameters.
    fn adapters_and_context(&self) -> (Vec<Option<TrainingAdapter>>, Conditioning) {
        let mut adapters = vec![None; self.model.layers().len()];
        for (i, (id, branch)) in self.branches.iter().enumerate() {
            let [a, b] = [2 * i, 2 * i + 1].map(|i| self.parameters[i].var.as_tensor().clone());
            adapters[*id] = Some(TrainingAdapter { a, b, branch: branch.clone() });
        }
        let with = Forward { adapters: &adapters, recorder: None };
        let tokens = &self.parameters[2 * self.branches.len()..];
        let vectors: Vec<Tensor> = tokens.iter().map(|token| token.var.as_tensor().clone()).collect();
        let context = text::encode_with(&self.model, &self.prompts, &vectors, &with).unwrap();
        (adapters, context)
    }

    /// The UNet's output under the parameters.
    fn output(&self) -> Tensor {
        let (adapters, context) = self.adapters_and_context();
        let with = Forward { adapters: &adapters, recorder: None };
        self.model.unet().forward(&tensor("latents", &LATENTS), &TIMESTEPS, &context, &with).unwrap()
    }

    /// The same loss and gradients a stretch of the UNet at a time.
    fn gradients_by_stretch(&self, checkpointing: bool) -> (f32, Vec<Tensor>) {
        let (adapters, context) = self.adapters_and_context();
        let with = Forward { adapters: &adapters, recorder: None };
        let target = tensor("target", &LATENTS);
        let loss = |output: &Tensor, samples: std::ops::Range<usize>| {
            let error = (output - target.narrow(0, samples.start, samples.len())?)?;
            Ok((error.sqr()?.sum_all()? / target.elem_count() as f64)?)
        };
        let unet = self.model.unet();
        let (loss, mut found) = unet
            .loss_and_gradients(&tensor("latents", &LATENTS), &TIMESTEPS, &context, &with, &loss, checkpointing)
            .unwrap();
        found.follow(&context, self.parameters.iter().map(|parameter| parameter.var.as_tensor())).unwrap();
        let gradient = |parameter: &Parameter| {
            found.get(&parameter.var).unwrap_or_else(|| panic!("{} has no gradient", parameter.name)).clone()
        };
        (loss, self.parameters.iter().map(gradient).collect())
    }

    /// Gradients of the mean squared error against the target, one for each parameter.
    fn gradients(&self) -> (f32, Vec<Tensor>) {
        let loss = (self.output() - tensor("target", &LATENTS)).unwrap().sqr().unwrap().mean_all().unwrap();
        let store = loss.backward().unwrap();
        let gradient = |parameter: &Parameter| {
            let gradient = store.get(&parameter.var).unwrap_or_else(|| panic!("{} has no gradient", parameter.name));
            assert_eq!(gradient.dims(), parameter.var.dims(), "{}", parameter.name);
            gradient.clone()
        };
        (loss.to_scalar().unwrap(), self.parameters.iter().map(gradient).collect())
    }
}

fn flat(x: &Tensor) -> Vec<f32> {
    x.flatten_all().unwrap().to_vec1().unwrap()
}

/// ||a - b|| / ||b||.
fn relative_error(ours: &[f32], theirs: &[f32]) -> f64 {
    assert_eq!(ours.len(), theirs.len());
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let difference = norm(&mut ours.iter().zip(theirs).map(|(a, b)| (*a - *b) as f64));
    difference / norm(&mut theirs.iter().map(|x| *x as f64)).max(f64::MIN_POSITIVE)
}

#[test]
fn gradients_equal_pytorch() {
    let setup = Setup::new();
    let golden = golden("starter");
    for (i, prompt) in setup.prompts.iter().enumerate() {
        let ids: Vec<i64> = golden["concept.ids"].get(i).unwrap().to_vec1().unwrap();
        assert_eq!(prompt.ids.iter().map(|id| *id as i64).collect::<Vec<_>>(), ids);
        let first: i64 = golden["concept.slots"].get(i).unwrap().to_scalar().unwrap();
        assert_eq!(prompt.slots[0].position as i64, first);
    }
    let diff = max_diff(&setup.output(), &golden["concept.output"]);
    assert!(diff <= 2e-5, "output: {diff}");
    let (loss, gradients) = setup.gradients();
    let expected = flat(&golden["concept.loss"])[0];
    assert!((loss - expected).abs() <= 1e-5 * expected, "loss: {loss} against {expected}");

    let mut factors = flat(&golden["gradient.factors"]).into_iter();
    let mut worst = (0.0, "");
    for (parameter, ours) in setup.parameters.iter().zip(&gradients) {
        let theirs: Vec<f32> = if parameter.name.starts_with("token.") {
            flat(&golden[&format!("gradient.{}", parameter.name)])
        } else {
            factors.by_ref().take(ours.elem_count()).collect()
        };
        assert!(theirs.iter().any(|x| *x != 0.0), "{}: the expected gradient is zero", parameter.name);
        let error = relative_error(&flat(ours), &theirs);
        assert!(error <= 1e-3, "{}: relative error {error}", parameter.name);
        if error > worst.0 {
            worst = (error, &parameter.name);
        }
    }
    assert_eq!(factors.next(), None);
    println!("{} parameters, largest relative error {:e} at {}", setup.parameters.len(), worst.0, worst.1);
}

#[test]
fn checkpointing_changes_no_bit_of_a_gradient() {
    let setup = Setup::new();
    let (loss, whole) = setup.gradients();
    let (kept_loss, kept) = setup.gradients_by_stretch(false);
    let (again_loss, again) = setup.gradients_by_stretch(true);
    assert_eq!((loss.to_bits(), kept_loss.to_bits()), (kept_loss.to_bits(), again_loss.to_bits()));
    for (((parameter, whole), kept), again) in setup.parameters.iter().zip(&whole).zip(&kept).zip(&again) {
        let bits = |x: &Tensor| flat(x).iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(kept), bits(again), "{}", parameter.name);
        let error = relative_error(&flat(kept), &flat(whole));
        assert!(error <= 1e-5, "{}: {error} from the gradient of the whole graph", parameter.name);
    }
}

#[test]
fn gradients_equal_finite_differences() {
    let setup = Setup::new();
    let (_, gradients) = setup.gradients();
    let target = flat(&tensor("target", &LATENTS));
    // Loss at parameters + step * direction, less the loss at parameters - step * direction: from the outputs, in f64,
    // as the difference of two rounded means would have few digits left.
    let difference = |directions: &[(usize, Tensor)], step: f64| {
        let moved = |sign: f64| {
            let starts: Vec<Tensor> =
                directions.iter().map(|(i, _)| setup.parameters[*i].var.as_tensor().copy().unwrap()).collect();
            for ((i, direction), start) in directions.iter().zip(&starts) {
                let to = (start + (direction * (sign * step)).unwrap()).unwrap();
                setup.parameters[*i].var.set(&to).unwrap();
            }
            let output = flat(&setup.output());
            for ((i, _), start) in directions.iter().zip(&starts) {
                setup.parameters[*i].var.set(start).unwrap();
            }
            output
        };
        let (plus, minus) = (moved(1.0), moved(-1.0));
        let terms = plus
            .iter()
            .zip(&minus)
            .zip(&target)
            .map(|((p, m), t)| (*p as f64 - *m as f64) * (*p as f64 + *m as f64 - 2.0 * *t as f64));
        terms.sum::<f64>() / (target.len() as f64 * 2.0 * step)
    };
    let check = |name: &str, which: &[usize]| {
        // Along the gradient, where the derivative is its norm.
        let norm = which.iter().flat_map(|i| flat(&gradients[*i])).map(|x| (x as f64).powi(2)).sum::<f64>().sqrt();
        let directions: Vec<_> = which.iter().map(|i| (*i, (&gradients[*i] / norm).unwrap())).collect();
        // Two steps cancel the error of second order (Richardson).
        let step = 0.05;
        let derivative = (4.0 * difference(&directions, step / 2.0) - difference(&directions, step)) / 3.0;
        let error = (derivative - norm).abs() / norm;
        println!("{name}: {norm:e}, relative error {error:e}");
        assert!(error <= 1e-3, "{name}: gradient {norm}, finite difference {derivative}");
    };
    let select = |want: &dyn Fn(&str) -> bool| -> Vec<usize> {
        let all = setup.parameters.iter().enumerate();
        all.filter(|(_, parameter)| want(&parameter.name)).map(|(i, _)| i).collect()
    };
    check("token.0", &select(&|name| name == "token.0"));
    check("token.1", &select(&|name| name == "token.1"));
    for kind in ["A", "B"] {
        for part in ["text_encoder.", "unet."] {
            check(&format!("{kind} of {part}"), &select(&|name| name.starts_with(&format!("{kind}.{part}"))));
        }
    }
    for layer in [".to_q", ".to_k", ".to_v", ".to_out.0", ".ff.net.0.proj", ".ff.net.2"] {
        check(&format!("B of {layer}"), &select(&|name| name.starts_with("B.unet") && name.ends_with(layer)));
    }
}
