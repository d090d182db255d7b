//! Plugins that break their contract, each a real library: each fails the test that is about it, with a line that says
//! what to do, and whoever checks them goes on.
#![allow(clippy::unwrap_used)]

mod support;

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use blocklora_check::{Level, Options, Status, check};
use support::{PROGRAM, failures, hostile, run};

#[test]
fn the_honest_mode_of_each_passes() {
    for kind in ["merge", "sample", "train"] {
        let (_folder, file) = hostile(kind);
        let report = run(&file, "honest", Level::Behaviour, &[]);
        assert!(report.passed, "{}", report.to_text());
        assert!(report.tests.len() > 9 && failures(&report).is_empty(), "{}", report.to_text());
    }
    let (_folder, file) = hostile("merge");
    let report = run(&file, "dense", Level::Everything, &[]);
    assert!(report.passed, "{}", report.to_text());
}

/// Kind, mode, the test that is about it, how it ends, and what the line says.
const CASES: &[(&str, &str, &str, Status, &str)] = &[
    ("merge", "panic-defaults", "config.schema", Status::Failed, "no defaults today"),
    ("merge", "panic-check", "config.round-trip", Status::Failed, "no settings today"),
    ("merge", "panic-plan", "merge.plan", Status::Failed, "no plan today"),
    ("merge", "panic-fill", "merge.plan", Status::Failed, "no fill today"),
    ("merge", "segfault-plan", "merge.plan", Status::Crashed, "SIGSEGV"),
    ("merge", "segfault-fill", "merge.plan", Status::Crashed, "SIGSEGV"),
    ("merge", "abort-plan", "merge.plan", Status::Crashed, "SIGABRT"),
    ("merge", "exit-plan", "merge.plan", Status::Crashed, "return an error instead"),
    ("merge", "allocate-plan", "merge.plan", Status::OutOfMemory, "memory_mib"),
    ("merge", "nan", "merge.plan", Status::Failed, "not finite"),
    ("merge", "nan-fill", "merge.plan", Status::Failed, "not finite"),
    ("merge", "wrong-shape", "merge.plan", Status::Failed, "planned 2 layers"),
    ("merge", "rows-outside", "merge.plan", Status::Failed, "coefficients for"),
    ("merge", "adapter-outside", "merge.plan", Status::Failed, "adapter 99"),
    ("merge", "twice", "merge.identity", Status::Failed, "one adapter at weight 1"),
    ("merge", "tiles", "merge.tiles", Status::Failed, "compute each row alone"),
    ("sample", "panic-sample", "sample.contract", Status::Failed, "no sample today"),
    ("sample", "segfault-sample", "sample.contract", Status::Crashed, "SIGSEGV"),
    ("sample", "nan", "sample.contract", Status::Failed, "not finite"),
    ("sample", "wrong-shape", "sample.contract", Status::Failed, "numbers for"),
    ("sample", "wrong-timestep", "sample.contract", Status::Failed, "timestep -1"),
    ("sample", "ignores-steps", "sample.contract", Status::Failed, "1 step"),
    ("sample", "ignores-cancel", "sample.contract", Status::Failed, "cancelled in step"),
    ("sample", "silent", "sample.progress", Status::Failed, "step_done was called 0 times"),
    ("sample", "biased", "sample.lands", Status::Failed, "all data are"),
    ("train", "panic-plan", "train.plan", Status::Failed, "no plan today"),
    ("train", "panic-train", "train.learns", Status::Failed, "no train today"),
    ("train", "segfault-train", "train.learns", Status::Crashed, "SIGSEGV"),
    ("train", "wrong-shape", "train.plan", Status::Failed, "B"),
    ("train", "rows-outside", "train.plan", Status::Failed, "row"),
    ("train", "nan", "train.plan", Status::Failed, "finite"),
];

#[test]
fn each_way_of_breaking_the_contract_fails_its_test() {
    for (kind, mode, test, status, says) in CASES {
        let (_folder, file) = hostile(kind);
        let report = run(&file, mode, Level::Everything, &[test]);
        let [outcome] = &report.tests[..] else { panic!("{kind} {mode}: {}", report.to_text()) };
        assert_eq!(outcome.status, *status, "{kind} {mode}: {}", outcome.message);
        assert!(outcome.message.contains(says), "{kind} {mode}: {}", outcome.message);
        assert!(!outcome.message.contains('\n') && !report.passed);
    }
}

