//! The root of a library: who it is, how an instance is made, and the functions of its kind.

use std::marker::PhantomData;

use abi_stable::StableAbi;
use abi_stable::library::{CheckTypeLayout, LibHeader, RootModule, RootModuleResult};
use abi_stable::prefix_type::WithMetadata;
use abi_stable::sabi_types::VersionStrings;
use abi_stable::staticref;
use abi_stable::std_types::{ROption, RResult, RStr, RString};

use super::guard::{guard, guard_quietly, remember_places};
use super::instance::RawInstance;
use super::merge::MergeTableRef;
use super::sample::SampleTableRef;
use super::train::TrainTableRef;
use super::types::RawError;
use crate::config::{Config, resolve, schema, to_value};
use crate::error::{Code, Error, Result};

/// What a library exports.
#[repr(C)]
#[derive(StableAbi)]
#[sabi(kind(Prefix(prefix_ref = PluginRootRef, prefix_fields = PluginRootFields)))]
#[sabi(missing_field(panic))]
pub struct PluginRoot {
    /// `<kind>-<id>`, as in the magic block.
    pub name: RStr<'static>,
    /// The plugin's own version.
    pub version: RStr<'static>,
    /// The manifest that it was built with, TOML.
    pub manifest: RStr<'static>,
    /// [any] JSON Schema of its settings.
    pub schema: extern "C" fn() -> RResult<RString, RawError>,
    /// [any] Settings as JSON (an object, or null), completed and checked.
    pub resolve: extern "C" fn(json: RStr<'_>) -> RResult<RString, RawError>,
    /// [any] An instance with these settings. The host destroys it.
    pub create: extern "C" fn(json: RStr<'_>) -> RResult<RawInstance, RawError>,
    /// [any] Takes an instance back, once, when no call on it is under way.
    pub destroy: extern "C" fn(instance: RawInstance),
    /// Revision of a capability by its name, 0 if the plugin has none of that name: how additions that need no new
    /// function are asked for. Version 1.0 names "merge", "train" and "sample".
    pub capability: extern "C" fn(name: RStr<'_>) -> u32,
    /// The functions of a merge strategy, if it is one.
    pub merge: ROption<MergeTableRef>,
    /// The functions of a trainer, if it is one.
    pub train: ROption<TrainTableRef>,
    /// The functions of a sampler, if it is one.
    #[sabi(last_prefix_field)]
    pub sample: ROption<SampleTableRef>,
}

impl RootModule for PluginRootRef {
    const BASE_NAME: &'static str = "blocklora_plugin";
    const NAME: &'static str = "blocklora_plugin";
    // Of the layout check only; our own version is in the magic block.
    const VERSION_STRINGS: VersionStrings = VersionStrings::new("1.0.0");

    // Never used: loading through it would give every library the first one's module.
    abi_stable::declare_root_module_statics! {PluginRootRef}
}

/// What [`export_plugin!`](crate::export_plugin) says about a plugin.
pub trait Exported: 'static {
    /// The method.
    type Plugin: Config + Send + Sync + 'static;
    /// `<kind>-<id>`.
    const NAME: &'static str;
    /// Of the crate.
    const VERSION: &'static str;
    /// The manifest's text.
    const MANIFEST: &'static str;
    /// The functions of a merge strategy.
    const MERGE: ROption<MergeTableRef> = ROption::RNone;
    /// The functions of a trainer.
    const TRAIN: ROption<TrainTableRef> = ROption::RNone;
    /// The functions of a sampler.
    const SAMPLE: ROption<SampleTableRef> = ROption::RNone;
}

struct Root<E>(PhantomData<E>);

impl<E: Exported> Root<E> {
    staticref!(const ROOT: WithMetadata<PluginRoot> = WithMetadata::new(PluginRoot {
        name: RStr::from_str(E::NAME),
        version: RStr::from_str(E::VERSION),
        manifest: RStr::from_str(E::MANIFEST),
        schema: Self::schema,
        resolve: Self::resolve,
        create: Self::create,
        destroy: Self::destroy,
        capability: Self::capability,
        merge: E::MERGE,
        train: E::TRAIN,
        sample: E::SAMPLE,
    }));

    extern "C" fn schema() -> RResult<RString, RawError> {
        guard(|| Ok(schema::<E::Plugin>()?.to_string().into()))
    }
    extern "C" fn resolve(json: RStr<'_>) -> RResult<RString, RawError> {
        guard(|| Ok(to_value(&read::<E>(json)?)?.to_string().into()))
    }
    extern "C" fn create(json: RStr<'_>) -> RResult<RawInstance, RawError> {
        guard(|| Ok(RawInstance::new(read::<E>(json)?)))
    }
    extern "C" fn destroy(instance: RawInstance) {
        // SAFETY: the host gives back what `create` made, once.
        guard_quietly((), || unsafe { instance.destroy::<E::Plugin>() });
    }
    extern "C" fn capability(name: RStr<'_>) -> u32 {
        let has = match name.as_str() {
            "merge" => E::MERGE.is_some(),
            "train" => E::TRAIN.is_some(),
            "sample" => E::SAMPLE.is_some(),
            _ => false,
        };
        u32::from(has)
    }
}

fn read<E: Exported>(json: RStr<'_>) -> Result<E::Plugin> {
    let json = serde_json::from_str(json.as_str())
        .map_err(|e| Error::new(Code::InvalidConfig, format!("the settings are no JSON: {e}")))?;
    resolve(&json)
}

extern "C" fn construct<E: Exported>() -> RootModuleResult {
    abi_stable::library::__call_root_module_loader(|| {
        remember_places();
        PluginRootRef(Root::<E>::ROOT.as_prefix())
    })
}

/// The header that abi_stable looks for.
pub const fn header<E: Exported>() -> LibHeader {
    // SAFETY: `construct` returns the prefix reference of the type named here.
    unsafe { LibHeader::from_constructor::<PluginRootRef>(construct::<E>, CheckTypeLayout::Yes) }
}
