//! What the end-to-end tests share: the real binary, the bundled model, and adapters made for it.
#![allow(clippy::unwrap_used, dead_code)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use blocklora_engine::model::Model;
use blocklora_engine::rng::{Rng, Stream};
use blocklora_engine::{DType, Device};
use blocklora_spec::{
    Algorithm, Base, Delta, Kind, Layer, Manifest, Partition, Scheme, Storage, Token, TokenVectors, Training,
};
use tempfile::TempDir;

/// The binary under test.
pub const BLOCKLORA: &str = env!("CARGO_BIN_EXE_blocklora");

/// The model folder that the binary uses by default.
pub fn model_dir() -> PathBuf {
    match std::env::var_os("BLOCKLORA_MODEL") {
        Some(dir) => dir.into(),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../starter/model"),
    }
}

/// That model, loaded once.
pub fn model() -> &'static Model {
    static MODEL: OnceLock<Model> = OnceLock::new();
    MODEL.get_or_init(|| Model::load(&model_dir(), &Device::Cpu, DType::F32).unwrap())
}

/// The command with a private daemon, whatever runs on this machine, and a library of its own that is empty.
pub fn command() -> Command {
    static STATE: OnceLock<TempDir> = OnceLock::new();
    let mut command = Command::new(BLOCKLORA);
    command.env("BLOCKLORA_DAEMON", "private").env("XDG_STATE_HOME", STATE.get_or_init(temporary).path());
    command
}

pub fn blocklora<I: IntoIterator<Item = S>, S: AsRef<std::ffi::OsStr>>(args: I) -> Output {
    command().args(args).output().unwrap()
}

/// Runs the command, which must succeed; its stdout.
#[track_caller]
pub fn succeeds<I: IntoIterator<Item = S>, S: AsRef<std::ffi::OsStr>>(args: I) -> String {
    let output = blocklora(args);
    assert!(output.status.success(), "{:?}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// `output` must be a failure told in one line of stderr that has all of `needles` in it.
#[track_caller]
pub fn is_one_clear_line(output: &Output, code: i32, needles: &[&str]) {
    let stderr = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(stderr.starts_with("blocklora: error: "), "{stderr}");
    for needle in needles {
        assert!(stderr.contains(needle), "{needle:?} is not in: {stderr}");
    }
    assert!(output.stdout.is_empty(), "{:?}", output.stdout);
}

/// Runs the command in `folder`: it must fail in one clear line, and change nothing in `folder`.
#[track_caller]
pub fn fails(folder: &Path, code: i32, args: &[&str], needles: &[&str]) {
    let before = snapshot(folder);
    let output = command().args(args).current_dir(folder).output().unwrap();
    is_one_clear_line(&output, code, needles);
    assert_eq!(snapshot(folder), before, "{args:?} changed files");
}

/// Every file below `folder` with its content's length and hash; folders with 0.
pub fn snapshot(folder: &Path) -> BTreeMap<PathBuf, (usize, u64)> {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut all = BTreeMap::new();
    for entry in folder.read_dir().unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            all.extend(snapshot(&path));
            all.insert(path, (0, 0));
        } else {
            let bytes = std::fs::read(&path).unwrap();
            let mut hasher = DefaultHasher::new();
            bytes.hash(&mut hasher);
            all.insert(path, (bytes.len(), hasher.finish()));
        }
    }
    all
}

/// What kind of adapter to make.
#[derive(Clone)]
pub struct Make<'a> {
    pub name: &'a str,
    pub slot: Option<u32>,
    /// Vectors of each token; 0 for one per cross-attention.
    pub vectors: usize,
    /// Size of the factors' entries: of the order of trained ones.
    pub scale: f32,
    /// Another base's digest.
    pub base: Option<&'a str>,
    pub architecture: Option<&'a str>,
}

impl Default for Make<'_> {
    fn default() -> Self {
        Self { name: "milo", slot: Some(0), vectors: 0, scale: 0.2, base: None, architecture: None }
    }
}

