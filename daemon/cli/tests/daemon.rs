//! The commands as clients of the daemon: a private one leaves nothing behind, and the library keeps what is added.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use blocklora_engine::image::Picture;
use common::{Daemon, Make, adapter, is_one_clear_line, snapshot, succeeds, temporary, text};

/// A command with the library in `state`.
fn with_library(state: &Path, args: &[&str]) -> Output {
    common::command().env("XDG_STATE_HOME", state).args(args).output().unwrap()
}

#[track_caller]
fn json(output: &Output) -> serde_json::Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The private daemons that keep their files in `folder`; other tests have some of their own.
fn daemons(folder: &Path) -> Vec<String> {
    let output = Command::new("ps").args(["-eww", "-o", "pid=,args="]).arg("e").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let ours = format!("TMPDIR={}", folder.display());
    text.lines().filter(|l| l.contains("blocklorad --private") && l.contains(&ours)).map(str::to_owned).collect()
}

#[test]
fn a_picture_is_made_again_from_itself() {
    let folder = temporary();
    let path = folder.path();
    adapter(path, &Make::default());
    adapter(path, &Make { name: "zuko", slot: Some(1), ..Make::default() });
    let [milo, zuko] = ["milo.safetensors", "zuko.safetensors"].map(|name| path.join(name));
    let half = format!("{}=0.5", text(&zuko));
    let first = path.join("first.png");
    let drawn = [
        "generate",
        "a <milo> and a <zuko>",
        "--with",
        text(&milo),
        "--with",
        &half,
        "--negative",
        "a dog",
        "--steps",
        "3",
        "--seed",
        "11",
        "--guidance",
        "3.5",
        "--sampler",
        "euler-a",
        "--strategy",
        "average",
        "--precision",
        "f16",
        "-o",
        text(&first),
    ];
    succeeds(drawn);
    let same = |name: &str, more: &[&str]| {
        let again = path.join(name);
        succeeds([&["generate", "--like", text(&first), "-o", text(&again)], more].concat());
        Picture::load(&again).unwrap() == Picture::load(&first).unwrap()
    };
    assert!(same("again.png", &[]), "the picture drawn from itself is another one");
    assert!(!same("other.png", &["--seed", "12"]), "an option must count more than the picture");
    // The same bytes of the file, too, text and all.
    assert!(std::fs::read(path.join("again.png")).unwrap() == std::fs::read(&first).unwrap());
    // Without its adapter it cannot be made, and says which is missing.
    std::fs::remove_file(&zuko).unwrap();
    let output = common::blocklora(["generate", "--like", text(&first), "-o", text(&path.join("x.png"))]);
    assert_eq!(output.status.code(), Some(1));
    assert!(!path.join("x.png").exists());
    // A picture that says nothing.
    std::fs::write(path.join("plain.png"), Picture::filled(8, 8, [0; 3]).unwrap().to_png(None).unwrap()).unwrap();
    let args =
        ["generate", "--like", text(&path.join("plain.png")), "-o", text(&path.join("x.png"))].map(str::to_owned);
    is_one_clear_line(&common::blocklora(&args), 1, &["plain.png", "does not say how it was made"]);
}

/// A daemon for several commands, killed when dropped.
struct Shared(std::process::Child);

