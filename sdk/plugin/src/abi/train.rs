//! Trainers across the boundary.

use std::marker::PhantomData;

use abi_stable::StableAbi;
use abi_stable::prefix_type::WithMetadata;
use abi_stable::staticref;
use abi_stable::std_types::RResult;

use super::convert;
use super::guard::guard;
use super::host::Instance;
use super::instance::RawInstance;
use super::train_host::{Lent, Proxy, RawTrainHost};
use super::types::{OwnedParameters, RawConcept, RawError, RawTrainPlan};
use crate::error::{Error, Result};
use crate::train::{AnyTrainer, Concept, Parameters, TrainHost, TrainPlan, Trainer, check_parameters};

/// The functions of a trainer.
#[repr(C)]
#[derive(StableAbi)]
#[sabi(kind(Prefix(prefix_ref = TrainTableRef, prefix_fields = TrainTableFields)))]
#[sabi(missing_field(panic))]
pub struct TrainTable {
    /// [any] [`Trainer::plan`].
    pub plan: extern "C" fn(RawInstance, RawConcept<'_>) -> RResult<RawTrainPlan, RawError>,
    /// [job] [`Trainer::train`]. The parameters are the host's.
    #[sabi(last_prefix_field)]
    pub train: extern "C" fn(RawInstance, RawTrainHost<'_>) -> RResult<OwnedParameters, RawError>,
}

/// The plugin's side.
pub struct Plugin<T>(PhantomData<T>);

impl<T: Trainer + 'static> Plugin<T> {
    staticref!(const TABLE: WithMetadata<TrainTable> = WithMetadata::new(TrainTable {
        plan: Self::plan,
        train: Self::train,
    }));
    /// The functions.
    pub const REF: TrainTableRef = TrainTableRef(Self::TABLE.as_prefix());

    extern "C" fn plan(instance: RawInstance, concept: RawConcept<'_>) -> RResult<RawTrainPlan, RawError> {
        guard(|| {
            // SAFETY: the host gives back what `create` of this plugin made.
            let trainer = unsafe { instance.get::<T>() };
            Trainer::plan(trainer, &convert::concept(&concept)?).map(convert::raw_train_plan)
        })
    }

    extern "C" fn train(instance: RawInstance, host: RawTrainHost<'_>) -> RResult<OwnedParameters, RawError> {
        guard(|| {
            // SAFETY: as above.
            let trainer = unsafe { instance.get::<T>() };
            Trainer::train(trainer, &mut Proxy::new(host)?).map(convert::give_parameters)
        })
    }
}

/// The host's side: a trainer in a library.
pub struct Remote {
    pub instance: Instance,
    pub table: TrainTableRef,
}

impl AnyTrainer for Remote {
    fn plan(&self, concept: &Concept) -> Result<TrainPlan> {
        let plan = self.table.plan()(self.instance.raw(), convert::raw_concept(concept));
        convert::train_plan(plan.into_result().map_err(Error::from)?)
    }

    fn train(&self, host: &mut dyn TrainHost) -> Result<Parameters> {
        let (concept, layers, captions) = (host.concept().clone(), host.layers().to_vec(), host.captions().to_vec());
        let mut lent = Lent::new(host);
        let raw_layers = convert::raw_layers(&layers);
        let raw_captions = RawTrainHost::captions(&captions);
        let raw = RawTrainHost::lend(&mut lent, &concept, &raw_layers, &raw_captions);
        let parameters = self.table.train()(self.instance.raw(), raw);
        let parameters = convert::take_parameters(parameters.into_result().map_err(Error::from)?);
        check_parameters(&layers, &parameters)?;
        Ok(parameters)
    }
}
