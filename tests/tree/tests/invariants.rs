//! The invariants of ARCHITECTURE.md.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use blocklora_tree::{files, root, rust_files};

/// Each crate, and the crates of this workspace that it may depend on.
const DEPENDENCIES: &[(&str, &str, &[&str])] = &[
    ("spec", "blocklora-spec", &[]),
    ("daemon/engine", "blocklora-engine", &["blocklora-spec"]),
    ("sdk/plugin", "blocklora-sdk", &["blocklora-spec"]),
    ("sdk/check", "blocklora-check", &["blocklora-sdk"]),
    ("sdk/client", "blocklora-client", &[]),
    (
        "daemon/service",
        "blocklora-service",
        &["blocklora-check", "blocklora-engine", "blocklora-sdk", "blocklora-spec"],
    ),
    (
        "daemon/cli",
        "blocklora-cli",
        &[
            "blocklora-check",
            "blocklora-client",
            "blocklora-engine",
            "blocklora-sdk",
            "blocklora-service",
            "blocklora-spec",
        ],
    ),
    ("tests/tree", "blocklora-tree", &[]),
];

/// Where `unsafe` may stand: the kernels, the maps of files, and the plugins' ABI.
const UNSAFE: &[&str] = &[
    "daemon/engine/src/ops/",
    "daemon/engine/src/merge/kernel",
    "daemon/engine/src/weights.rs",
    "spec/src/map.rs",
    "sdk/plugin/src/abi/",
    // A plugin that crashes, for the tests.
    "sdk/check/examples/hostile/",
];

/// Rust files that are tables, and may be long.
const TABLES: &[&str] = &[];

const LINES_MAX: usize = 520;
const FILE_BYTES_MAX: u64 = 24 << 20;
const GOLDEN_BYTES_MAX: u64 = 1 << 20;

fn manifest(folder: &str) -> toml::Table {
    std::fs::read_to_string(root().join(folder).join("Cargo.toml")).unwrap().parse().unwrap()
}

#[test]
fn crates_depend_in_one_direction() {
    let workspace = manifest(".");
    let mut members: Vec<&str> =
        workspace["workspace"]["members"].as_array().unwrap().iter().map(|m| m.as_str().unwrap()).collect();
    let mut known: Vec<&str> = DEPENDENCIES.iter().map(|(folder, ..)| *folder).collect();
    members.sort_unstable();
    known.push("plugins/*");
    known.sort_unstable();
    assert_eq!(members, known, "a new crate needs its place in DEPENDENCIES and in ARCHITECTURE.md");
    for (folder, name, allowed) in DEPENDENCIES {
        let manifest = manifest(folder);
        assert_eq!(manifest["package"]["name"].as_str(), Some(*name), "{folder}/Cargo.toml");
        for section in ["dependencies", "dev-dependencies", "build-dependencies"] {
            let Some(table) = manifest.get(section).and_then(|s| s.as_table()) else { continue };
            for dependency in table.keys().filter(|d| d.starts_with("blocklora")) {
                assert!(
                    allowed.contains(&dependency.as_str()),
                    "{folder}/Cargo.toml: {name} must not use {dependency}"
                );
            }
        }
    }
}

#[test]
fn plugins_see_the_sdk_only() {
    let mut seen = 0;
    for folder in std::fs::read_dir(root().join("plugins")).unwrap() {
        let folder = folder.unwrap().path();
        if !folder.is_dir() {
            continue;
        }
        let name = folder.file_name().unwrap().to_str().unwrap();
        let cargo = manifest(&format!("plugins/{name}"));
        assert_eq!(cargo["package"]["name"].as_str(), Some(name), "plugins/{name}: the package is named as its folder");
        for section in ["dependencies", "dev-dependencies", "build-dependencies"] {
            let Some(table) = cargo.get(section).and_then(|s| s.as_table()) else { continue };
            let ours = |d: &&String| d.starts_with("blocklora") || root().join("plugins").join(d).is_dir();
            for dependency in table.keys().filter(ours) {
                assert_eq!(dependency, "blocklora-sdk", "plugins/{name}/Cargo.toml must not use {dependency}");
            }
        }
        let described: toml::Table =
            std::fs::read_to_string(folder.join(format!("{name}.toml"))).unwrap().parse().unwrap();
        let field = |key: &str| described[key].as_str().unwrap().to_owned();
        assert_eq!(format!("{}-{}", field("kind"), field("id")), name);
        assert_eq!(field("library"), format!("lib{}.so", name.replace('-', "_")));
        seen += 1;
    }
    assert!(seen > 0, "there is no plugin");
}

