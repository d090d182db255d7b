//! Plugins that were built with the SDK of a release, and kept: every later host of the same major ABI version loads
//! them and gets the same numbers.
#![allow(clippy::unwrap_used)]

mod support;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use blocklora_engine::merge::strategy::{MergeStrategy, Sum};
use blocklora_sdk::manifest::PluginKind;
use blocklora_service::plugins::{Isolation, PluginError, Plugins, State};
use serde_json::{Value, json};
use support::host;
use support::live::Live;

/// Each fixture, by the ABI version that it was built for.
fn fixtures() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../sdk/plugin/fixtures");
    let mut folders: Vec<PathBuf> = folder.read_dir().unwrap().map(|entry| entry.unwrap().path()).collect();
    folders.sort();
    assert!(!folders.is_empty());
    folders
}

/// The library of the fixture in `folder`; none for this machine.
fn library(folder: &Path) -> Option<PathBuf> {
    let is_here = cfg!(all(target_os = "linux", target_env = "gnu", target_pointer_width = "64"));
    let path = folder.join(format!("libmerge_fixture-{}-linux-gnu.so", std::env::consts::ARCH));
    // Built for this one: it must be there.
    let is_kept = is_here && std::env::consts::ARCH == "x86_64";
    if is_here && (is_kept || path.is_file()) {
        return Some(path);
    }
    println!("{}: holds no library for this machine: the test does not apply", folder.display());
    None
}

/// A host that knows the fixture alone, as if it were installed.
fn installed(folder: &Path, library: &Path, isolation: Isolation) -> (tempfile::TempDir, Plugins) {
    let place = tempfile::tempdir().unwrap();
    std::fs::copy(folder.join("merge-fixture.toml"), place.path().join("merge-fixture.toml")).unwrap();
    std::fs::copy(library, place.path().join("libmerge_fixture.so")).unwrap();
    let plugins = host(&place, |options| {
        options.folders = vec![place.path().to_owned()];
        options.isolation = isolation;
    });
    (place, plugins)
}

#[test]
fn plugins_of_earlier_releases_merge_the_same_numbers() {
    for folder in fixtures() {
        let Some(library) = library(&folder) else { continue };
        // Engine and plugin sum each row of a dense layer in another order.
        const TOLERANCE: f32 = 1e-6;
        let mut live = Live::open(&[("poodle", 1.0), ("zombie", 0.5), ("teddy", -0.75)]);
        let pristine = live.bits();
        let factor = 0.5;
        for (_, weight) in &mut live.adapters {
            *weight *= factor;
        }
        live.merge(&(Arc::new(Sum) as Arc<dyn MergeStrategy>)).unwrap();
        let expected = live.weights();
        assert_ne!(live.bits(), pristine);
        for (_, weight) in &mut live.adapters {
            *weight /= factor;
        }
        for isolation in [Isolation::InProcess, Isolation::Worker] {
            let (_place, plugins) = installed(&folder, &library, isolation);
            let entry = &plugins.list().0[0];
            assert_eq!((&entry.state, entry.found.manifest.abi.as_str()), (&State::Ready, abi(&folder)));
            let strategy = plugins.strategy("fixture", &json!({ "factor": factor })).unwrap();
            live.merge(&strategy).unwrap();
            let merged = live.weights();
            let off = merged.iter().flatten().zip(expected.iter().flatten()).map(|(x, y)| (x - y).abs());
            let worst = off.fold(0.0, f32::max);
            println!("{} {isolation:?}: off by {worst}", folder.display());
            assert!(worst <= TOLERANCE, "{isolation:?}: off by {worst}");
            live.merger.apply(&[], &strategy).unwrap();
            assert_eq!(live.bits(), pristine);
        }
    }
}

/// `abi-1.0` holds what was built for ABI 1.0.
fn abi(folder: &Path) -> &str {
    folder.file_name().unwrap().to_str().unwrap().strip_prefix("abi-").unwrap()
}

#[test]
fn plugins_of_earlier_releases_tell_settings_and_errors() {
    for folder in fixtures() {
        let Some(library) = library(&folder) else { continue };
        for isolation in [Isolation::InProcess, Isolation::Worker] {
            let (_place, plugins) = installed(&folder, &library, isolation);
            let info = plugins.info(PluginKind::Merge, "fixture").unwrap();
            assert_eq!(info.schema["properties"]["factor"]["maximum"], 2.0);
            assert_eq!(info.defaults, json!({ "factor": 1.0, "fail": null }));
            for (settings, expected) in [
                (json!({ "factor": 3.0 }), "factor = 3: must be 2.0 or less"),
                (json!({ "factor": 0.0 }), "factor = 0: must not be 0"),
                (json!({ "lambda": 1.0 }), "unknown key lambda: the keys are"),
            ] {
                let error = plugins.strategy("fixture", &settings).map(drop).unwrap_err();
                assert!(matches!(&error, PluginError::Settings { .. }), "{error}");
                assert!(error.to_string().contains(expected), "{error}");
            }
            let mut live = Live::merged(&[("poodle", 1.0), ("zombie", 0.5)]);
            let before = live.bits();
            for (fail, expected) in [("error", "it was asked to fail"), ("panic", "it was asked to panic")] {
                let strategy = plugins.strategy("fixture", &json!({ "fail": fail })).unwrap();
                let error = live.merge(&strategy).unwrap_err().to_string();
                assert!(error.contains(expected) && !error.contains('\n'), "{error}");
                assert_eq!(live.bits(), before);
            }
            assert_eq!(plugins.list().0[0].crashes, 0);
            assert!(plugins.strategy("fixture", &Value::Null).is_ok());
        }
    }
}