#[test]
fn a_plugin_that_hangs_is_ended() {
    let (_folder, file) = hostile("merge");
    let options = Options {
        runner: vec!["env".into(), "BLOCKLORA_HOSTILE=hang-plan".into(), PROGRAM.into(), "__one".into()],
        level: Level::Behaviour,
        only: vec!["merge.plan".into()],
        seed: 1,
        limit: Duration::from_secs(2),
        is_cancelled: &|| false,
    };
    let report = check(&file, &options).unwrap();
    assert_eq!(report.tests[0].status, Status::TimedOut);
    assert_eq!(report.tests[0].message, "it did not end within 2 s");
}

#[test]
fn a_run_that_was_cancelled_has_not_passed() {
    let (_folder, file) = hostile("merge");
    let asked = std::cell::Cell::new(0);
    let options = Options {
        runner: vec!["env".into(), "BLOCKLORA_HOSTILE=honest".into(), PROGRAM.into(), "__one".into()],
        level: Level::Behaviour,
        only: Vec::new(),
        seed: 1,
        limit: Duration::from_secs(60),
        // While the first tests run.
        is_cancelled: &|| asked.replace(asked.get() + 1) > 20,
    };
    let report = check(&file, &options).unwrap();
    assert!(failures(&report).is_empty() && !report.passed, "{}", report.to_text());
    assert!(report.to_text().ends_with("not all tests were run\n"), "{}", report.to_text());
}

/// Compiles the C file with these definitions into a library that a manifest names.
fn refused(definitions: &[&str]) -> (tempfile::TempDir, std::path::PathBuf) {
    let (folder, file) = hostile("merge");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/refused.c");
    let target = format!("-DTARGET=\"{}-unknown-linux-gnu\"", std::env::consts::ARCH);
    let mut cc = Command::new("cc");
    cc.args(["-shared", "-fPIC", "-o"]).arg(&file).arg(source).arg(target).args(definitions);
    assert!(cc.status().unwrap().success());
    (folder, file)
}

fn refusal(file: &Path) -> String {
    let report = run(file, "honest", Level::Everything, &[]);
    // Nothing else is worth trying.
    let [outcome] = &report.tests[..] else { panic!("{}", report.to_text()) };
    assert_eq!((outcome.test.as_str(), outcome.status), ("library.loads", Status::Failed), "{}", outcome.message);
    outcome.message.clone()
}

#[test]
fn what_is_no_plugin_of_this_abi_is_refused_with_the_cure() {
    let cases: &[(&[&str], &str, &str)] = &[
        (&["-DWORD=\"SOMEONE\""], "another program's", "export_plugin!"),
        (&["-DMAJOR=2"], "built for ABI 2.0, this release has 1.1", "install a newer BlockLoRA"),
        (&["-DMINOR=2"], "built for ABI 1.2, this release has 1.1", "install a newer BlockLoRA"),
        (&["-DMAJOR=0"], "built for ABI 0.0", "cargo update -p blocklora-sdk"),
        (&["-UTARGET", "-DTARGET=\"sparc-sun-solaris\""], "built for sparc-sun-solaris", "build it for"),
        (&["-DABI_STABLE=\"0.9.0\""], "abi_stable 0.9.0", "rebuild"),
        (&["-DNO_SYMBOL"], "it has no blocklora_plugin_magic", "export_plugin!"),
        (&["-DNO_BLOCK"], "magic block is missing", ""),
        (&[], "its root is not readable", "rebuild"),
    ];
    for (definitions, says, cure) in cases {
        let (_folder, file) = refused(definitions);
        let message = refusal(&file);
        assert!(message.contains(says) && message.contains(cure), "{definitions:?}: {message}");
    }
}

