//! The hostile files of `attacks/`: each breaks one rule of ADAPTER.md and must give its error.
//!
//! The files are made here and committed, so that other readers can be tried on them;
//! `BLOCKLORA_REGENERATE=1 cargo test -p blocklora-spec --test attacks` writes them anew.
#![allow(clippy::unwrap_used)]

#[path = "../common/mod.rs"]
mod common;
mod container;
mod manifest;
mod tensors;

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use blocklora_spec::{Adapter, Error, limits};
use common::raw::{Parts, container as pack};
use serde_json::Value;

/// A hostile file.
struct Attack {
    /// Its name in `attacks/`, without the extension.
    name: &'static str,
    bytes: Vec<u8>,
    /// What the error says besides the file's name.
    expected: &'static str,
}

fn attack(name: &'static str, bytes: Vec<u8>, expected: &'static str) -> Attack {
    Attack { name, bytes, expected }
}

/// The valid file with its bytes changed.
fn raw(edit: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut bytes = Parts::valid().bytes();
    edit(&mut bytes);
    bytes
}

/// The valid file with its parts changed, and signed again.
fn parts(edit: impl FnOnce(&mut Parts)) -> Vec<u8> {
    let mut parts = Parts::valid();
    edit(&mut parts);
    parts.sign();
    parts.bytes()
}

/// The valid file with another header.
fn header(edit: impl FnOnce(String) -> String) -> Vec<u8> {
    let parts = Parts::valid();
    pack(&edit(parts.header(&parts.manifest.to_string())), &parts.data)
}

/// The valid file with the first `from` in its header replaced.
fn header_with(from: &str, to: &str) -> Vec<u8> {
    header(|text| replaced(text, from, to))
}

/// The valid file with another text as its manifest.
fn manifest_text(edit: impl FnOnce(String) -> String) -> Vec<u8> {
    let parts = Parts::valid();
    pack(&parts.header(&edit(parts.manifest.to_string())), &parts.data)
}

/// The valid file with the manifest's value at a JSON pointer replaced.
fn manifest_with(pointer: &str, value: Value) -> Vec<u8> {
    let mut parts = Parts::valid();
    *parts.manifest.pointer_mut(pointer).unwrap() = value;
    parts.bytes()
}

fn replaced(text: String, from: &str, to: &str) -> String {
    assert!(text.contains(from), "{from} is not in {text}");
    text.replacen(from, to, 1)
}

fn attacks() -> Vec<Attack> {
    [container::attacks(), manifest::attacks(), tensors::attacks()].into_iter().flatten().collect()
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("attacks")
}

/// The error without the folder, which differs from machine to machine.
fn message(error: &Error) -> String {
    error.to_string().replace(&format!("{}/", folder().display()), "")
}

/// Writes or compares a committed file.
fn settle(path: &Path, content: &[u8]) {
    if std::env::var_os("BLOCKLORA_REGENERATE").is_some() {
        std::fs::create_dir_all(folder()).unwrap();
        std::fs::write(path, content).unwrap();
    }
    let committed = std::fs::read(path).unwrap_or_default();
    assert!(committed == content, "{} is not what this test makes; set BLOCKLORA_REGENERATE=1", path.display());
}

#[test]
fn each_gives_its_error() {
    assert!(Adapter::from_bytes("valid", parts(|_| {})).is_ok(), "without an attack the file is valid");
    let mut table = String::from(
        "# Hostile files\n\nEach breaks one rule of [ADAPTER.md](../ADAPTER.md); a reader must refuse it, with an error that \
         names what is wrong. The right column is what `Adapter::open` says. `tests/attacks/` makes the files and this \
         table.\n\n| file | error |\n|---|---|\n",
    );
    let mut faults = Vec::new();
    let mut known = BTreeSet::from(["README.md".to_owned()]);
    for Attack { name, bytes, expected } in attacks() {
        let file = format!("{name}.safetensors");
        let path = folder().join(&file);
        settle(&path, &bytes);
        let Err(error) = Adapter::open(&path) else {
            faults.push(format!("{name}: accepted"));
            continue;
        };
        let text = message(&error);
        assert!(text.starts_with(&format!("{file}: ")), "{name}: {text:?} does not begin with the file");
        if !text.contains(expected) {
            faults.push(format!("{name}: {text:?} does not say {expected:?}"));
        }
        assert!(text.len() < 600 && !text.contains(char::is_control), "{name}: {text:?} would harm a terminal");
        let from_bytes = Adapter::from_bytes(&path, bytes).expect_err(name);
        assert_eq!(message(&from_bytes), text, "{name}: mapped and given bytes are judged alike");
        let cell = text[file.len() + 2..].replace('|', "\\|");
        writeln!(table, "| {name} | {cell} |").unwrap();
        assert!(known.insert(file), "{name} occurs twice");
    }
    assert!(faults.is_empty(), "{faults:#?}");
    settle(&folder().join("README.md"), table.as_bytes());
    let present: BTreeSet<_> =
        std::fs::read_dir(folder()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    assert_eq!(present, known, "every file in attacks/ is made by this test");
}

/// Address space that the process has ever used, in KiB.
#[cfg(target_os = "linux")]
fn peak_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmPeak:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// No claim makes the reader reserve memory: all files together claim exabytes and hold a few hundred KiB.
#[cfg(target_os = "linux")]
#[test]
fn claims_cost_nothing() {
    let attacks = attacks();
    let total: usize = attacks.iter().map(|a| a.bytes.len()).sum();
    let before = peak_kib();
    for Attack { name, bytes, .. } in attacks {
        assert!(Adapter::from_bytes(name, bytes).is_err(), "{name}");
    }
    let grown = peak_kib() - before;
    // A thread of the test harness may reserve an arena of 64 MiB meanwhile.
    assert!(grown < 200 << 10, "{grown} KiB for files of {} KiB", total >> 10);
}

/// The widest permutations that a file may ask for are made in no time.
#[test]
fn permutations_are_bounded() {
    let mut outputs = serde_json::Map::new();
    let mut left = limits::DISTINCT_OUTPUTS_SUM_MAX;
    for m in (1..=limits::LAYER_WIDTH_MAX).rev() {
        if m > left {
            break;
        }
        left -= m;
        outputs.insert(format!("unet.layer{m}"), m.into());
    }
    let mut parts = Parts::valid();
    parts.tensors.clear();
    parts.data.clear();
    parts.manifest["rank"] = 1.into();
    parts.manifest["partition"] =
        serde_json::json!({"scheme": "permuted", "capacity": 65536, "seed": 1, "slot": 65535});
    let mut push = |name: String, shape: [u64; 2]| {
        let (begin, n) = (parts.data.len() as u64, shape[0] * shape[1] * 4);
        parts.data.resize((begin + n) as usize, 0);
        parts.tensors.push(common::raw::Tensor {
            name,
            dtype: "F32".into(),
            shape: shape.into(),
            offsets: [begin, begin + n],
        });
    };
    for name in outputs.keys() {
        push(format!("{name}.lora_A"), [1, 1]);
        push(format!("{name}.lora_B"), [1, 1]);
    }
    push("tokens.milo".into(), [2, 4]);
    parts.manifest["outputs"] = outputs.into();
    parts.sign();
    let start = std::time::Instant::now();
    let adapter = Adapter::from_bytes("wide", parts.bytes()).unwrap();
    assert!(adapter.layers().iter().all(|l| l.rows.len() == 1));
    assert!(start.elapsed().as_secs() < 5, "{:?}", start.elapsed());
}