/// Writes a random adapter for the bundled model into `folder` as NAME.safetensors.
pub fn adapter(folder: &Path, make: &Make) -> PathBuf {
    let model = model();
    let rank = 2;
    let partition = make.slot.map(|slot| Partition { scheme: Scheme::Contiguous, capacity: 16, seed: 0, slot });
    let vectors = if make.vectors == 0 { model.cross_attention_layers() } else { make.vectors };
    let names = [1, 2].map(|i| format!("{}-{i}", make.name));
    let manifest = Manifest {
        name: make.name.to_owned(),
        kind: Kind::Subject,
        class_word: "dog".into(),
        tokens: names.iter().map(|name| Token { name: name.clone(), vectors }).collect(),
        base: Base {
            architecture: make.architecture.map_or(model.architecture(), str::to_owned),
            digest: make.base.unwrap_or(model.digest()).to_owned(),
        },
        algorithm: Algorithm {
            id: "blocklora".into(),
            version: "0".into(),
            digest: None,
            config: serde_json::json!({}),
        },
        partition,
        rank,
        alpha: 1.0,
        delta: Delta::Alpha,
        outputs: BTreeMap::new(),
        erasure_lambda: 0.0,
        training: Training { steps: 0, seed: 0, data_digest: "0".repeat(64) },
        licence: None,
        created: None,
        tensor_digest: String::new(),
    };
    let seed = make.name.bytes().fold(7, |h: u64, b| h.wrapping_mul(31).wrapping_add(b.into()));
    let mut factors = Vec::new();
    for (i, layer) in model.layers().iter().enumerate() {
        if !["to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj"].iter().any(|e| layer.name.ends_with(e)) {
            continue;
        }
        let mut rng = Rng::new(seed, Stream::Test, 0, i as u16);
        let mut normals = |n: usize| rng.normals(n).iter().map(|x| x * make.scale).collect::<Vec<f32>>();
        let rows = manifest.rows(layer.rows).len();
        factors.push((layer, normals(rank * layer.columns), normals(rows * rank)));
    }
    let layers: Vec<Layer> =
        factors.iter().map(|(layer, a, b)| Layer { name: &layer.name, outputs: layer.rows, a, b }).collect();
    let width = model.text_encoder().config().hidden_size;
    let tokens = names.map(|name| {
        let mut rng = Rng::new(seed, Stream::Test, 1, name.len() as u16);
        let values = rng.normals(vectors * width).iter().map(|x| 0.05 * x).collect();
        TokenVectors { name, layers: vectors, width, values }
    });
    let path = folder.join(format!("{}.safetensors", make.name));
    blocklora_spec::write(&path, &manifest, Storage::F32, &layers, &tokens).unwrap();
    path
}

/// A temporary folder.
pub fn temporary() -> TempDir {
    tempfile::tempdir().unwrap()
}

/// Waits until `happened`, for a minute.
#[track_caller]
pub fn until(what: &str, happened: impl Fn() -> bool) {
    let since = std::time::Instant::now();
    while !happened() {
        assert!(since.elapsed().as_secs() < 60, "{what} does not come");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

/// `path` as an argument.
pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A daemon that stays, on a socket.
pub struct Daemon {
    folder: TempDir,
    child: std::process::Child,
}

impl Daemon {
    /// Starts one and waits for its socket.
    pub fn start() -> Self {
        let folder = temporary();
        let program = Path::new(BLOCKLORA).with_file_name("blocklorad");
        assert!(program.is_file(), "{}: build it with `cargo build --workspace --bins`", program.display());
        let mut command = Command::new(program);
        command.args(["--bus", "none", "--log", "warn", "--socket"]).arg(folder.path().join("bus"));
        // What it finds out about plugins is its own.
        command.env("XDG_STATE_HOME", folder.path());
        let child = command.arg("--state").arg(folder.path().join("state")).spawn().unwrap();
        let daemon = Self { folder, child };
        let started = std::time::Instant::now();
        while !Path::new(&daemon.socket()).exists() {
            assert!(started.elapsed().as_secs() < 60, "the daemon has no socket after a minute");
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        daemon
    }

    /// Its socket.
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("bus")
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
