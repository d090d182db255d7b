//! The UNet's gradients a stretch at a time, last stretch first: gradient checkpointing (Chen et al., 2016).
//!
//! What lies between two stretches is kept, what lies inside one is computed again when its gradients are: the memory
//! of a training step is then that of one stretch. Adapters and erasure masks are those of the forward pass, and the
//! kernels give the same bits each time, so that the gradients are the same to the bit as without.

use std::collections::HashMap;

use candle_core::backprop::GradStore;
use candle_core::{Tensor, TensorId, Var};

use super::unet::Segment;
use super::{Conditioning, Forward, LossOf, TrainingAdapter, UNet};
use crate::error::Result;

/// Gradients by the tensor that they belong to.
#[derive(Debug, Default)]
pub struct Gradients(HashMap<TensorId, Tensor>);

impl Gradients {
    /// The gradient of `tensor`, if anything depends on it.
    pub fn get(&self, tensor: &Tensor) -> Option<&Tensor> {
        self.0.get(&tensor.id())
    }

    /// Follows the gradients of the encodings in `context` into the graph that made them, to `leaves`.
    pub fn follow<'a>(&mut self, context: &Conditioning, leaves: impl Iterator<Item = &'a Tensor>) -> Result<()> {
        let mut total: Option<Tensor> = None;
        for encoding in context.encodings() {
            if let Some(gradient) = self.get(encoding) {
                let product = (encoding * gradient)?.sum_all()?;
                total = Some(match total {
                    Some(total) => (total + product)?,
                    None => product,
                });
            }
        }
        match total {
            Some(total) => self.take(&total.backward()?, leaves),
            None => Ok(()),
        }
    }

    pub(super) fn add(&mut self, tensor: &Tensor, gradient: &Tensor) -> Result<()> {
        let sum = match self.0.remove(&tensor.id()) {
            Some(before) => (before + gradient)?,
            None => gradient.clone(),
        };
        self.0.insert(tensor.id(), sum);
        Ok(())
    }

    /// Takes the gradients of `tensors` from `store`.
    fn take<'a>(&mut self, store: &GradStore, tensors: impl Iterator<Item = &'a Tensor>) -> Result<()> {
        for tensor in tensors {
            if let Some(gradient) = store.get(tensor) {
                self.add(tensor, gradient)?;
            }
        }
        Ok(())
    }
}

/// What one stretch reads, as leaves of a graph of its own.
struct Leaves {
    segment: Segment,
    h: Var,
    skip: Option<Var>,
    /// Height and width of the next skip connection.
    size: Option<(usize, usize)>,
    /// Its output with its graph, where that is kept.
    output: Option<Tensor>,
}

/// The tensors of `adapters` that gradients may be of.
pub(super) fn factors(adapters: &[Option<TrainingAdapter>]) -> impl Iterator<Item = &Tensor> {
    adapters.iter().flatten().flat_map(|adapter| [&adapter.a, &adapter.b])
}

impl UNet {
    /// The loss of the prediction, and the gradients of the factors in `with` and of the encodings in `context`.
    ///
    /// `loss` turns predictions into a scalar; that of a batch is the sum of its samples'. With `checkpointing` the inside
    /// of each stretch is computed twice; without, all of it is kept. The encodings' own graph, if they have one, is not
    /// followed: continue it with [`Gradients::follow`].
    pub fn loss_and_gradients(
        &self,
        latents: &Tensor,
        timesteps: &[f32],
        context: &Conditioning,
        with: &Forward,
        loss: &LossOf,
        checkpointing: bool,
    ) -> Result<(f32, Gradients)> {
        if self.goes_by_samples(latents, with)? {
            self.check(latents, timesteps, context)?;
            return self.loss_and_gradients_each(latents, timesteps, context, with.adapters, loss, checkpointing);
        }
        let loss = |predicted: &Tensor| loss(predicted, 0..timesteps.len());
        self.loss_and_gradients_all(latents, timesteps, context, with, &loss, checkpointing)
    }

