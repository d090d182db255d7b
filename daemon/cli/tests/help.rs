//! The flag table: everything in it is explained, and manual pages and completions come from it.
#![allow(clippy::unwrap_used)]

mod common;

use common::{succeeds, temporary, text};

/// The subcommands that the help of `command` lists.
fn subcommands(help: &str) -> Vec<String> {
    let Some(list) = help.split("Commands:\n").nth(1) else { return Vec::new() };
    let lines = list.lines().take_while(|line| !line.trim().is_empty());
    let names = lines.filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    names.map(|line| line.split_whitespace().next().unwrap().to_owned()).filter(|name| name != "help").collect()
}

/// Every command with its own `-h`, subcommands included.
fn all() -> Vec<(Vec<String>, String)> {
    let mut found = Vec::new();
    let mut left: Vec<Vec<String>> = vec![vec![]];
    while let Some(command) = left.pop() {
        let short: Vec<&str> = command.iter().map(String::as_str).chain(["-h"]).collect();
        let help = succeeds(&short);
        for sub in subcommands(&help) {
            left.push([&command[..], &[sub]].concat());
        }
        found.push((command, help));
    }
    found
}

#[test]
fn every_command_option_and_argument_is_explained() {
    let all = all();
    let names: Vec<String> = all.iter().map(|(command, _)| command.join(" ")).collect();
    for expected in [
        "demo",
        "train",
        "generate",
        "merge",
        "inspect",
        "export",
        "import",
        "score",
        "separate",
        "adapters add",
        "adapters list",
        "adapters show",
        "adapters remove",
        "adapters export",
        "models list",
        "slots",
        "jobs list",
        "jobs watch",
        "jobs cancel",
        "plugin list",
        "plugin info",
        "plugin check",
        "plugin quarantine",
        "status",
        "doctor",
        "bench merge",
        "bench plugins",
        "bench step",
    ] {
        assert!(names.iter().any(|name| name == expected), "{expected} is not among {names:?}");
    }
    for (command, help) in &all {
        let command = command.join(" ");
        let (about, usage) = help.split_once("Usage: ").unwrap();
        assert!(!about.trim().is_empty(), "{command:?} does not say what it does");
        assert!(usage.starts_with("blocklora"), "{command:?}: {usage}");
        for line in help.lines() {
            // "  -o, --output <FILE>  What it is": an entry of the table, whose explanation may stand on the next line.
            let entry = line.trim_start();
            let is_entry = line.starts_with("  ") && (entry.starts_with('-') || entry.starts_with('<'));
            if !is_entry || !line[2..].starts_with(['-', '<', ' ']) || entry.starts_with("-> ") {
                continue;
            }
            let explained = entry.split_once("  ").is_some_and(|(_, text)| !text.trim().is_empty());
            let next = help.lines().skip_while(|l| *l != line).nth(1).unwrap_or_default();
            let continued = next.starts_with("          ") && !next.trim_start().starts_with('-');
            assert!(explained || continued, "{command:?}: {line:?} is not explained");
        }
    }
    assert!(all.iter().all(|(_, help)| !help.contains("__")), "hidden commands are listed");
}

/// Every command that prints something prints JSON when asked.
#[test]
fn every_command_has_json() {
    for (command, help) in all() {
        let is_group = command.is_empty() || help.contains("Commands:");
        assert!(is_group || help.contains("--json"), "{command:?} has no --json");
    }
}

#[test]
fn manual_pages_and_completions_are_made_from_the_table() {
    let folder = temporary();
    succeeds(["__man", text(folder.path())]);
    for (command, help) in all() {
        let page = [&["blocklora".to_owned()][..], &command].concat().join("-");
        let content =
            std::fs::read_to_string(folder.path().join(format!("{page}.1"))).unwrap_or_else(|e| panic!("{page}: {e}"));
        assert!(content.contains(".SH SYNOPSIS"), "{page}");
        for option in ["json", "threads", "daemon", "output"] {
            if help.contains(&format!("--{option}")) {
                assert!(content.contains(&format!("\\-\\-{option}")), "{page} does not have --{option}");
            }
        }
    }
    for (shell, needle) in [("bash", "_blocklora"), ("zsh", "#compdef blocklora"), ("fish", "complete -c blocklora")] {
        let script = succeeds(["__completions", shell]);
        // What packages run is offered to nobody.
        assert!(!script.contains("__man") && !script.contains("__completions"), "{shell}");
        assert!(script.contains(needle) && script.contains("adapters") && script.contains("like"), "{shell}");
    }
}
