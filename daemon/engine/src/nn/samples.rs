//! The UNet on a batch sample by sample, side by side on the machine's threads.
//!
//! A small network's layers are over before a second thread has woken up, its samples are not. Which way a batch goes is
//! decided by sizes alone, so that no result depends on the number of threads.

use std::ops::Range;

use candle_core::Tensor;

use super::checkpoint::{Gradients, factors};
use super::{Conditioning, Forward, TrainingAdapter, UNet};
use crate::error::Result;
use crate::ops::{self, LoraBranch};

/// Turns the predictions [n, C, H, W] of some of a batch's samples into their share of the loss.
pub type LossOf<'a> = dyn Fn(&Tensor, Range<usize>) -> Result<Tensor> + Sync + 'a;

impl UNet {
    /// The prediction for a batch, as [`Self::forward`].
    pub(super) fn forward_each(
        &self,
        latents: &Tensor,
        timesteps: &[f32],
        context: &Conditioning,
        adapters: &[Option<TrainingAdapter>],
    ) -> Result<Tensor> {
        let predictions = ops::side_by_side(timesteps.len(), |i| {
            let adapters = of_sample(adapters, i)?;
            let with = Forward { adapters: &adapters, recorder: None };
            self.forward_all(&latents.narrow(0, i, 1)?, &timesteps[i..=i], &context.narrow(i, 1)?, &with)
        })?;
        Ok(Tensor::cat(&predictions, 0)?)
    }

    /// Loss and gradients of a batch, as [`Self::loss_and_gradients`]; the samples' are added up in their order.
    pub(super) fn loss_and_gradients_each(
        &self,
        latents: &Tensor,
        timesteps: &[f32],
        context: &Conditioning,
        adapters: &[Option<TrainingAdapter>],
        loss: &LossOf,
        checkpointing: bool,
    ) -> Result<(f32, Gradients)> {
        let samples = ops::side_by_side(timesteps.len(), |i| {
            let (adapters, context) = (of_sample(adapters, i)?, context.narrow(i, 1)?);
            let with = Forward { adapters: &adapters, recorder: None };
            let loss = |predicted: &Tensor| loss(predicted, i..i + 1);
            let latents = latents.narrow(0, i, 1)?;
            let (value, gradients) =
                self.loss_and_gradients_all(&latents, &timesteps[i..=i], &context, &with, &loss, checkpointing)?;
            Ok::<_, crate::Error>((value, gradients, context))
        })?;
        let mut sum = Gradients::default();
        for (_, gradients, _) in &samples {
            for factor in factors(adapters) {
                if let Some(gradient) = gradients.get(factor) {
                    sum.add(factor, gradient)?;
                }
            }
        }
        for (index, encoding) in context.encodings().iter().enumerate() {
            let of_sample = samples.iter().map(|(_, gradients, context)| {
                let part = context.layer(index)?;
                gradients.get(part).map_or_else(|| part.zeros_like(), |gradient| Ok(gradient.clone()))
            });
            sum.add(encoding, &Tensor::cat(&of_sample.collect::<candle_core::Result<Vec<_>>>()?, 0)?)?;
        }
        Ok((samples.iter().map(|(value, ..)| value).sum(), sum))
    }

    /// Whether samples are computed side by side: on the CPU, where the first and largest of the layers, a convolution
    /// with 3 x 3 taps, is not worth sharing out.
    pub(super) fn goes_by_samples(&self, latents: &Tensor, with: &Forward) -> Result<bool> {
        let (batch, _, height, width) = latents.dims4()?;
        let channels = self.config().block_out_channels[0];
        let is_small = height * width * channels * channels * 9 < ops::PARALLEL_FROM;
        Ok(batch > 1 && is_small && latents.device().is_cpu() && with.recorder.is_none())
    }
}

/// The training adapters as sample `i` of the batch sees them: with its erasure masks.
fn of_sample(adapters: &[Option<TrainingAdapter>], i: usize) -> Result<Vec<Option<TrainingAdapter>>> {
    let of_sample = |TrainingAdapter { a, b, branch }: &TrainingAdapter| {
        let mask = match &branch.mask {
            Some(mask) if mask.rank() == 2 && mask.dim(0)? > 1 => Some(mask.narrow(0, i, 1)?),
            mask => mask.clone(),
        };
        let branch = LoraBranch { mask, rows: branch.rows.clone(), scale: branch.scale };
        Ok(TrainingAdapter { a: a.clone(), b: b.clone(), branch })
    };
    adapters.iter().map(|adapter| adapter.as_ref().map(of_sample).transpose()).collect()
}