    /// [`Self::loss_and_gradients`] of the whole batch, layer by layer.
    pub(super) fn loss_and_gradients_all(
        &self,
        latents: &Tensor,
        timesteps: &[f32],
        context: &Conditioning,
        with: &Forward,
        loss: &dyn Fn(&Tensor) -> Result<Tensor>,
        checkpointing: bool,
    ) -> Result<(f32, Gradients)> {
        let temb = self.check_and_embed(latents, timesteps, context)?.detach();
        let originals = context.encodings();
        let encodings = originals
            .iter()
            .map(|encoding| Var::from_tensor(&encoding.detach()))
            .collect::<candle_core::Result<Vec<_>>>()?;
        let encoded: Vec<Tensor> = encodings.iter().map(|encoding| encoding.as_tensor().clone()).collect();
        let leaf_context = match (context, encoded.as_slice()) {
            (Conditioning::Shared(_), [encoding]) => Conditioning::Shared(encoding.clone()),
            _ => Conditioning::LayerWise(encoded.clone()),
        };

        // Without a graph inside, nothing of a stretch but its output outlives it.
        let frozen: Vec<Option<TrainingAdapter>> = with.adapters.iter().map(|a| a.as_ref().map(detached)).collect();
        let frozen = Forward { adapters: if checkpointing { &frozen } else { with.adapters }, ..*with };
        let plain_context = leaf_context.map(|encoding| Ok(encoding.detach()))?;
        let first_context = if checkpointing { &plain_context } else { &leaf_context };
        let mut stretches = Vec::new();
        let (mut h, mut skips) = (latents.detach(), Vec::<Tensor>::new());
        for segment in self.segments() {
            let skip = if segment.takes_skip() { skips.pop() } else { None };
            let size = skips.last().map(Tensor::dims4).transpose()?.map(|(_, _, height, width)| (height, width));
            let mut leaves = Leaves {
                segment,
                h: Var::from_tensor(&h)?,
                skip: skip.as_ref().map(Var::from_tensor).transpose()?,
                size,
                output: None,
            };
            let output = if checkpointing {
                self.run(segment, &h, skip.as_ref(), size, &temb, first_context, &frozen)?
            } else {
                self.run_leaves(&leaves, &temb, first_context, &frozen)?
            };
            h = output.detach();
            if segment.gives_skip() {
                skips.push(h.clone());
            }
            if !checkpointing {
                leaves.output = Some(output);
            }
            stretches.push(leaves);
        }

        let mut gradients = Gradients::default();
        let again = Forward { recorder: None, ..*with };
        // Gradients of the outputs that were kept for the way up, and of the output of the stretch at hand.
        let (mut of_skips, mut of_output): (Vec<Option<Tensor>>, Option<Tensor>) = (Vec::new(), None);
        let mut value = f32::NAN;
        while let Some(mut leaves) = stretches.pop() {
            if leaves.segment.gives_skip()
                && let Some(of_skip) = of_skips.pop().flatten()
            {
                of_output = Some(match of_output {
                    Some(of_output) => (of_output + of_skip)?,
                    None => of_skip,
                });
            }
            let is_last = leaves.segment == Segment::Out;
            if !is_last && of_output.is_none() {
                continue;
            }
            let output = match leaves.output.take() {
                Some(output) => output,
                None => self.run_leaves(&leaves, &temb, &leaf_context, &again)?,
            };
            let scalar = match &of_output {
                Some(gradient) => (output * gradient)?.sum_all()?,
                None => {
                    let scalar = loss(&output)?;
                    value = scalar.to_scalar()?;
                    scalar
                }
            };
            let store = scalar.backward()?;
            gradients.take(&store, factors(with.adapters))?;
            gradients.take(&store, encoded.iter())?;
            of_output = store.get(&leaves.h).cloned();
            if let Some(skip) = &leaves.skip {
                of_skips.push(store.get(skip).cloned());
            }
        }
        for (original, encoding) in originals.iter().zip(&encoded) {
            if let Some(gradient) = gradients.0.remove(&encoding.id()) {
                gradients.add(original, &gradient)?;
            }
        }
        Ok((value, gradients))
    }

    fn run_leaves(&self, leaves: &Leaves, temb: &Tensor, context: &Conditioning, with: &Forward) -> Result<Tensor> {
        let skip = leaves.skip.as_ref().map(Var::as_tensor);
        self.run(leaves.segment, leaves.h.as_tensor(), skip, leaves.size, temb, context, with)
    }
}

fn detached(adapter: &TrainingAdapter) -> TrainingAdapter {
    TrainingAdapter { a: adapter.a.detach(), b: adapter.b.detach(), branch: adapter.branch.clone() }
}
