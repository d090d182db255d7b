//! Every plugin of this repository passes its conformance tests.
#![allow(clippy::unwrap_used)]

mod support;

use std::path::{Path, PathBuf};

use blocklora_check::Level;
use blocklora_sdk::Value;
use blocklora_sdk::abi::Library;
use blocklora_sdk::testing::Gaussian;
use support::{built, run};

/// The newest library of the plugin `name`.
fn library(name: &str) -> PathBuf {
    let library = format!("lib{}.so", name.replace('-', "_"));
    // `cargo build` puts it beside the programs, `cargo test` leaves it with what they depend on.
    let places = [built().join("deps").join(&library), built().join(&library)];
    let newest = places.into_iter().filter_map(|p| Some((p.metadata().ok()?.modified().ok()?, p))).max();
    newest.unwrap_or_else(|| panic!("{library} is not built: test with --workspace")).1
}

#[test]
fn every_plugin_conforms() {
    let plugins = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../plugins");
    let mut checked = 0;
    for folder in std::fs::read_dir(plugins).unwrap() {
        let folder = folder.unwrap().path();
        let Some(name) = folder.file_name().and_then(|n| n.to_str()).filter(|_| folder.is_dir()) else { continue };
        let found = library(name);
        let scratch = tempfile::tempdir().unwrap();
        let file = scratch.path().join(found.file_name().unwrap());
        std::fs::copy(&found, &file).unwrap();
        let manifest = format!("{name}.toml");
        std::fs::copy(folder.join(&manifest), scratch.path().join(&manifest)).unwrap();
        let report = run(&file, "", Level::Everything, &[]);
        assert!(report.passed, "{}", report.to_text());
        print!("{}", report.to_text());
        checked += 1;
    }
    assert!(checked >= 9, "{checked}");
}

#[test]
fn two_plugins_of_a_kind_keep_their_own_behaviour() {
    let open = |name| Library::open(&library(name)).unwrap();
    let (heun, euler_a) = (open("sample-heun"), open("sample-euler-a"));
    let again = open("sample-heun");
    assert_eq!((heun.name(), euler_a.name(), again.name()), ("sample-heun", "sample-euler-a", "sample-heun"));
    assert_ne!(heun.schema().unwrap(), euler_a.schema().unwrap());
    let run = |library: &Library| {
        let mut denoiser = Gaussian::new(vec![0.5; 4], vec![0.5; 4]).unwrap();
        let mut z = [0.1, -0.5, 1.0, 2.0];
        library.sampler(&Value::Null).unwrap().sample(&mut denoiser, &mut z, 10).unwrap();
        (z, denoiser.predictions)
    };
    let (first, predictions) = run(&heun);
    let (other, fewer) = run(&euler_a);
    assert_eq!((predictions, fewer), (19, 10));
    assert_ne!(first, other);
    assert_eq!((run(&again).0, run(&heun).0, run(&euler_a).0), (first, first, other));
}
