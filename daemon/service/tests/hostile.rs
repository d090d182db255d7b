//! Plugins that break their contract, in the host that people use, while a real model with adapters merged into it is
//! live: each is refused, failed or quarantined in one line that says the cure; this process lives, and the live weights
//! keep their bits.
//!
//! The libraries are those of `sdk/check/examples`. They ask a file what to do, whose name an environment variable says:
//! so the test runs itself again with that variable.
#![allow(clippy::unwrap_used)]

#[path = "hostile/cases.rs"]
mod cases;
mod support;

use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use blocklora_engine::generate::{GenerateRequest, Step, generate};
use blocklora_engine::merge::strategy::{MergeStrategy, Sum};
use blocklora_engine::train::{Concept, Dataset, TrainRequest, train};
use blocklora_sdk::manifest::PluginKind;
use blocklora_service::plugins::artefacts::Artefacts;
use blocklora_service::plugins::{Isolation, Options, PluginError, Plugins, State};
use blocklora_spec::{Kind, Storage};
use cases::{Case, Ends, cases};
use serde_json::{Value, json};
use support::host;
use support::live::{Live, starter};

const VARIABLE: &str = "BLOCKLORA_HOSTILE";
const MERGED: &[(&str, f32)] = &[("poodle", 1.0), ("zombie", 0.5)];

/// The folder that cargo builds into.
fn built() -> PathBuf {
    Path::new(env!("CARGO_BIN_EXE_blocklorad")).parent().unwrap().to_owned()
}

fn manifests() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../sdk/check/examples/hostile")
}

/// A folder with the hostile plugin of this kind.
fn installed(kind: PluginKind) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let (library, manifest) = (format!("libhostile_{kind}.so"), format!("{kind}-hostile.toml"));
    let built = built().join("examples").join(&library);
    let copied = std::fs::copy(&built, folder.path().join(&library));
    copied.unwrap_or_else(|e| panic!("{}: {e}: build it with cargo build --workspace --examples", built.display()));
    std::fs::copy(manifests().join(&manifest), folder.path().join(&manifest)).unwrap();
    folder
}

/// A host that knows what is in `folder`, and nothing from before.
fn fresh_host(folder: &tempfile::TempDir, isolation: Isolation) -> Plugins {
    drop(std::fs::remove_dir_all(folder.path().join("state")));
    host(folder, |options| {
        options.folders = vec![folder.path().to_owned()];
        options.isolation = isolation;
        options.silence_max = Duration::from_secs(3);
        options.scan_max = Duration::from_secs(3);
    })
}

/// Uses the hostile plugin of `kind` on the live model for what it is for.
fn use_it(live: &mut Live, plugins: &Plugins, kind: PluginKind, mode: &str) -> Result<(), String> {
    let say = |error: PluginError| error.to_string();
    match kind {
        PluginKind::Merge => {
            let strategy = plugins.strategy("hostile", &Value::Null).map_err(say)?;
            live.merge(&strategy).map_err(|e| e.to_string())
        }
        PluginKind::Sample => {
            let sampler = plugins.sampler("hostile", &Value::Null).map_err(say)?;
            let request = GenerateRequest {
                prompt: "a dog",
                negative_prompt: "",
                concepts: &[],
                steps: 3,
                guidance_scale: 2.0,
                sampler: sampler.as_ref(),
                seed: 1,
                width: 32,
                height: 32,
                count: 1,
            };
            let mut progress = |step: Step<'_>| {
                let cancels = matches!(mode, "ignores-cancel" | "never-ends") && step.step == 0;
                if cancels { Err(blocklora_engine::Error::Cancelled) } else { Ok(()) }
            };
            generate(&live.model, &request, &mut progress).map(drop).map_err(|e| e.to_string())
        }
        PluginKind::Train => {
            let settings = json!({ "steps": 1, "batch_size": 1, "rank": 1 });
            let trainer = plugins.trainer("hostile", &settings).map_err(say)?;
            let folder = tempfile::tempdir().unwrap();
            let dataset = Dataset::from_files(&[(starter().join("concepts/balloon_flat/0.png"), None)]).unwrap();
            let request = TrainRequest {
                concept: Concept { name: "thing".into(), class_word: "dog".into(), kind: Kind::Subject },
                seed: 1,
                output: folder.path().join("thing.safetensors"),
                resume: false,
                storage: Storage::F32,
                licence: None,
                created: None,
                sampler: None,
            };
            let result = train(&live.model, &dataset, trainer.as_ref(), &request, &mut |_| Ok(()));
            assert_eq!(request.output.exists(), result.is_ok(), "{mode}: an adapter was written");
            result.map(drop).map_err(|e| e.to_string())
        }
    }
}

