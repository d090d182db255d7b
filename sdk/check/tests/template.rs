//! A crate outside the workspace, made from the template: it builds, passes its tests and the conformance tests
//! untouched, and merges 15 adapters.
#![allow(clippy::unwrap_used)]

mod support;

use std::path::Path;
use std::process::Command;

use blocklora_check::{Level, new_plugin};
use blocklora_sdk::Value;
use blocklora_sdk::abi::Library;
use blocklora_sdk::manifest::PluginKind;
use blocklora_sdk::testing::{Problem, merge};
use support::{built, run};

const KINDS: [(PluginKind, &str); 3] =
    [(PluginKind::Merge, "merge"), (PluginKind::Sample, "sample"), (PluginKind::Train, "train")];

#[test]
fn outside_crates_made_from_the_templates_conform() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let folder = tempfile::tempdir().unwrap();
    for (kind, name) in KINDS {
        let made = new_plugin("made-outside", kind, folder.path(), Some(&root.join("sdk/plugin"))).unwrap();
        // The versions that the repository is built with: nothing is fetched.
        std::fs::copy(root.join("Cargo.lock"), made.join("Cargo.lock")).unwrap();
        let mut cargo = Command::new(env!("CARGO"));
        cargo
            .args(["build", "--offline", "--quiet"])
            .current_dir(&made)
            .env("CARGO_TARGET_DIR", built().join("outside"));
        assert!(cargo.status().unwrap().success(), "{name} does not build");
        let library = format!("lib{name}_made_outside.so");
        let file = made.join(&library);
        std::fs::copy(built().join("outside/debug").join(&library), &file).unwrap();
        // Its manifest lies where the crate is; so does the library now.
        let report = run(&file, "", Level::Everything, &[]);
        assert!(report.passed && report.tests.len() > 10, "{}", report.to_text());
        if kind == PluginKind::Merge {
            let strategy = Library::open(&file).unwrap().strategy(&Value::Null).unwrap();
            let problem = Problem::random(5, 15, true);
            let merged = merge(&*strategy, &problem, 8).unwrap();
            for (index, layer) in problem.layers.iter().enumerate() {
                let mut sum = vec![0.0; layer.rows * layer.columns];
                for adapter in problem.adapters() {
                    adapter.factors(index).unwrap().add_delta(1.0, 0..layer.rows, &mut sum);
                }
                assert_eq!(merged[index], sum);
            }
        }
    }
}

#[test]
fn bad_ids_and_taken_folders_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    for id in ["", "Upper", "1st", "a b", "../up", "end-", &"x".repeat(65)] {
        assert!(new_plugin(id, PluginKind::Merge, folder.path(), None).is_err(), "{id}");
    }
    // Words that are taken in Rust or among the SDK's names.
    for (id, name) in [("self", "SelfMethod"), ("plan", "PlanMethod"), ("my-own", "MyOwnMethod")] {
        let made = new_plugin(id, PluginKind::Merge, folder.path(), None).unwrap();
        let code = std::fs::read_to_string(made.join("src/lib.rs")).unwrap();
        assert!(code.contains(&format!("pub struct {name} {{")), "{code}");
    }
    let made = new_plugin("mine", PluginKind::Merge, folder.path(), None).unwrap();
    let cargo = std::fs::read_to_string(made.join("Cargo.toml")).unwrap();
    assert!(cargo.contains("sdk/plugin\" }") && !cargo.contains("my-method"), "{cargo}");
    assert!(new_plugin("mine", PluginKind::Merge, folder.path(), None).unwrap_err().to_string().contains("exists"));
    let tree = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    for (sdk, reason) in [(tree.as_path(), "of something else"), (Path::new("/no/sdk"), "no SDK is there")] {
        let error = new_plugin("other", PluginKind::Merge, folder.path(), Some(sdk)).unwrap_err().to_string();
        assert!(
            error.contains(reason) && error.contains("--sdk") && !folder.path().join("merge-other").exists(),
            "{error}"
        );
    }
}
