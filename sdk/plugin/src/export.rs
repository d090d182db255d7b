//! Making a shared library of a plugin.

/// Makes the library of one plugin; to be used once in a crate whose `crate-type` has `cdylib`.
///
/// ```ignore
/// blocklora_sdk::export_plugin! {
///     merge: Blocklora,                                       // or train: ..., sample: ...
///     id: "blocklora",
///     manifest: include_str!("../merge-blocklora.toml"),
/// }
/// ```
/// Every call from the host is guarded: a panic becomes an error of the code
/// [`Code::Panicked`](crate::Code::Panicked) with the panic's message.
#[macro_export]
macro_rules! export_plugin {
    ($kind:ident : $plugin:ty, id: $id:literal, manifest: $manifest:expr $(,)?) => {
        /// The id that the library is exported with.
        pub const PLUGIN_ID: &str = $id;
        /// The manifest that the library is exported with.
        pub const PLUGIN_MANIFEST: &str = $manifest;
    };
}