fn run(live: &mut Live, before: &[u32], case: &Case, isolation: Isolation) {
    let name = format!("{} {} {isolation:?}", case.kind, case.mode);
    let folder = installed(case.kind);
    let plugins = fresh_host(&folder, isolation);
    std::fs::write(std::env::var(VARIABLE).unwrap().trim_start_matches('@'), &case.mode).unwrap();
    let result = Arc::new(Artefacts::default()).during(|| use_it(live, &plugins, case.kind, &case.mode));
    let entry = plugins.list().0.remove(0);
    println!("{name}: {result:?}");
    match (&case.ends, result) {
        (Ends::Well, Ok(())) => {
            let strategy: Arc<dyn MergeStrategy> = Arc::new(Sum);
            live.merge(&strategy).unwrap();
        }
        (Ends::Refused(says, cure), Err(message)) => {
            assert!(message.contains(says) && message.contains(cure), "{name}: {message}");
            assert_eq!((entry.state, entry.crashes), (State::Ready, 0), "{name}");
            assert!(!message.contains('\n'));
        }
        (Ends::Killed, Err(message)) => {
            assert!(message.contains("cancelled"), "{name}: {message}");
            assert_eq!((entry.state, entry.crashes), (State::Ready, 0), "{name}");
        }
        (Ends::Quarantined(says), Err(message)) => {
            assert!(says.iter().any(|says| message.contains(says)), "{name}: {message}");
            let State::Quarantined(reason) = entry.state else { panic!("{name}: {:?}", entry.state) };
            assert_eq!(entry.crashes, 1, "{name}");
            let again = use_it(live, &plugins, case.kind, "honest").unwrap_err();
            for message in [&message, &again] {
                assert!(message.contains(&reason) && !message.contains('\n'), "{name}: {message}");
                let cure = format!("blocklora plugin quarantine {}-hostile --lift", case.kind);
                assert!(message.contains("install a repaired version") && message.contains(&cure), "{name}: {message}");
            }
        }
        (ends, result) => panic!("{name} ended with {result:?}, not {ends:?}"),
    }
    assert!(live.bits() == before, "{name}: the live weights are other ones");
}

#[test]
fn every_way_of_breaking_the_contract_leaves_host_and_weights_alone() {
    if std::env::var_os(VARIABLE).is_none() {
        let folder = tempfile::tempdir().unwrap();
        let name = "every_way_of_breaking_the_contract_leaves_host_and_weights_alone";
        let mut again = Command::new(std::env::current_exe().unwrap());
        again.args([name, "--exact", "--nocapture", "--test-threads=1"]);
        again.env(VARIABLE, format!("@{}", folder.path().join("mode").display()));
        let output = again.output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        println!("{said}{}", String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success() && said.contains("1 passed"), "{}", output.status);
        return;
    }
    let mut live = Live::merged(MERGED);
    let before = live.bits();
    let cases = cases();
    for case in &cases {
        run(&mut live, &before, case, Isolation::Worker);
        if case.spares_its_process() {
            run(&mut live, &before, case, Isolation::InProcess);
        }
    }
    println!("{} cases", cases.len());
}

/// In this process a crash takes everything along; the next process knows whose it was.
#[test]
fn deaths_of_the_process_in_a_plugin_are_counted_and_quarantine_it() {
    const STATE: &str = "BLOCKLORA_HOSTILE_STATE";
    let open = |folder: &Path| {
        Plugins::new(Options {
            folders: vec![folder.to_owned()],
            state: folder.join("state"),
            isolation: Isolation::InProcess,
            ..Options::default()
        })
    };
    let mut live = Live::merged(&MERGED[..1]);
    if let Some(folder) = std::env::var_os(STATE) {
        let plugins = open(Path::new(&folder));
        use_it(&mut live, &plugins, PluginKind::Merge, "").unwrap();
        return;
    }
    let folder = installed(PluginKind::Merge);
    let dies = |mode: &str| {
        let name = "deaths_of_the_process_in_a_plugin_are_counted_and_quarantine_it";
        let mut again = Command::new(std::env::current_exe().unwrap());
        again.args([name, "--exact", "--test-threads=1"]).env(VARIABLE, mode).env(STATE, folder.path());
        again.output().unwrap().status.signal()
    };
    let known = || {
        let entry = open(folder.path()).list().0.remove(0);
        (entry.crashes, entry.state)
    };
    assert_eq!((dies("honest"), known()), (None, (0, State::Ready)));
    assert_eq!((dies("segfault-plan"), known()), (Some(11), (1, State::Ready)));
    assert_eq!((dies("abort-plan"), known()), (Some(6), (2, State::Ready)));
    // One that ends well in between starts the row anew.
    assert_eq!((dies("honest"), known()), (None, (2, State::Ready)));
    for crashes in [3, 4] {
        assert_eq!((dies("segfault-plan"), known()), (Some(11), (crashes, State::Ready)));
    }
    assert_eq!(dies("segfault-plan"), Some(11));
    let reason = "the last 3 processes that ran its code died in it";
    assert_eq!(known(), (5, State::Quarantined(reason.to_owned())));
    let error = use_it(&mut live, &open(folder.path()), PluginKind::Merge, "").unwrap_err();
    assert!(error.contains(reason) && error.contains("--lift"), "{error}");
}