#[test]
fn what_is_no_library_is_refused() {
    let (_folder, file) = hostile("merge");
    let whole = std::fs::read(&file).unwrap();
    for bytes in [&b"#!/bin/sh\necho plugin\n"[..], &[], &whole[..whole.len() / 2], &whole[..64]] {
        std::fs::write(&file, bytes).unwrap();
        let message = refusal(&file);
        assert!(message.contains("build it for this machine, or copy it again whole"), "{message}");
    }
}

/// The names of the fields that cross, as abi_stable compares them: one of another name is another layout.
#[test]
fn another_layout_is_refused() {
    let (_folder, file) = hostile("merge");
    let mut bytes = std::fs::read(&file).unwrap();
    let (name, other) = (b"set_alpha_to_one", b"set_alpha_to_two");
    let places: Vec<usize> = (0..bytes.len() - name.len()).filter(|&i| bytes[i..].starts_with(name)).collect();
    assert!(!places.is_empty(), "the library has no such field");
    for place in places {
        bytes[place..place + other.len()].copy_from_slice(other);
    }
    std::fs::write(&file, bytes).unwrap();
    let message = refusal(&file);
    assert!(message.contains("layout") && message.contains("cargo update -p blocklora-sdk"), "{message}");
}

#[test]
fn manifests_that_lie_are_named() {
    let (folder, file) = hostile("merge");
    let path = folder.path().join("merge-hostile.toml");
    let honest = std::fs::read_to_string(&path).unwrap();
    for (from, to, test, says) in [
        ("kind = \"merge\"", "kind = \"sample\"", "library.loads", "kind"),
        ("version = \"0.1.0\"", "version = \"0.2.0\"", "manifest.agrees", "version"),
        ("summary = \"", "summary = \"Not: ", "manifest.agrees", "differs"),
        ("memory_mib = 64", "memory_mib = 0", "library.loads", "memory_mib = 0"),
        ("libhostile_merge.so", "libother.so", "library.loads", "no manifest names"),
    ] {
        let text = honest.replace(from, to).replace("laws = [\"identity\", \"order\", \"scale\"]\n", "");
        std::fs::write(&path, text).unwrap();
        let report = run(&file, "honest", Level::Loads, &[]);
        let outcome = report.tests.iter().find(|o| o.test == test).unwrap();
        assert_eq!(outcome.status, Status::Failed, "{to}");
        assert!(outcome.message.contains(says), "{to}: {}", outcome.message);
    }
}

#[test]
fn a_run_is_told_to_people_and_to_programs_and_can_be_repeated() {
    let (_folder, file) = hostile("merge");
    let call = |arguments: &[&str]| {
        let mut command = Command::new(PROGRAM);
        command.env("BLOCKLORA_HOSTILE", "twice").arg(&file).args(arguments).output().unwrap()
    };
    let json = call(&["--json", "--reproduce", "77"]);
    assert_eq!(json.status.code(), Some(1));
    let report: blocklora_check::Report = serde_json::from_slice(&json.stdout).unwrap();
    assert!(!report.passed && report.seed == 77 && report.plugin == "merge-hostile");
    let text = String::from_utf8(call(&["--reproduce", "77"]).stdout).unwrap();
    let line = text.lines().find(|line| line.contains("--test merge.identity")).unwrap();
    assert!(line.contains("--reproduce 77"), "{text}");
    let once = call(&["--reproduce", "77", "--test", "merge.identity", "--json"]);
    let repeated: blocklora_check::Report = serde_json::from_slice(&once.stdout).unwrap();
    let message =
        |r: &blocklora_check::Report| r.tests.iter().find(|t| t.test == "merge.identity").unwrap().message.clone();
    assert_eq!(message(&repeated), message(&report));
    assert_eq!(call(&["--level", "9"]).status.code(), Some(2));
    // The line that is printed for a test of the highest level runs that test, too.
    let text = String::from_utf8(call(&["--level", "3", "--test", "merge.random"]).stdout).unwrap();
    let line = text.lines().find_map(|line| line.trim().strip_prefix("blocklora plugin check "));
    let arguments: Vec<&str> = line.unwrap().split(' ').skip(1).collect();
    assert_eq!(String::from_utf8(call(&arguments).stdout).unwrap().lines().count(), text.lines().count(), "{text}");
}
