//! Cross-talk: how strongly the rows of other concepts answer to what enters a layer for one concept.
//!
//! Disjoint rows make the deltas of two concepts orthogonal as matrices, but dW_j X_i is not zero: concept j's rows
//! still change what they put out for concept i's input X_i.

use std::cell::RefCell;

use candle_core::Tensor;

use super::show::show;
use crate::error::Result;
use crate::image::Picture;
use crate::merge::AdapterFactors;
use crate::model::Model;
use crate::nn::{LayerId, Recorder};
use crate::text::Concept;

/// What one layer answers to some input X: sums of squares over all of its outputs and tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// ||W X||^2, W the live weight.
    pub output: f64,
    /// ||dW_j X||^2 for each adapter j; zero where it leaves the layer alone.
    pub deltas: Vec<f64>,
}

/// What every layer of `model` answers, in the order of its layers, while the UNet sees `pictures` at three noise
/// levels under their captions, which may name `concepts`. What is merged decides the inputs; `adapters` need not be.
pub fn answers(
    model: &Model,
    adapters: &[&AdapterFactors],
    concepts: &[Concept],
    pictures: &[(Picture, String)],
) -> Result<Vec<Answer>> {
    let empty = Answer { output: 0.0, deltas: vec![0.0; adapters.len()] };
    let sums = Sums { model, adapters, answers: RefCell::new(vec![empty; model.layers().len()]) };
    show(model, concepts, pictures, &sums)?;
    Ok(sums.answers.into_inner())
}

/// Sums up what each layer answers.
struct Sums<'a> {
    model: &'a Model,
    adapters: &'a [&'a AdapterFactors],
    answers: RefCell<Vec<Answer>>,
}

impl Recorder for Sums<'_> {
    fn record(&self, layer: LayerId, input: &Tensor) -> candle_core::Result<()> {
        let x = input.flatten_to(input.dims().len().saturating_sub(2))?.contiguous()?;
        let squares = |y: Tensor| y.sqr()?.sum_all()?.to_scalar::<f32>().map(f64::from);
        let name = &self.model.layers()[layer.0].name;
        let answer = &mut self.answers.borrow_mut()[layer.0];
        answer.output += squares(x.matmul(&self.model.live(layer).to_dtype(x.dtype())?.t()?)?)?;
        for (sum, adapter) in answer.deltas.iter_mut().zip(self.adapters) {
            let Some(l) = adapter.layer(name) else { continue };
            let a = Tensor::from_slice(&l.a, (l.rank, l.columns), x.device())?;
            let b = Tensor::from_slice(&l.b, (l.rows.len(), l.rank), x.device())?;
            let scale = f64::from(adapter.scale());
            *sum += scale * scale * squares(x.matmul(&a.t()?)?.matmul(&b.t()?)?)?;
        }
        Ok(())
    }
}