/// Whatever a hostile plugin can do is done here.
#[test]
fn there_is_a_case_for_every_mode_of_the_hostile_plugins() {
    let between = |text: &str, before: &str, after: &str| -> Vec<String> {
        let found = text.split(before).skip(1).filter_map(|rest| rest.split_once(after));
        found.map(|(inside, _)| inside.to_owned()).filter(|name| !name.contains(['{', ' '])).collect()
    };
    let common = std::fs::read_to_string(manifests().join("mode.rs")).unwrap();
    let ways = between(&common, "is(\"", "\")");
    assert_eq!(ways.len(), cases::WAYS.len(), "{ways:?}");
    let cases = cases();
    for kind in [PluginKind::Merge, PluginKind::Sample, PluginKind::Train] {
        let source = manifests().with_file_name(format!("hostile_{kind}.rs"));
        let text = std::fs::read_to_string(source).unwrap() + &common;
        let places = between(&text, "misbehave(\"", "\")");
        assert!(places.len() >= 2, "{places:?}");
        let spread = places.iter().flat_map(|place| ways.iter().map(move |way| format!("{way}-{place}")));
        for mode in spread.chain(between(&text, "mode(\"", "\")")) {
            assert!(cases.iter().any(|case| case.kind == kind && case.mode == mode), "{kind} {mode} is in no case");
        }
    }
}

/// Libraries that are none, or of something else.
#[test]
fn what_is_no_plugin_of_this_abi_is_refused() {
    let mut live = Live::merged(MERGED);
    let before = live.bits();
    let mut refused = |what: &str, make: &dyn Fn(&Path), says: &str, cure: &str| {
        let folder = installed(PluginKind::Merge);
        make(&folder.path().join("libhostile_merge.so"));
        for isolation in [Isolation::InProcess, Isolation::Worker] {
            let plugins = fresh_host(&folder, isolation);
            let message = use_it(&mut live, &plugins, PluginKind::Merge, "").unwrap_err();
            println!("{what}: {message}");
            assert!(message.contains(says) && message.contains(cure) && !message.contains('\n'), "{what}: {message}");
            assert_eq!(plugins.list().0[0].crashes, 0, "{what}");
            assert!(live.bits() == before, "{what}: the live weights are other ones");
        }
    };
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../sdk/check/tests/refused.c");
    for (definition, says, cure) in [
        ("-DWORD=\"SOMEONE\"", "another program's", "export_plugin!"),
        ("-DMAJOR=2", "built for ABI 2.0, this release has 1.1", "install a newer BlockLoRA"),
        ("-DMINOR=99", "built for ABI 1.99, this release has 1.", "install a newer BlockLoRA"),
        ("-DMAJOR=0", "built for ABI 0.0", "cargo update -p blocklora-sdk"),
        ("-DABI_STABLE=\"0.9.0\"", "abi_stable 0.9.0", "rebuild"),
        ("-DNO_SYMBOL", "it has no blocklora_plugin_magic", "export_plugin!"),
        ("-DNO_BLOCK", "magic block is missing", "export_plugin!"),
        ("-DNOTHING", "its root is not readable", "rebuild"),
    ] {
        let compile = |file: &Path| {
            let target = format!("-DTARGET=\"{}-unknown-linux-gnu\"", std::env::consts::ARCH);
            let mut cc = Command::new("cc");
            let done = cc.args(["-shared", "-fPIC", "-o"]).arg(file).arg(&source).args([definition, &target]).status();
            assert!(done.unwrap().success());
        };
        refused(definition, &compile, says, cure);
    }
    let whole = std::fs::read(built().join("examples/libhostile_merge.so")).unwrap();
    for (what, bytes) in [
        ("not an ELF", &b"#!/bin/sh\necho plugin\n"[..]),
        ("empty", &[]),
        ("truncated ELF", &whole[..whole.len() / 2]),
        ("header of an ELF", &whole[..64]),
    ] {
        let cure = "build it for this machine, or copy it again whole";
        refused(what, &|file| std::fs::write(file, bytes).unwrap(), "not a library that this machine can load", cure);
    }
    // The names of the fields that cross: one of another name is another layout.
    let (name, other) = (b"set_alpha_to_one", b"set_alpha_to_two");
    let mut changed = whole.clone();
    let places: Vec<usize> = (0..whole.len() - name.len()).filter(|&i| whole[i..].starts_with(name)).collect();
    assert!(!places.is_empty());
    places.iter().for_each(|&place| changed[place..place + other.len()].copy_from_slice(other));
    let cure = "cargo update -p blocklora-sdk";
    refused("changed layout", &|file| std::fs::write(file, &changed).unwrap(), "layout", cure);
}
