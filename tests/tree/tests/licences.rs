//! What cargo-deny would say about licences and sources, from `cargo metadata` and deny.toml, on any machine.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::process::Command;

use blocklora_tree::root;

fn deny() -> toml::Table {
    std::fs::read_to_string(root().join("deny.toml")).unwrap().parse().unwrap()
}

fn strings(list: &toml::Value) -> impl Iterator<Item = String> {
    list.as_array().unwrap().iter().map(|l| l.as_str().unwrap().to_owned())
}

/// The licences that every crate may have.
fn allowed() -> BTreeSet<String> {
    strings(&deny()["licenses"]["allow"]).collect()
}

/// Those that only the crate `name` may have besides.
fn excepted(name: &str) -> Vec<String> {
    let deny = deny();
    let exceptions = deny["licenses"]["exceptions"].as_array().unwrap();
    exceptions.iter().filter(|e| e["crate"].as_str() == Some(name)).flat_map(|e| strings(&e["allow"])).collect()
}

/// Whether an SPDX expression holds with `allowed` alone: AND binds tighter than OR; `/` is the old way to write OR.
fn holds(expression: &str, allowed: &BTreeSet<String>) -> bool {
    let expression = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let mut words = expression.split_whitespace().peekable();
    let result = any(&mut words, allowed);
    result && words.next().is_none()
}

type Words<'a> = std::iter::Peekable<std::str::SplitWhitespace<'a>>;

fn any(words: &mut Words, allowed: &BTreeSet<String>) -> bool {
    let mut result = all(words, allowed);
    while words.next_if_eq(&"OR").is_some() {
        result |= all(words, allowed);
    }
    result
}

fn all(words: &mut Words, allowed: &BTreeSet<String>) -> bool {
    let mut result = one(words, allowed);
    while words.next_if_eq(&"AND").is_some() {
        result &= one(words, allowed);
    }
    result
}

fn one(words: &mut Words, allowed: &BTreeSet<String>) -> bool {
    match words.next() {
        Some("(") => {
            let inner = any(words, allowed);
            words.next_if_eq(&")").is_some() && inner
        }
        Some(licence) => {
            let exception = words.next_if_eq(&"WITH").and_then(|_| words.next());
            allowed.contains(&exception.map_or(licence.to_owned(), |e| format!("{licence} WITH {e}")))
        }
        None => false,
    }
}

#[test]
fn expressions_are_read_as_spdx_means_them() {
    let allowed = allowed();
    for good in ["MIT", "MIT/Apache-2.0", "(MIT OR GPL-3.0) AND Unicode-3.0", "GPL-3.0 OR MIT AND Zlib"] {
        assert!(holds(good, &allowed), "{good}");
    }
    for bad in ["GPL-3.0", "MIT AND GPL-3.0", "(MIT", "MIT MIT", "", "MIT WITH GPL-exception"] {
        assert!(!holds(bad, &allowed), "{bad}");
    }
}

#[test]
fn every_dependency_has_an_allowed_licence_and_comes_from_the_registry() {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--locked", "--format-version", "1", "--filter-platform", "x86_64-unknown-linux-gnu"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    assert!(packages.len() > 50);
    let allowed = allowed();
    for package in packages {
        let name = format!("{} {}", package["name"].as_str().unwrap(), package["version"].as_str().unwrap());
        let licence = package["license"].as_str().unwrap_or_default();
        let mut allowed = allowed.clone();
        allowed.extend(excepted(package["name"].as_str().unwrap()));
        assert!(holds(licence, &allowed), "{name}: licence {licence:?} is not allowed in deny.toml");
        if let Some(source) = package["source"].as_str() {
            assert!(source.starts_with("registry+") || source.starts_with("sparse+"), "{name} comes from {source}");
        }
    }
}
