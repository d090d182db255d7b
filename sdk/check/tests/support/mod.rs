//! Plugins in folders of their own, and runs of the tests on them.
#![allow(dead_code)] // each test binary uses its part

use std::path::{Path, PathBuf};
use std::time::Duration;

use blocklora_check::{Level, Options, Outcome, Report, check};

pub const PROGRAM: &str = env!("CARGO_BIN_EXE_blocklora-check");

/// The folder that cargo builds into.
pub fn built() -> PathBuf {
    Path::new(PROGRAM).parent().unwrap().to_owned()
}

/// A hostile plugin of this kind, with its manifest, in a folder of its own.
pub fn hostile(kind: &str) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let name = format!("libhostile_{kind}.so");
    let file = folder.path().join(&name);
    std::fs::copy(built().join("examples").join(&name), &file).unwrap();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/hostile");
    let manifest = format!("{kind}-hostile.toml");
    std::fs::copy(source.join(&manifest), folder.path().join(&manifest)).unwrap();
    (folder, file)
}

/// Runs the tests on `file`, with the hostile plugins' mode `mode`; only those in `only`, all if it is empty.
pub fn run(file: &Path, mode: &str, level: Level, only: &[&str]) -> Report {
    let mode = format!("BLOCKLORA_HOSTILE={mode}");
    let options = Options {
        runner: vec!["env".into(), mode.into(), PROGRAM.into(), "__one".into()],
        level,
        only: only.iter().map(|name| (*name).to_owned()).collect(),
        seed: 3,
        limit: Duration::from_secs(120),
        is_cancelled: &|| false,
    };
    check(file, &options).unwrap()
}

/// What is not fine.
pub fn failures(report: &Report) -> Vec<&Outcome> {
    report.tests.iter().filter(|test| !test.status.is_fine()).collect()
}