impl Shared {
    /// Its socket is `bus` in `folder`.
    fn start(folder: &Path) -> Self {
        let mut command = Command::new(Path::new(common::BLOCKLORA).with_file_name("blocklorad"));
        command.args(["--bus", "none", "--log", "warn", "--socket"]).arg(folder.join("bus"));
        command.arg("--state").arg(folder.join("state")).env("XDG_CONFIG_HOME", folder);
        let mut shared = Self(command.spawn().unwrap());
        while std::os::unix::net::UnixStream::connect(folder.join("bus")).is_err() {
            assert!(shared.0.try_wait().unwrap().is_none(), "the daemon ended at once");
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        shared
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn commands_that_share_a_daemon_do_not_share_a_precision() {
    let folder = temporary();
    let _daemon = Shared::start(folder.path());
    let draw = |name: &str, more: &[&str]| {
        let path = folder.path().join(name);
        let fixed = ["generate", "a dog", "--steps", "2", "-o", text(&path)];
        let mut command = common::command();
        let output =
            command.env("BLOCKLORA_DAEMON", folder.path().join("bus")).args(fixed).args(more).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        std::fs::read(path).unwrap()
    };
    let first = draw("first.png", &[]);
    let half = draw("half.png", &["--precision", "bf16"]);
    assert!(draw("again.png", &[]) == first, "another command's precision changed the picture");
    assert!(first != half);
    assert!(draw("like.png", &["--like", text(&folder.path().join("half.png"))]) == half);
}

#[test]
fn a_private_daemon_leaves_nothing_behind() {
    let folder = temporary();
    let path = folder.path();
    let (out, tmp, state) = (path.join("x.png"), path.join("tmp"), path.join("state"));
    std::fs::create_dir(&tmp).unwrap();
    let milo = adapter(path, &Make::default());
    let run = |args: &[&str]| {
        common::command().env("TMPDIR", &tmp).env("XDG_STATE_HOME", &state).args(args).output().unwrap()
    };
    let drawn = run(&["generate", "<milo>", "--with", text(&milo), "--steps", "2", "-o", text(&out), "--json"]);
    let said = json(&drawn);
    assert_eq!(said["files"][0], text(&out));
    assert_eq!(said["adapters"][0]["name"], "milo");
    assert!(drawn.stderr.is_empty(), "piped, it is quiet: {}", String::from_utf8_lossy(&drawn.stderr));
    assert_eq!(run(&["generate", "a cat", "--sampler", "magic", "-o", text(&out)]).status.code(), Some(1));
    assert!(snapshot(&tmp).is_empty(), "{:?}", snapshot(&tmp));
    // Files given with --with are for one job alone; what is known about plugins is kept for the next command.
    let state = state.join("blocklora");
    let kept = ["plugins.json", "plugins.lock", "running"].map(|name| state.join(name));
    let files: Vec<PathBuf> = snapshot(&state).into_keys().collect();
    let is_kept = |file: &PathBuf| kept.iter().any(|kept| file.starts_with(kept));
    assert!(files.contains(&kept[0]) && files.iter().all(is_kept), "{files:?}");
    assert!(daemons(&tmp).is_empty(), "a daemon outlives its command");
}

#[test]
fn a_command_that_is_stopped_at_once_leaves_nothing_behind() {
    for signals in [&["INT", "INT"][..], &["KILL"]] {
        let folder = temporary();
        let tmp = folder.path().join("tmp");
        std::fs::create_dir(&tmp).unwrap();
        let mut command = common::command();
        command.args(["generate", "a cat", "--steps", "900", "--count", "1000", "-o", "x.png"]);
        let mut child = command.current_dir(folder.path()).env("TMPDIR", &tmp).spawn().unwrap();
        common::until("a daemon with a state folder", || {
            !daemons(&tmp).is_empty() && snapshot(&tmp).keys().any(|file| file.ends_with("catalogue.sqlite"))
        });
        std::thread::sleep(Duration::from_millis(300));
        for signal in signals {
            let kill = Command::new("kill").args([&format!("-{signal}"), &child.id().to_string()]).status();
            assert!(kill.unwrap().success());
            std::thread::sleep(Duration::from_millis(20));
        }
        assert!(!child.wait().unwrap().success());
        common::until("the daemon's end", || daemons(&tmp).is_empty());
        assert!(snapshot(&tmp).is_empty(), "{signals:?}: {:?}", snapshot(&tmp));
        // Who is killed cannot remove the files that hold the pictures' places.
        let left = snapshot(folder.path());
        assert!(signals == ["KILL"] || left.len() == 1, "{left:?}");
    }
}

#[test]
fn a_quarantine_holds_for_every_command_and_for_the_daemon_that_runs() {
    let folder = temporary();
    let path = folder.path();
    let state = path.join("state");
    let out = path.join("x.png");
    let draw = ["generate", "a dog", "--sampler", "ddim", "--steps", "2", "-o", text(&out)];
    let quarantine = ["plugin", "quarantine", "sample-ddim"];
    let lift = ["plugin", "quarantine", "sample-ddim", "--lift"];
    let private = |args: &[&str]| with_library(&state, args);
    assert!(private(&draw).status.success());
    assert!(private(&quarantine).status.success());
    is_one_clear_line(&private(&draw), 1, &["sample-ddim is disabled", "plugin quarantine sample-ddim --lift"]);
    assert!(private(&lift).status.success());
    assert!(private(&draw).status.success());

    // The daemon has records of its own, as the machine's has.
    let daemon = Daemon::start();
    let socket = daemon.socket();
    let there = |args: &[&str]| private(&[args, &["--daemon", text(&socket)]].concat());
    assert!(there(&draw).status.success());
    assert!(there(&quarantine).status.success());
    is_one_clear_line(&there(&draw), 1, &["disabled"]);
    assert!(there(&lift).status.success());
    assert!(there(&draw).status.success());
}

#[test]
fn the_library_keeps_what_is_added() {
    let folder = temporary();
    let path = folder.path();
    let milo = adapter(path, &Make::default());
    let zuko = adapter(path, &Make { name: "zuko", slot: Some(1), ..Make::default() });
    let state = path.join("state");
    let run = |args: &[&str]| with_library(&state, args);
    assert_eq!(json(&run(&["adapters", "list", "--json"])), serde_json::json!([]));
    json(&run(&["adapters", "add", text(&milo), text(&zuko), "--json"]));
    let listed = json(&run(&["adapters", "list", "--json"]));
    let names: Vec<&str> = listed.as_array().unwrap().iter().map(|e| e["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["milo", "zuko"]);
    assert_eq!(json(&run(&["adapters", "list", "zu", "--json"])).as_array().unwrap().len(), 1);
    let shown = json(&run(&["adapters", "show", "milo", "--json"]));
    assert_eq!(shown["info"]["manifest"]["name"], "milo");
    let digest = shown["adapter"]["digest"].as_str().unwrap();
    let slots = json(&run(&["slots", "--json"]));
    assert_eq!(slots.as_array().unwrap().len(), 2);
    let map = String::from_utf8(run(&["slots"]).stdout).unwrap();
    assert!(map.contains("milo") && map.contains("16 slots"), "{map}");
    // Drawn by name, in the prompt alone or given, it is what the file draws.
    let draw = |with: &[&str], to: &Path| {
        let output = run(&[&["generate", "<milo>", "--steps", "2", "-o", text(to)], with].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        std::fs::read(to).unwrap()
    };
    let by_file = draw(&["--with", text(&milo)], &path.join("file.png"));
    assert!(by_file == draw(&["--with", "milo"], &path.join("name.png")));
    assert!(by_file == draw(&[], &path.join("prompt.png")));
    let unknown = run(&["generate", "<milo> and <nobody>", "-o", text(&path.join("x.png"))]);
    is_one_clear_line(&unknown, 1, &["<nobody>", "<milo>", "library"]);
    let exported = path.join("exported.safetensors");
    assert!(run(&["adapters", "export", &digest[..12], "-o", text(&exported)]).status.success());
    assert!(std::fs::read(&exported).unwrap() == std::fs::read(&milo).unwrap());
    // A LoRA's words go along, or it is said that they do not.
    let plain = adapter(path, &Make { name: "plain", slot: Some(2), vectors: 1, ..Make::default() });
    json(&run(&["adapters", "add", text(&plain), "--json"]));
    for (format, name) in [("kohya", "k-1.0"), ("diffusers", "d.safetensors"), ("peft", "p")] {
        let to = path.join(name);
        let said = json(&run(&["adapters", "export", "plain", "--format", format, "-o", text(&to), "--json"]));
        let words = path.join(format!("{}.embedding.safetensors", name.trim_end_matches(".safetensors")));
        assert_eq!(said["embedding"], text(&words));
        assert!(to.exists() && words.is_file(), "{format}");
        let to = path.join(format!("milo-{name}"));
        let output = run(&["adapters", "export", "milo", "--format", format, "-o", text(&to)]);
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success() && said.contains("words of <milo>") && said.lines().count() == 1, "{said}");
    }
    assert!(run(&["adapters", "remove", "plain"]).status.success());
    is_one_clear_line(&run(&["adapters", "show", "none"]), 1, &["none"]);
    is_one_clear_line(&run(&["adapters", "remove", "milo", "none"]), 1, &["none"]);
    assert!(run(&["adapters", "check"]).status.success());
    assert!(run(&["adapters", "remove", "milo", "zuko"]).status.success());
    assert_eq!(json(&run(&["adapters", "list", "--json"])), serde_json::json!([]));
}

#[test]
fn status_doctor_and_lists_say_what_is_there() {
    let status = succeeds(["status", "--json"]);
    let status: serde_json::Value = serde_json::from_str(&status).unwrap();
    assert_eq!(status["private"], true);
    assert_eq!(status["daemon"]["version"], env!("CARGO_PKG_VERSION"));
    assert!(succeeds(["status"]).contains("dpmpp-2m"));
    let doctor = succeeds(["doctor", "--json"]);
    let doctor: serde_json::Value = serde_json::from_str(&doctor).unwrap();
    let checks: Vec<&str> = doctor.as_array().unwrap().iter().map(|c| c["check"].as_str().unwrap()).collect();
    for check in ["program", "state", "model folder", "daemon", "device", "plugins"] {
        assert!(checks.contains(&check), "{check}: {checks:?}");
    }
    assert!(succeeds(["plugin", "list"]).contains("dpmpp-2m"));
    let info: serde_json::Value = serde_json::from_str(&succeeds(["plugin", "info", "sample-ddim", "--json"])).unwrap();
    assert_eq!(info["id"], "ddim");
    succeeds(["models", "list", "--json"]);
    succeeds(["jobs", "list", "--json"]);
    is_one_clear_line(&common::blocklora(["jobs", "cancel", "none"]), 1, &["none", "jobs list"]);
}

#[test]
fn a_leased_slot_is_given_back() {
    let daemon = common::Daemon::start();
    let socket = daemon.socket();
    let lease = async {
        let client = blocklora_client::Client::connect(text(&socket).parse().unwrap()).await.unwrap();
        let none = || blocklora_client::Options::new().into_dict();
        client.manager().await.unwrap().lease_slot(&none(), &none()).await.unwrap().0
    };
    let lease = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(lease);
    let slots = |more: &[&str]| common::blocklora([&["slots", "--daemon", text(&socket)], more].concat());
    assert!(String::from_utf8_lossy(&slots(&[]).stdout).contains(&lease), "the map shows what to give back");
    assert_eq!(json(&slots(&["--release", &lease, "--json"])), serde_json::json!({ "released": lease }));
    assert_eq!(json(&slots(&["--json"])), serde_json::json!([]));
    is_one_clear_line(&slots(&["--release", &lease]), 1, &["there is no lease", &lease]);
}

#[test]
fn a_daemon_that_is_not_there_is_exit_code_3() {
    let output = common::blocklora(["status", "--daemon", "./no/bus"]);
    is_one_clear_line(&output, 3, &["./no/bus", "--daemon"]);
    let output = common::command().env("BLOCKLORA_DAEMON", "nonsense").arg("status").output().unwrap();
    is_one_clear_line(&output, 2, &["BLOCKLORA_DAEMON", "nonsense"]);
    // A doctor without a patient says what to do for it.
    let output = common::blocklora(["doctor", "--daemon", "./no/bus"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stdout).contains("-> "));
}

#[test]
fn every_bundled_plugin_passes_plugin_check() {
    let folder = temporary();
    let built = Path::new(common::BLOCKLORA).parent().unwrap();
    let mut checked = 0;
    for plugin in Path::new(env!("CARGO_MANIFEST_DIR")).join("../../plugins").read_dir().unwrap() {
        let plugin = plugin.unwrap().path();
        let manifest = plugin.join(plugin.file_name().unwrap()).with_extension("toml");
        let Ok(said) = std::fs::read_to_string(&manifest) else { continue };
        let library = said.parse::<toml::Table>().unwrap()["library"].as_str().unwrap().to_owned();
        std::fs::copy(&manifest, folder.path().join(manifest.file_name().unwrap())).unwrap();
        let copy = folder.path().join(&library);
        std::fs::copy(built.join(&library), &copy).unwrap();
        let report = json(&common::blocklora(["plugin", "check", text(&copy), "--json"]));
        assert!(report["tests"].as_array().unwrap().len() > 5, "{report}");
        checked += 1;
    }
    assert!(checked >= 17, "{checked} plugins found");
}

/// The plugins of sdk/check/examples, one of which ends the process that its code runs in.
#[test]
fn when_a_private_daemon_dies_it_is_said_how_and_in_whose_code() {
    let folder = temporary();
    let manifests = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../sdk/check/examples/hostile");
    let built = Path::new(common::BLOCKLORA).with_file_name("examples").join("libhostile_sample.so");
    let copied = std::fs::copy(&built, folder.path().join("libhostile_sample.so"));
    copied.unwrap_or_else(|e| panic!("{}: {e}: cargo build --workspace --examples", built.display()));
    std::fs::copy(manifests.join("sample-hostile.toml"), folder.path().join("sample-hostile.toml")).unwrap();
    let folders = format!("{}:{}", folder.path().display(), Path::new(common::BLOCKLORA).with_file_name("").display());
    let picture = folder.path().join("x.png");
    let ways = [
        ("segfault-sample", "crashed (segmentation fault)"),
        ("abort-sample", "crashed (aborted)"),
        ("exit-sample", "ended its process (exit status 0)"),
    ];
    for (mode, says) in ways {
        let mut command = common::command();
        command.args(["generate", "a dog", "--sampler", "hostile", "--steps", "2", "-o"]).arg(&picture);
        command.env("BLOCKLORA_PLUGIN_PATH", &folders).env("BLOCKLORA_HOSTILE", mode);
        let output = command.env("XDG_STATE_HOME", folder.path()).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{said}");
        let crash = said.lines().next().unwrap();
        assert!(
            crash.starts_with(&format!("blocklora: the daemon {says} in the code of the plugin sample-hostile ")),
            "{said}"
        );
        assert!(crash.contains("BLOCKLORA_PLUGIN_ISOLATION=worker"), "{said}");
        assert!(said.lines().nth(1).unwrap().starts_with("blocklora: error: "), "{said}");
        assert!(!picture.exists());
    }
}
