//! A plugin as the engine's trainer.

use std::ops::Range;

use blocklora_engine::Result;
use blocklora_engine::merge::strategy::LayerInfo;
use blocklora_engine::train as engine;
use blocklora_sdk::merge::Layer;
use blocklora_sdk::{Job, train as sdk};
use blocklora_spec::Algorithm;
use send_wrapper::SendWrapper;

use super::merge::failed;
use super::running::{Place, inside, outside};
use super::sample::{QuietJob, job_by_field};

pub struct PluginTrainer {
    pub algorithm: Algorithm,
    pub trainer: Box<dyn sdk::AnyTrainer>,
    /// In this process.
    pub place: Option<Place>,
}

impl engine::Trainer for PluginTrainer {
    fn algorithm(&self) -> &Algorithm {
        &self.algorithm
    }

    fn plan(&self, concept: &engine::Concept) -> Result<engine::TrainPlan> {
        let plan = inside(self.place.as_ref(), || self.trainer.plan(&sdk_concept(concept)));
        let plan = plan.map_err(|e| failed(&self.algorithm.id, e))?;
        Ok(engine::TrainPlan {
            steps: plan.steps,
            checkpoint_every: plan.checkpoint_every,
            rank: plan.rank,
            alpha: plan.alpha,
            delta: plan.delta,
            partition: plan.partition,
            erasure_lambda: plan.erasure_lambda,
            tokens: plan.tokens,
        })
    }

    fn train(&self, host: &mut dyn engine::TrainHost) -> Result<engine::Parameters> {
        let mut host = Host {
            job: QuietJob::new(host.seed()),
            concept: sdk_concept(host.concept()),
            layers: layers(host.layers()),
            captions: host.captions().to_vec(),
            latent_shape: host.latent_shape(),
            cross_attention_layers: host.cross_attention_layers(),
            num_train_timesteps: host.num_train_timesteps(),
            gradients: engine::Parameters::default(),
            host: SendWrapper::new(host),
            place: self.place.as_ref(),
        };
        let result = inside(self.place.as_ref(), || self.trainer.train(&mut host));
        host.job.finish(&self.algorithm.id, result).map(engine_parameters)
    }
}

fn sdk_concept(concept: &engine::Concept) -> sdk::Concept {
    sdk::Concept { name: concept.name.clone(), class_word: concept.class_word.clone(), kind: concept.kind }
}

pub fn layers(layers: &[LayerInfo]) -> Vec<Layer> {
    layers.iter().map(|l| Layer { name: l.name.clone(), rows: l.rows, columns: l.columns }).collect()
}

fn engine_parameters(parameters: sdk::Parameters) -> engine::Parameters {
    let factors = |f: sdk::LayerFactors| engine::LayerFactors {
        layer: f.layer,
        rows: f.rows,
        rank: f.rank,
        scale: f.scale,
        a: f.a,
        b: f.b,
        a_is_frozen: f.a_is_frozen,
    };
    let token = |t: sdk::TokenFactors| engine::TokenFactors { name: t.name, layers: t.layers, values: t.values };
    engine::Parameters {
        factors: parameters.factors.into_iter().map(factors).collect(),
        tokens: parameters.tokens.into_iter().map(token).collect(),
    }
}

fn sdk_parameters(parameters: engine::Parameters) -> sdk::Parameters {
    let factors = |f: engine::LayerFactors| sdk::LayerFactors {
        layer: f.layer,
        rows: f.rows,
        rank: f.rank,
        scale: f.scale,
        a: f.a,
        b: f.b,
        a_is_frozen: f.a_is_frozen,
    };
    let token = |t: engine::TokenFactors| sdk::TokenFactors { name: t.name, layers: t.layers, values: t.values };
    sdk::Parameters {
        factors: parameters.factors.into_iter().map(factors).collect(),
        tokens: parameters.tokens.into_iter().map(token).collect(),
    }
}

fn engine_sample(sample: &sdk::Sample) -> engine::Sample {
    engine::Sample {
        picture: sample.picture,
        placement: engine::Placement {
            scale: sample.placement.scale,
            offset: sample.placement.offset,
            flip: sample.placement.flip,
        },
        prompt: sample.prompt.clone(),
        timestep: sample.timestep,
        noise: sample.noise.clone(),
        posterior: sample.posterior.clone(),
        weight: sample.weight,
    }
}

