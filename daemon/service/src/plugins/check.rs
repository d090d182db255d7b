//! The conformance tests of plugins, each in a helper process.

use std::path::Path;
use std::time::Duration;

use blocklora_check::{Level, Options, Report};

use super::error::{PluginError, Result};
use super::helper;

/// The hidden command that runs one test.
pub const COMMAND: &str = "__plugin-check";

/// Each test's time limit.
pub const LIMIT: Duration = Duration::from_secs(60);

/// What to test.
pub struct Request<'a> {
    /// How much.
    pub level: Level,
    /// Only the tests of these names; all if it is empty.
    pub only: Vec<String>,
    /// Decides every random number.
    pub seed: u64,
    /// Whether the caller has cancelled.
    pub is_cancelled: &'a dyn Fn() -> bool,
}

/// Checks the library `file`, beside which its manifest lies. What is wrong with the plugin is in the report; fails if
/// no helper process can be started.
pub fn check(file: &Path, request: Request<'_>) -> Result<Report> {
    let Request { level, only, seed, is_cancelled } = request;
    let runner = vec![helper::program()?.into(), COMMAND.into()];
    let options = Options { runner, level, only, seed, limit: LIMIT, is_cancelled };
    blocklora_check::check(file, &options)
        .map_err(|e| PluginError::Host { path: file.to_owned(), reason: format!("the tests cannot be run: {e}") })
}
