//! Why a plugin cannot be used.

use std::path::PathBuf;

use blocklora_sdk::manifest::PluginKind;

/// What can go wrong between the host and a plugin. Every message is one line that says the cure.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PluginError {
    /// There is none of this name.
    #[error("there is no {} {id:?}: choose one of {known}", noun(*.kind))]
    Unknown {
        /// What was looked for.
        kind: PluginKind,
        /// Its id.
        id: String,
        /// What there is.
        known: String,
    },
    /// A file of the plugin is missing or wrong, or was built for something else.
    #[error("plugin {}: {reason}", path.display())]
    Incompatible {
        /// The manifest or the library.
        path: PathBuf,
        /// Why, and the cure.
        reason: String,
    },
    /// It crashed or hung before.
    #[error("plugin {name} is quarantined: {reason}; {}", Self::cure_of_quarantine(name))]
    Quarantined {
        /// `<kind>-<id>`.
        name: String,
        /// What it did.
        reason: String,
    },
    /// Somebody wanted it not to be used.
    #[error(
        "plugin {name} is disabled: enable it with `blocklora plugin quarantine {name} --lift`, or use another one"
    )]
    Disabled {
        /// `<kind>-<id>`.
        name: String,
    },
    /// It crashed, hung or took too much memory just now.
    #[error("plugin {name} {reason}")]
    Crashed {
        /// `<kind>-<id>`.
        name: String,
        /// What it did.
        reason: String,
    },
    /// Its settings are wrong.
    #[error("settings of {name}: {reason}")]
    Settings {
        /// `<kind>-<id>`.
        name: String,
        /// The key and what is allowed.
        reason: String,
    },
    /// The host's own files or processes failed.
    #[error("{path}: {reason}", path = path.display())]
    Host {
        /// The file or program.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}

impl PluginError {
    /// What ends the quarantine of the plugin `name`.
    pub fn cure_of_quarantine(name: &str) -> String {
        format!("install a repaired version, or lift it with `blocklora plugin quarantine {name} --lift`")
    }
}

/// The host's result.
pub type Result<T, E = PluginError> = std::result::Result<T, E>;

/// What plugins of `kind` are called.
pub fn noun(kind: PluginKind) -> &'static str {
    match kind {
        PluginKind::Merge => "merge strategy",
        PluginKind::Train => "trainer",
        PluginKind::Sample => "sampler",
    }
}
