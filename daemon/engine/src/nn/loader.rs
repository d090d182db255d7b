//! Building modules from a weight file: every tensor is taken by its path and checked against the config's shape, and
//! every tensor of the file must be taken by someone.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use super::{Conv2d, GroupNorm, LayerId, LayerNorm, Linear};
use crate::error::{Error, Result};
use crate::merge::strategy::LayerInfo;
use crate::ops::Frozen;
use crate::weights::{WeightFile, WeightView};

/// A Linear that adapters may change: what it is called, its value in the file and its value in the model.
#[derive(Clone, Debug)]
pub struct AdaptableLayer {
    /// Its name and shape.
    pub info: LayerInfo,
    /// Its weight in the file.
    pub pristine: WeightView,
    /// The weight that the forward pass reads.
    pub live: Tensor,
}

/// One component's weight file while its modules are built.
pub struct Loader<'a> {
    file: Arc<WeightFile>,
    component: &'static str,
    device: &'a Device,
    precision: DType,
    taken: RefCell<BTreeSet<String>>,
    layers: &'a RefCell<Vec<AdaptableLayer>>,
}

impl<'a> Loader<'a> {
    /// Loads from `file` in `precision`; adaptable Linears are named `component.path` and appended to `layers`.
    pub fn new(
        file: Arc<WeightFile>,
        component: &'static str,
        device: &'a Device,
        precision: DType,
        layers: &'a RefCell<Vec<AdaptableLayer>>,
    ) -> Self {
        Self { file, component, device, precision, taken: RefCell::default(), layers }
    }

    /// The file's root.
    pub fn root(&self) -> Scope<'_> {
        Scope { loader: self, path: String::new() }
    }

    /// Fails if the file holds a tensor that no module has taken and that is not one of `ignorable`.
    pub fn finish(&self, ignorable: &[&str]) -> Result<()> {
        let taken = self.taken.borrow();
        match self.file.names().find(|name| !taken.contains(*name) && !ignorable.contains(name)) {
            None => Ok(()),
            Some(name) => Err(Error::InvalidTensor {
                path: self.file.path().to_owned(),
                tensor: name.to_owned(),
                reason:
                    "no part of the model that its config describes uses it; do weights and config belong together?"
                        .into(),
            }),
        }
    }
}

/// A module's path in a weight file.
#[derive(Clone)]
pub struct Scope<'a> {
    loader: &'a Loader<'a>,
    path: String,
}

impl Scope<'_> {
    /// The submodule `name` (dots allowed).
    pub fn at(&self, name: impl std::fmt::Display) -> Self {
        let path = if self.path.is_empty() { name.to_string() } else { format!("{}.{name}", self.path) };
        Self { loader: self.loader, path }
    }

    /// Whether the file holds `name` below this path.
    pub fn has(&self, name: &str) -> bool {
        self.loader.file.view(&self.at(name).path).is_ok()
    }

    fn view(&self, name: &str, shape: &[usize]) -> Result<WeightView> {
        let path = self.at(name).path;
        let view = self.loader.file.view(&path)?;
        view.expect_shape(shape)?;
        if !view.dtype().is_float() {
            return Err(view.error(format!("type {:?}, but weights must be floating-point", view.dtype())));
        }
        self.loader.taken.borrow_mut().insert(path);
        Ok(view)
    }

    /// The tensor `name`, of exactly `shape`.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.view(name, shape)?.load(self.loader.precision, self.loader.device)
    }

    /// The weight `name`, of exactly `shape`, which nothing ever changes: where it lies in the mapped file if it is
    /// stored as the model holds it, so that it takes no memory of its own.
    fn frozen(&self, name: &str, shape: &[usize]) -> Result<Frozen> {
        let view = self.view(name, shape)?;
        let (precision, device) = (self.loader.precision, self.loader.device);
        if device.is_cpu()
            && view.dtype() == precision
            && let Some(mapped) = Frozen::mapped(view.clone())
        {
            return Ok(mapped);
        }
        Ok(view.load(precision, device)?.into())
    }

    /// A Linear from `inputs` to `outputs` that adapters never change.
    pub fn linear(&self, inputs: usize, outputs: usize, bias: bool) -> Result<Linear> {
        let weight = self.frozen("weight", &[outputs, inputs])?;
        Ok(Linear::new(weight, self.bias(outputs, bias)?, None))
    }

    /// A Linear from `inputs` to `outputs` that adapters may change; it gets the next [`LayerId`].
    pub fn adaptable_linear(&self, inputs: usize, outputs: usize, bias: bool) -> Result<Linear> {
        let pristine = self.view("weight", &[outputs, inputs])?;
        let live = pristine.load(self.loader.precision, self.loader.device)?;
        let bias = self.bias(outputs, bias)?;
        let name = format!("{}.{}", self.loader.component, self.path);
        let mut layers = self.loader.layers.borrow_mut();
        let id = LayerId(layers.len());
        let info = LayerInfo { name, rows: outputs, columns: inputs };
        layers.push(AdaptableLayer { info, pristine, live: live.clone() });
        Ok(Linear::new(live.into(), bias, Some(id)))
    }

    fn bias(&self, outputs: usize, wanted: bool) -> Result<Option<Tensor>> {
        if wanted { Ok(Some(self.tensor("bias", &[outputs])?)) } else { Ok(None) }
    }

    /// A convolution with a square kernel and a bias.
    pub fn conv2d(
        &self,
        inputs: usize,
        outputs: usize,
        kernel: usize,
        stride: usize,
        padding: usize,
    ) -> Result<Conv2d> {
        let weight = self.frozen("weight", &[outputs, inputs, kernel, kernel])?;
        Ok(Conv2d { weight, bias: Some(self.tensor("bias", &[outputs])?), stride, padding })
    }

    /// A group normalisation.
    pub fn group_norm(&self, channels: usize, groups: usize, eps: f64) -> Result<GroupNorm> {
        let weight = self.tensor("weight", &[channels])?;
        Ok(GroupNorm { weight, bias: self.tensor("bias", &[channels])?, groups, eps })
    }

    /// A layer normalisation.
    pub fn layer_norm(&self, width: usize, eps: f64) -> Result<LayerNorm> {
        let weight = self.tensor("weight", &[width])?;
        Ok(LayerNorm { weight, bias: self.tensor("bias", &[width])?, eps })
    }
}
