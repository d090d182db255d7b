//! Every plugin of this repository passes its conformance tests.
#![allow(clippy::unwrap_used)]

mod support;

use std::path::Path;

use blocklora_check::Level;
use support::{built, run};

#[test]
fn every_plugin_conforms() {
    let plugins = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../plugins");
    let mut checked = 0;
    for folder in std::fs::read_dir(plugins).unwrap() {
        let folder = folder.unwrap().path();
        let Some(name) = folder.file_name().and_then(|n| n.to_str()).filter(|_| folder.is_dir()) else { continue };
        let library = format!("lib{}.so", name.replace('-', "_"));
        // `cargo build` puts it beside the programs, `cargo test` leaves it with what they depend on.
        let places = [built().join("deps").join(&library), built().join(&library)];
        let newest = places.iter().filter_map(|p| Some((p.metadata().ok()?.modified().ok()?, p))).max();
        let (_, found) = newest.unwrap_or_else(|| panic!("{library} is not built: test with --workspace"));
        let scratch = tempfile::tempdir().unwrap();
        let file = scratch.path().join(&library);
        std::fs::copy(found, &file).unwrap();
        let manifest = format!("{name}.toml");
        std::fs::copy(folder.join(&manifest), scratch.path().join(&manifest)).unwrap();
        let report = run(&file, "", Level::Everything, &[]);
        assert!(report.passed, "{}", report.to_text());
        print!("{}", report.to_text());
        checked += 1;
    }
    assert!(checked >= 9, "{checked}");
}
