//! Methods are plugins: neither the engine nor the daemon knows one by name.
#![allow(clippy::unwrap_used)]

use blocklora_tree::{root, rust_files};

/// Code that must not know methods.
const FOLDERS: &[&str] = &["daemon/engine/", "daemon/service/src/"];

/// Ids that are also words: the project's own name, a property of matrices, and two of everyday English. Of these only
/// a quoted id or a plugin's full name (`merge-ties`) counts.
const WORDS: &[&str] = &["blocklora", "orthogonal", "ties", "dare"];

/// Where the project's name stands quoted and means no method.
const PROJECT: &[(&str, &str)] = &[
    ("daemon/service/src/life/paths.rs", "state.join(\"blocklora\")"),
    ("daemon/service/src/plugins/mod.rs", ".join(\"blocklora\")"),
    // The adapter file itself, as a format beside those of other tools.
    ("daemon/service/src/dbus/adapter.rs", "\"blocklora\" => return Ok(vec![own_file(daemon, digest)?])"),
];

/// The full names of all plugins, and their ids and aliases.
fn names() -> (Vec<String>, Vec<String>) {
    let (mut full, mut ids) = (Vec::new(), Vec::new());
    for entry in std::fs::read_dir(root().join("plugins")).unwrap() {
        let folder = entry.unwrap().path();
        let Some(name) = folder.file_name().and_then(|name| name.to_str()).filter(|_| folder.is_dir()) else {
            continue;
        };
        let manifest: toml::Table =
            std::fs::read_to_string(folder.join(format!("{name}.toml"))).unwrap().parse().unwrap();
        ids.push(manifest["id"].as_str().unwrap().to_owned());
        let aliases = manifest.get("aliases").and_then(|a| a.as_table());
        ids.extend(aliases.into_iter().flat_map(|a| a.keys().cloned()));
        full.push(name.to_owned());
    }
    ids.sort();
    ids.dedup();
    (full, ids)
}

/// Whether `id` is in `line` as a word of its own or as part of one, with `-` or `_`: `sample_ddim`, `ddim-3`.
fn has(line: &str, id: &str) -> bool {
    let wanted: Vec<&str> = id.split('-').collect();
    let line = line.to_lowercase().replace('_', "-");
    line.split(|c: char| !c.is_ascii_alphanumeric() && c != '-').any(|word| {
        let parts: Vec<&str> = word.split('-').collect();
        parts.windows(wanted.len()).any(|window| window == wanted)
    })
}

fn finds(line: &str, full: &[String], ids: &[String]) -> Option<String> {
    let named = |id: &&String| match WORDS.contains(&id.as_str()) {
        true => line.contains(&format!("\"{id}\"")),
        false => has(line, id),
    };
    ids.iter().find(named).or_else(|| full.iter().find(|name| has(line, name))).cloned()
}

#[test]
fn neither_engine_nor_daemon_names_a_method() {
    let (full, ids) = names();
    let mut of_the_project = vec![false; PROJECT.len()];
    for (path, text) in rust_files().unwrap() {
        if !FOLDERS.iter().any(|folder| path.starts_with(folder)) || path.contains("/tests/") {
            continue;
        }
        for (i, line) in text.lines().enumerate() {
            let Some(name) = finds(line, &full, &ids) else { continue };
            let known = PROJECT.iter().position(|(file, code)| *file == path && line.contains(code));
            match known {
                Some(known) => of_the_project[known] = true,
                None => panic!("{path}:{}: names the method {name}: {}", i + 1, line.trim()),
            }
        }
    }
    assert!(of_the_project.iter().all(|seen| *seen), "PROJECT lists a line that is gone: {of_the_project:?}");
}

#[test]
fn the_search_finds_what_it_is_for() {
    let (full, ids) = names();
    assert!(ids.len() >= 15 && full.len() >= 17, "{ids:?}");
    for line in [
        "const DEFAULT: &str = \"dpmpp-2m\";",
        "let strategy = \"blocklora\".to_owned();",
        "if id == \"orthogonal\" {",
        "let file = \"libsample_heun.so\";",
        "use sample_ddim::Ddim;",
        "// as Euler's method does",
        "fn lcm() {}",
        "\"merge-dare\"",
    ] {
        assert!(finds(line, &full, &ids).is_some(), "{line}");
    }
    for line in ["use blocklora_sdk::Config;", "// orthogonal as matrices", "// ties are broken by id", "\"x-euler2\""]
    {
        assert_eq!(finds(line, &full, &ids), None, "{line}");
    }
}
