//! Where things lie.

use std::path::{Path, PathBuf};

use crate::config::{Bus, Config};
use crate::error::{Error, Result};

fn variable(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

/// The state folder: as configured, as systemd says, or the user's.
pub fn state_dir(config: &Config) -> Result<PathBuf> {
    if !config.daemon.state_dir.is_empty() {
        return Ok(PathBuf::from(&config.daemon.state_dir));
    }
    // systemd gives a list; ours has one entry.
    if let Some(folder) = variable("STATE_DIRECTORY") {
        return Ok(folder);
    }
    let home = || variable("HOME").map(|home| home.join(".local/state"));
    let state = variable("XDG_STATE_HOME").or_else(home).map(|state| state.join("blocklora"));
    state.ok_or_else(|| Error::option("no state folder: set daemon.state_dir, $XDG_STATE_HOME or $HOME"))
}

/// The socket to listen on; none: no socket.
pub fn socket(config: &Config) -> Result<Option<PathBuf>> {
    match config.daemon.socket.as_str() {
        "none" => Ok(None),
        "" if config.daemon.bus == Bus::System => Ok(Some("/run/blocklora/bus".into())),
        "" => match variable("XDG_RUNTIME_DIR") {
            Some(folder) => Ok(Some(folder.join("blocklora/bus"))),
            None => Err(Error::option("no place for the socket: set daemon.socket or $XDG_RUNTIME_DIR")),
        },
        path => Ok(Some(path.into())),
    }
}

/// The bundled model: installed, or in the source tree.
pub fn starter_model() -> Option<PathBuf> {
    let executable = std::env::current_exe().ok()?;
    let installed = executable.ancestors().nth(2).map(|prefix| prefix.join("share/blocklora/starter"));
    let from_tree = executable.ancestors().map(|folder| folder.join("daemon/starter"));
    // Built with another target folder, or installed by cargo: the tree that it was built from.
    let built_from = Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("starter");
    let folders = installed.into_iter().chain(from_tree).chain([built_from]);
    folders.map(|folder| folder.join("model")).find(|model| model.join("model_index.json").is_file())
}