/// The engine's host as a plugin sees it. It belongs to the thread of the job, which the ABI checks before it calls.
struct Host<'a> {
    job: QuietJob,
    concept: sdk::Concept,
    layers: Vec<Layer>,
    captions: Vec<Option<String>>,
    latent_shape: [usize; 3],
    cross_attention_layers: usize,
    num_train_timesteps: usize,
    gradients: engine::Parameters,
    host: SendWrapper<&'a mut dyn engine::TrainHost>,
    place: Option<&'a Place>,
}

job_by_field!(Host<'_>);

impl Host<'_> {
    fn step(
        &mut self,
        objective: sdk::Objective,
        parameters: &sdk::Parameters,
        masks: &sdk::ErasureMasks,
        batch: &[sdk::Sample],
        gradients: &mut sdk::Parameters,
    ) -> blocklora_sdk::Result<f32> {
        self.job.check_cancelled()?;
        let parameters = engine_parameters(parameters.clone());
        let batch: Vec<engine::Sample> = batch.iter().map(engine_sample).collect();
        let result = outside(self.place, || match objective {
            sdk::Objective::Loss => self.host.loss_and_gradients(&parameters, masks, &batch, &mut self.gradients),
            sdk::Objective::Drift => self.host.drift_and_gradients(&parameters, masks, &batch, &mut self.gradients),
        });
        let value = self.job.pass(result)?;
        *gradients = sdk_parameters(std::mem::take(&mut self.gradients));
        Ok(value)
    }
}

impl sdk::TrainHost for Host<'_> {
    fn concept(&self) -> &sdk::Concept {
        &self.concept
    }
    fn layers(&self) -> &[Layer] {
        &self.layers
    }
    fn cross_attention_layers(&self) -> usize {
        self.cross_attention_layers
    }
    fn latent_shape(&self) -> [usize; 3] {
        self.latent_shape
    }
    fn num_train_timesteps(&self) -> usize {
        self.num_train_timesteps
    }
    fn captions(&self) -> &[Option<String>] {
        &self.captions
    }
    fn embedding(&self, word: &str) -> blocklora_sdk::Result<Vec<f32>> {
        self.job.pass(outside(self.place, || self.host.embedding(word)))
    }
    fn check_prompt(&self, prompt: &str, tokens: usize) -> blocklora_sdk::Result<()> {
        self.job.pass(outside(self.place, || self.host.check_prompt(prompt, tokens)))
    }
    fn generate(&mut self, request: &sdk::PictureRequest) -> blocklora_sdk::Result<Range<usize>> {
        let request = engine::PictureRequest {
            prompt: request.prompt.clone(),
            count: request.count,
            steps: request.steps,
            guidance_scale: request.guidance_scale,
        };
        let result = outside(self.place, || self.host.generate(&request));
        self.job.pass(result)
    }
    fn loss_and_gradients(
        &mut self,
        parameters: &sdk::Parameters,
        masks: &sdk::ErasureMasks,
        batch: &[sdk::Sample],
        gradients: &mut sdk::Parameters,
    ) -> blocklora_sdk::Result<f32> {
        self.step(sdk::Objective::Loss, parameters, masks, batch, gradients)
    }
    fn drift_and_gradients(
        &mut self,
        parameters: &sdk::Parameters,
        masks: &sdk::ErasureMasks,
        batch: &[sdk::Sample],
        gradients: &mut sdk::Parameters,
    ) -> blocklora_sdk::Result<f32> {
        self.step(sdk::Objective::Drift, parameters, masks, batch, gradients)
    }
    fn resume(&mut self) -> blocklora_sdk::Result<Option<sdk::TrainState>> {
        let result = outside(self.place, || self.host.resume());
        let state = self.job.pass(result)?;
        Ok(state.map(|state| sdk::TrainState {
            step: state.step,
            parameters: sdk_parameters(state.parameters),
            optimiser: state.optimiser,
        }))
    }
    fn step_done(&mut self, state: &sdk::TrainState, steps: usize, loss: f32) -> blocklora_sdk::Result<()> {
        self.step_done_with(state.step, &|| state.clone(), steps, loss)
    }
    fn step_done_with(
        &mut self,
        step: usize,
        state: &dyn Fn() -> sdk::TrainState,
        steps: usize,
        loss: f32,
    ) -> blocklora_sdk::Result<()> {
        let engine_state = || {
            let state = state();
            engine::TrainState {
                step: state.step,
                parameters: engine_parameters(state.parameters),
                optimiser: state.optimiser,
            }
        };
        let result = outside(self.place, || self.host.step_done(step, &engine_state, steps, loss));
        self.job.pass(result)
    }
}