/// The part of `line` before a line comment. Good enough for code formatted by rustfmt: no `//` in our strings but URLs.
fn code(line: &str) -> &str {
    line.split("//").next().unwrap_or_default()
}

#[test]
fn unsafe_stays_in_its_modules_and_gives_its_reason() {
    let mut seen = 0;
    for (path, text) in rust_files().unwrap() {
        if path.starts_with("tests/tree/") {
            continue;
        }
        let lines: Vec<&str> = text.lines().collect();
        for (i, line) in lines.iter().enumerate() {
            let code = code(line);
            let opens = ["unsafe {", "unsafe impl"].iter().any(|word| code.contains(word));
            if !opens {
                continue;
            }
            seen += 1;
            assert!(UNSAFE.iter().any(|m| path.starts_with(m)), "{path}:{}: unsafe outside {UNSAFE:?}", i + 1);
            // One reason may stand above a whole group, as above the loads and stores of one instruction set.
            let reason = lines[..=i].iter().any(|l| l.contains("SAFETY") || l.contains("# Safety"));
            assert!(reason, "{path}:{}: unsafe with no SAFETY comment above it", i + 1);
        }
    }
    assert!(seen > 0, "the search found no unsafe at all, not even the memory map: it is broken");
}

#[test]
fn files_are_short() {
    for (path, text) in rust_files().unwrap() {
        let lines = text.lines().count();
        assert!(lines <= LINES_MAX || TABLES.contains(&path.as_str()), "{path}: {lines} lines, more than {LINES_MAX}");
    }
}

#[test]
fn no_path_of_a_machine_is_in_the_tree() {
    // Put together from parts, so that this file does not find itself.
    let places: Vec<String> = ["work", "root", "home", "Users"].iter().map(|p| format!("/{p}/")).collect();
    for file in files().unwrap() {
        let Some(text) = file.text() else { continue };
        for (i, line) in text.lines().enumerate() {
            for place in &places {
                let starts = line.match_indices(place.as_str()).any(|(at, _)| {
                    let before = line[..at].chars().next_back();
                    !before.is_some_and(|c| c.is_alphanumeric() || "._-}/".contains(c))
                });
                assert!(!starts, "{}:{}: a path of one machine: {}", file.path, i + 1, line.trim());
            }
        }
    }
}

#[test]
fn nothing_large_is_committed() {
    let mut golden = 0;
    for file in files().unwrap() {
        assert!(file.bytes <= FILE_BYTES_MAX, "{}: {} bytes, more than {FILE_BYTES_MAX}", file.path, file.bytes);
        if file.path.starts_with("tests/golden/") {
            golden += file.bytes;
        }
    }
    assert!(golden <= GOLDEN_BYTES_MAX, "tests/golden holds {golden} bytes, more than {GOLDEN_BYTES_MAX}");
}

#[test]
fn architecture_names_every_module() {
    let text = std::fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    let mut missing = BTreeMap::new();
    for (path, _) in rust_files().unwrap() {
        // A module is a folder below src, or a file directly in src.
        let Some((krate, inside)) = path.split_once("/src/") else { continue };
        let module = inside.split('/').next().unwrap_or_default().trim_end_matches(".rs");
        if ["lib", "main"].contains(&module) {
            continue;
        }
        let named = [format!("`{module}`"), format!("`{module}/`"), format!("`{module}.rs`")];
        if !named.iter().any(|n| text.contains(n)) {
            missing.insert(format!("{krate}/src/{module}"), ());
        }
    }
    assert!(missing.is_empty(), "ARCHITECTURE.md does not name {:?}", missing.keys());
}
