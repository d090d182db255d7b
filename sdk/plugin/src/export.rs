//! Making a shared library of a plugin.

/// Makes the library of one plugin; to be used once in a crate whose `crate-type` has `cdylib`.
///
/// ```
/// # use blocklora_sdk::{Config, Job, Result, merge::*};
/// # use schemars::JsonSchema;
/// # use serde::{Deserialize, Serialize};
/// # /// Nothing is merged.
/// # #[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
/// # #[serde(default, deny_unknown_fields)]
/// # pub struct Nothing {}
/// # impl Config for Nothing {}
/// # impl MergeStrategy for Nothing {
/// #     fn plan(&self, _: &dyn Job, layers: &[Layer], _: &[Adapter<'_>]) -> Result<Plan> {
/// #         Ok(layers.iter().map(|_| LayerPlan::Factored(vec![])).collect())
/// #     }
/// # }
/// blocklora_sdk::export_plugin! {
///     merge: Nothing,                                 // or train: ..., or sample: ...
///     id: "nothing",
///     manifest: "id = \"nothing\" # and so on; usually include_str!(\"../merge-nothing.toml\")",
/// }
/// ```
/// Every call from the host is guarded: a panic becomes an error of the code
/// [`Code::Panicked`](crate::Code::Panicked) with the panic's place and message.
#[macro_export]
macro_rules! export_plugin {
    (merge: $plugin:ty, id: $id:literal, manifest: $manifest:expr $(,)?) => {
        $crate::__export_plugin! { "merge", $plugin, $id, $manifest,
            const MERGE: $crate::abi::export::ROption<$crate::abi::export::MergeTableRef> =
                $crate::abi::export::ROption::RSome($crate::abi::export::MergePlugin::<$plugin>::REF);
        }
    };
    (train: $plugin:ty, id: $id:literal, manifest: $manifest:expr $(,)?) => {
        $crate::__export_plugin! { "train", $plugin, $id, $manifest,
            const TRAIN: $crate::abi::export::ROption<$crate::abi::export::TrainTableRef> =
                $crate::abi::export::ROption::RSome($crate::abi::export::TrainPlugin::<$plugin>::REF);
        }
    };
    (sample: $plugin:ty, id: $id:literal, manifest: $manifest:expr $(,)?) => {
        $crate::__export_plugin! { "sample", $plugin, $id, $manifest,
            const SAMPLE: $crate::abi::export::ROption<$crate::abi::export::SampleTableRef> =
                $crate::abi::export::ROption::RSome($crate::abi::export::SamplePlugin::<$plugin>::REF);
        }
    };
}

/// The part of [`export_plugin!`] that all kinds share.
#[doc(hidden)]
#[macro_export]
macro_rules! __export_plugin {
    ($kind:literal, $plugin:ty, $id:literal, $manifest:expr, $($table:tt)*) => {
        #[allow(unsafe_code, missing_docs)]
        const _: () = {
            struct Exported;
            impl $crate::abi::export::Exported for Exported {
                type Plugin = $plugin;
                const NAME: &'static str = concat!($kind, "-", $id);
                const VERSION: &'static str = env!("CARGO_PKG_VERSION");
                const MANIFEST: &'static str = $manifest;
                $($table)*
            }

            static MAGIC: $crate::abi::Magic = $crate::abi::Magic::new(concat!($kind, "-", $id));

            #[unsafe(no_mangle)]
            pub extern "C" fn blocklora_plugin_magic() -> *const $crate::abi::Magic {
                &MAGIC
            }

            // The name under which abi_stable looks for the header; the SDK's tests compare it.
            #[unsafe(export_name = "_1as_0lib_1header_0root_bmodule_bloader")]
            pub static HEADER: $crate::abi::export::LibHeader = $crate::abi::export::header::<Exported>();
        };
    };
}
