//! `train` end to end: the same run gives the same file, also when it is interrupted or killed and resumed.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use blocklora_engine::image::Picture;
use blocklora_spec::{Adapter, Scheme};
use common::{fails, succeeds, temporary};

const STEPS: &str = "6";
const SETTINGS: &str = "batch_size = 1\nrank = 2\ncheckpoint_every = 2\n[augmentation]\nfill = 1.0\n";

/// A folder with pictures, a caption and settings.
fn prepare(folder: &Path, settings: &str) {
    let photos = folder.join("photos");
    std::fs::create_dir(&photos).unwrap();
    for (i, colour) in [[200, 30, 30], [30, 200, 30]].into_iter().enumerate() {
        let picture = Picture::filled(40, 40, colour).unwrap();
        std::fs::write(photos.join(format!("{i}.png")), picture.to_png(None).unwrap()).unwrap();
    }
    std::fs::write(photos.join("0.txt"), "a {c} on the beach").unwrap();
    std::fs::write(folder.join("settings.toml"), settings).unwrap();
}

/// `train` into `output`; `more` may set other options than the usual ones, and further ones.
fn train<'a>(output: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let mut args = vec!["train", "--images", "photos", "--class", "dog", "--config", "settings.toml", "--seed", "3"];
    for usual in [["--name", "milo"], ["--steps", STEPS]] {
        if !more.contains(&usual[0]) {
            args.extend(usual);
        }
    }
    args.extend(["-o", output]);
    args.extend(more);
    args
}

#[track_caller]
fn run_in(folder: &Path, args: &[&str]) -> String {
    let output = common::command().args(args).current_dir(folder).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Whether the state that a daemon keeps in `folder` has a checkpoint in it.
fn has_checkpoint(folder: &Path) -> bool {
    folder.read_dir().into_iter().flatten().flatten().map(|entry| entry.path()).any(|path| {
        if path.is_dir() { has_checkpoint(&path) } else { path.extension().is_some_and(|e| e == "checkpoint") }
    })
}

/// Starts training in slot 0 and waits for its first checkpoint.
fn start(folder: &Path, output: &str) -> Child {
    start_with(folder, output, &["--slot", "0"])
}

fn start_with(folder: &Path, output: &str, more: &[&str]) -> Child {
    let mut command = common::command();
    command.args(train(output, more)).current_dir(folder).stderr(Stdio::piped()).stdout(Stdio::null());
    let mut child = command.spawn().unwrap();
    let started = Instant::now();
    while !has_checkpoint(&folder.join(format!("{output}.checkpoint"))) {
        assert!(child.try_wait().unwrap().is_none(), "training ended before its first checkpoint");
        assert!(started.elapsed() < Duration::from_secs(120), "no checkpoint after two minutes");
        std::thread::sleep(Duration::from_millis(2));
    }
    child
}

/// As the README has it: the bundled model says with what settings concepts are taught on it.
#[test]
fn what_nobody_sets_is_as_the_models_folder_has_it() {
    let folder = temporary();
    let path = folder.path();
    prepare(path, "learning_rate = { unet = 2e-3 }\n");
    let settings_of = |file: &str, more: &[&str]| {
        let args = ["train", "--images", "photos", "--class", "dog", "--name", "milo", "--steps", "2", "-o", file];
        run_in(path, &[&args, more].concat());
        let adapter = Adapter::open(path.join(file)).unwrap();
        for token in adapter.tokens() {
            let vectors: Vec<_> = token.values.chunks(token.width).collect();
            assert!(vectors.windows(2).any(|pair| pair[0] != pair[1]), "{file}: {} has not moved", token.name);
        }
        adapter.manifest().algorithm.config.clone()
    };
    // What a plugin warns of is passed on.
    std::fs::write(path.join("limit.toml"), "token_norm_limit = 0.55\n").unwrap();
    let limited = ["train", "--images", "photos", "--class", "dog", "--name", "milo", "--steps", "1"];
    let limited = [&limited[..], &["-o", "limit.st", "--config", "limit.toml"]].concat();
    let output = common::command().args(limited).current_dir(path).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && stderr.contains("warning: token_norm_limit = 0.55 is not kept"), "{stderr}");
    let said = settings_of("none.st", &[]);
    assert_eq!((&said["batch_size"], &said["layers"], &said["steps"]), (&2.into(), &"all".into(), &2.into()));
    assert_eq!(said["learning_rate"]["unet"], 1e-3);
    let said = settings_of("some.st", &["--config", "settings.toml"]);
    assert_eq!((&said["batch_size"], &said["learning_rate"]["unet"]), (&2.into(), &2e-3.into()));
    assert_eq!(said["learning_rate"]["tokens"], 0.04);
}

#[test]
fn a_run_interrupted_or_killed_and_resumed_gives_the_same_bytes() {
    let folder = temporary();
    let path = folder.path();
    prepare(path, SETTINGS);
    let said = run_in(path, &train("whole.st", &["--slot", "0", "--json"]));
    let said: serde_json::Value = serde_json::from_str(&said).unwrap();
    assert_eq!(said["slot"], 0);
    let whole = std::fs::read(path.join("whole.st")).unwrap();
    run_in(path, &train("again.st", &["--slot", "0", "--threads", "1"]));
    assert!(whole == std::fs::read(path.join("again.st")).unwrap(), "the same run gave another file");

    for (signal, name) in [("-INT", "interrupted.st"), ("-KILL", "killed.st"), ("-KILL", "alone.st")] {
        let child = start(path, name);
        // The last one is left alone by its daemon.
        let target = if name == "alone.st" { daemon_of(child.id()) } else { child.id() };
        assert!(Command::new("kill").args([signal, &target.to_string()]).status().unwrap().success());
        let ended = child.wait_with_output().unwrap();
        // The daemon of a killed run notices a moment later, and then leaves its last checkpoint.
        std::fs::File::open(path.join(format!("{name}.checkpoint"))).unwrap().lock().unwrap();
        assert!(!path.join(name).exists(), "{name} is there although training did not finish");
        assert!(path.join(format!("{name}.checkpoint")).exists());
        if signal == "-INT" {
            let stderr = String::from_utf8_lossy(&ended.stderr);
            assert_eq!(ended.status.code(), Some(130), "{stderr}");
            assert!(stderr.contains("--resume") && stderr.contains("interrupted.st.checkpoint"), "{stderr}");
        }
        if name == "alone.st" {
            let stderr = String::from_utf8_lossy(&ended.stderr);
            assert_eq!(ended.status.code(), Some(1), "{stderr}");
            assert!(stderr.contains("alone.st.checkpoint is kept") && stderr.contains("--resume"), "{stderr}");
        }
        fails(path, 1, &train(name, &["--slot", "0"]), &["checkpoint", "--resume"]);
        fails(path, 1, &train(name, &["--slot", "1", "--resume"]), &["checkpoint"]);
        let said = run_in(path, &train(name, &["--slot", "0", "--resume", "--json"]));
        let said: serde_json::Value = serde_json::from_str(&said).unwrap();
        assert!(said["resumed_at"].as_u64().unwrap() >= 2, "{said}");
        assert!(whole == std::fs::read(path.join(name)).unwrap(), "{name} differs from the run in one go");
        assert!(!path.join(format!("{name}.checkpoint")).exists());
    }
}

/// The private daemon of the command `parent`.
fn daemon_of(parent: u32) -> u32 {
    let output = Command::new("ps").args(["-o", "pid=", "--ppid", &parent.to_string()]).output().unwrap();
    String::from_utf8(output.stdout).unwrap().trim().parse().unwrap()
}

#[test]
fn resume_needs_a_checkpoint_of_the_daemon_that_is_used() {
    let folder = temporary();
    let path = folder.path();
    prepare(path, SETTINGS);
    fails(path, 1, &train("x.st", &["--slot", "0", "--resume"]), &["x.st.checkpoint", "leave --resume out"]);
    // Left by a run that was cut off before its first checkpoint: nothing to go on from, and in nobody's way.
    std::fs::create_dir_all(path.join("x.st.checkpoint/jobs/1j1")).unwrap();
    fails(path, 1, &train("x.st", &["--slot", "0"]), &["x.st.checkpoint", "is not a checkpoint of this version"]);
    std::fs::write(path.join("x.st.checkpoint/run"), "").unwrap();
    run_in(path, &train("x.st", &["--slot", "0"]));
    assert!(!path.join("x.st.checkpoint").exists());
    let daemon = common::Daemon::start();
    let socket = daemon.socket();
    let on_daemon = ["--slot", "0", "--daemon", common::text(&socket), "--resume"];
    fails(path, 1, &train("y.st", &on_daemon), &["resume", "no checkpoint of this training"]);
    // That of a private daemon is not what a running one goes on from.
    std::fs::create_dir_all(path.join("y.st.checkpoint/checkpoints")).unwrap();
    std::fs::write(path.join("y.st.checkpoint/checkpoints/a.checkpoint"), "").unwrap();
    for options in [&on_daemon[..], &on_daemon[..4]] {
        fails(path, 1, &train("y.st", options), &["y.st.checkpoint", "--daemon private --resume"]);
    }
}

#[test]
fn what_could_not_be_written_is_not_trained_again() {
    let folder = temporary();
    let path = folder.path();
    prepare(path, SETTINGS);
    let child = start(path, "x.st");
    // In the way of the file.
    std::fs::create_dir_all(path.join("x.st/full")).unwrap();
    let ended = child.wait_with_output().unwrap();
    assert_eq!(ended.status.code(), Some(1), "{}", String::from_utf8_lossy(&ended.stderr));
    std::fs::remove_dir_all(path.join("x.st")).unwrap();
    fails(path, 1, &train("x.st", &["--slot", "0"]), &["checkpoint", "--resume"]);
    // It is written as it was trained.
    for (option, value) in [("--storage", "f16"), ("--licence", "CC-BY-4.0")] {
        let other = ["--slot", "0", "--resume", option, value];
        fails(path, 1, &train("x.st", &other), &["trained with another", option]);
    }
    let said = run_in(path, &train("x.st", &["--slot", "0", "--resume", "--json"]));
    let said: serde_json::Value = serde_json::from_str(&said).unwrap();
    assert_eq!((&said["resumed_at"], &said["slot"]), (&6.into(), &0.into()));
    assert_eq!(Adapter::open(path.join("x.st")).unwrap().manifest().name, "milo");
    assert!(!path.join("x.st.checkpoint").exists());
}

#[test]
fn slots_are_chosen_by_who_is_there() {
    let folder = temporary();
    let path = folder.path();
    prepare(path, SETTINGS);
    let slot = |name: &str| Adapter::open(path.join(name)).unwrap().manifest().partition.map(|p| p.slot);
    run_in(path, &train("a.safetensors", &["--steps", "1", "--name", "a"]));
    run_in(path, &train("b.safetensors", &["--steps", "1", "--name", "b"]));
    run_in(path, &train("c.safetensors", &["--steps", "1", "--name", "c", "--slot", "none"]));
    assert_eq!([slot("a.safetensors"), slot("b.safetensors"), slot("c.safetensors")], [Some(0), Some(1), None]);
    // Training one of them again keeps its slot.
    run_in(path, &train("a.safetensors", &["--steps", "1", "--name", "a"]));
    assert_eq!(slot("a.safetensors"), Some(0));
    let manifest = Adapter::open(path.join("a.safetensors")).unwrap().manifest().clone();
    assert_eq!(manifest.partition.map(|p| (p.scheme, p.capacity)), Some((Scheme::Contiguous, 16)));
    assert!(manifest.erasure_lambda > 0.0, "output erasure is on by default");
    // A slot in the settings counts unless an option says otherwise; a partition of its own has slots of its own.
    let partition = "[partition]\nscheme = \"strided\"\ncapacity = 2\nseed = 0\nslot = 1\n";
    std::fs::write(path.join("settings.toml"), format!("{SETTINGS}{partition}")).unwrap();
    run_in(path, &train("d.safetensors", &["--steps", "1", "--name", "d"]));
    run_in(path, &train("e.safetensors", &["--steps", "1", "--name", "e", "--slot", "0"]));
    assert_eq!([slot("d.safetensors"), slot("e.safetensors")], [Some(1), Some(0)]);
    fails(path, 2, &train("f.safetensors", &["--slot", "2"]), &["--slot 2", "0 to 1"]);
    // A seed means nothing where rows are not permuted: it is the same division, with the same slots taken.
    let partition = "[partition]\nscheme = \"contiguous\"\ncapacity = 16\nseed = 5\nslot = 2\n";
    std::fs::write(path.join("settings.toml"), format!("{SETTINGS}{partition}")).unwrap();
    run_in(path, &train("g.safetensors", &["--steps", "1", "--name", "g"]));
    std::fs::write(path.join("settings.toml"), SETTINGS).unwrap();
    run_in(path, &train("h.safetensors", &["--steps", "1", "--name", "h"]));
    assert_eq!([slot("g.safetensors"), slot("h.safetensors")], [Some(2), Some(3)]);
}

#[test]
fn an_interrupted_training_keeps_its_slot() {
    let folder = temporary();
    let path = folder.path();
    prepare(path, SETTINGS);
    let slot = |name: &str| Adapter::open(path.join(name)).unwrap().manifest().partition.map(|p| p.slot);
    let mut interrupted = start_with(path, "a.safetensors", &["--name", "a"]);
    assert!(Command::new("kill").args(["-INT", &interrupted.id().to_string()]).status().unwrap().success());
    assert_eq!(interrupted.wait().unwrap().code(), Some(130));
    // It is in nobody's way, and nobody is in its way, also who insists.
    run_in(path, &train("b.safetensors", &["--steps", "1", "--name", "b"]));
    run_in(path, &train("c.safetensors", &["--steps", "1", "--name", "c", "--slot", "0"]));
    run_in(path, &train("a.safetensors", &["--name", "a", "--resume"]));
    assert_eq!(["a", "b", "c"].map(|name| slot(&format!("{name}.safetensors"))), [Some(0), Some(1), Some(0)]);
    // Two that begin at once have a slot each.
    let both = ["d", "e"].map(|name| {
        let output = format!("{name}.safetensors");
        let mut command = common::command();
        command.args(train(&output, &["--steps", "1", "--name", name])).current_dir(path).stdout(Stdio::null());
        command.spawn().unwrap()
    });
    assert!(both.into_iter().all(|mut child| child.wait().unwrap().success()));
    let mut slots = ["d.safetensors", "e.safetensors"].map(slot);
    slots.sort_unstable();
    assert_eq!(slots, [Some(2), Some(3)]);
}

#[test]
fn plain_words_are_exported_beside_the_adapter_and_ed_lora_owns_all_rows() {
    let folder = temporary();
    let path = folder.path();
    prepare(path, &format!("tokens = \"plain\"\n{SETTINGS}"));
    run_in(path, &train("plain.safetensors", &["--steps", "1", "--method", "ed-lora", "--storage", "f16"]));
    assert!(path.join("plain.embedding.safetensors").is_file());
    let adapter = Adapter::open(path.join("plain.safetensors")).unwrap();
    assert!(adapter.manifest().partition.is_none() && adapter.manifest().erasure_lambda == 0.0);
    assert!(adapter.tokens().iter().all(|t| t.layers == 1));
    fails(path, 2, &train("x.st", &["--method", "ed-lora", "--slot", "1"]), &["--slot", "blocklora"]);
    // What was trained can be drawn.
    let adapter = path.join("plain.safetensors");
    let picture = path.join("x.png");
    succeeds(["generate", "a <milo>", "--steps", "2", "--with", common::text(&adapter), "-o", common::text(&picture)]);
    assert!(picture.is_file());
}

#[test]
fn class_words_and_captions_are_checked_before_training() {
    let folder = temporary();
    prepare(folder.path(), SETTINGS);
    let args = |class: &'static str, name: &'static str| {
        ["train", "--images", "photos", "--class", class, "--name", name, "-o", "x.st", "--steps", "1"]
    };
    fails(folder.path(), 1, &args("xyzzyqwv", "x"), &["xyzzyqwv", "choose a more common word"]);
    fails(folder.path(), 1, &args("dog", "my dog"), &["my dog", "letters"]);
    // A word of the method's own is not taken for the class.
    std::fs::write(folder.path().join("rare.toml"), "rare_token = \"sks\"").unwrap();
    let rare = [&args("dog", "x")[..], &["--method", "dreambooth-lora", "--config", "rare.toml"]].concat();
    fails(folder.path(), 1, &rare, &["rare_token = sks", "one token of this model's vocabulary"]);
    fails(folder.path(), 1, &args("dog\t", "x"), &["class_word", "control"]);
    fails(folder.path(), 1, &[&args("dog", "x")[..], &["--licence", ""]].concat(), &["licence", "1 to 256"]);
    std::fs::write(folder.path().join("photos/0.txt"), "on the beach").unwrap();
    fails(folder.path(), 1, &args("dog", "x"), &["photos/0", "{c}"]);
}

#[test]
fn the_bench_of_a_step_says_time_and_memory() {
    let said = succeeds(["bench", "step", "--steps", "2", "--batch-size", "1", "--class", "dog", "--json"]);
    let said: serde_json::Value = serde_json::from_str(&said).unwrap();
    for method in ["blocklora", "ed-lora"] {
        assert!(said[method]["step_ms"].as_f64().unwrap() > 0.0);
        assert!(said[method]["peak_resident_bytes"].as_u64().unwrap() > 1 << 20);
    }
    assert!(said["blocklora"]["parameters"].as_u64() < said["ed-lora"]["parameters"].as_u64());
}

#[test]
fn silence_is_learned_alike_in_a_worker() {
    let folder = temporary();
    let path = folder.path();
    prepare(path, &format!("{SETTINGS}[silence]\nweight = 2.0\n"));
    let trained = |output: &str, isolation: &str| {
        let mut command = common::command();
        command.args(train(output, &["--slot", "0"])).env("BLOCKLORA_PLUGIN_ISOLATION", isolation).current_dir(path);
        let done = command.output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        std::fs::read(path.join(output)).unwrap()
    };
    let silent = trained("silent.st", "in-process");
    assert!(silent == trained("worker.st", "worker"), "a worker trained another file");
    std::fs::write(path.join("settings.toml"), SETTINGS).unwrap();
    assert!(silent != trained("loud.st", "in-process"), "the setting changed nothing");
}

#[test]
fn concepts_of_one_seed_have_an_a_of_their_own_and_merge() {
    let folder = temporary();
    let path = folder.path();
    prepare(path, SETTINGS);
    for name in ["milo", "zuko"] {
        run_in(path, &train(name, &["--name", name, "--steps", "1", "--method", "orthogonal"]));
    }
    let with = ["--with", "milo", "--with", "zuko", "--strategy", "orthogonal", "--steps", "1", "-o", "x.png"];
    run_in(path, &[&["generate", "<milo> and <zuko>"][..], &with].concat());
    // Of one slot they have the same A, whatever they are called, and the refusal says what to do.
    std::fs::write(path.join("settings.toml"), format!("allocation = \"allocated\"\n{SETTINGS}")).unwrap();
    for name in ["milo", "zuko"] {
        run_in(path, &train(name, &["--name", name, "--steps", "1", "--method", "orthogonal"]));
    }
    let asked = [&["generate", "<milo> and <zuko>"][..], &with].concat();
    fails(path, 1, &asked, &["same A", "\"allocated\" in another slot = N"]);
}

/// While pictures of the class are drawn for a training, others draw in between, and Ctrl-C ends it at once.
#[test]
fn drawing_the_prior_shows_itself_gives_way_and_ends_with_ctrl_c() {
    let folder = temporary();
    let path = folder.path();
    prepare(path, &format!("{SETTINGS}[prior]\nenabled = true\npictures = 1000\nsampling_steps = 500\n"));
    let daemon = common::Daemon::start();
    let on_daemon = |args: &[&str]| {
        let mut command = common::command();
        command.env("BLOCKLORA_DAEMON", daemon.socket()).args(args).current_dir(path);
        command
    };
    let mut command = on_daemon(&train("x.st", &["--slot", "0"]));
    let training = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let job = || {
        let output = on_daemon(&["jobs", "list", "--kind", "train", "--json"]).output().unwrap();
        let jobs: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        jobs[0].clone()
    };
    let started = Instant::now();
    while job()["stage"] != "prior" {
        assert!(started.elapsed() < Duration::from_secs(120), "no stage \"prior\" after two minutes: {}", job());
        std::thread::sleep(Duration::from_millis(20));
    }
    let drawn = on_daemon(&["generate", "a cat", "--steps", "2", "-o", "cat.png"]).output().unwrap();
    assert!(drawn.status.success(), "{}", String::from_utf8_lossy(&drawn.stderr));
    assert_eq!(job()["state"], "running", "the picture had to wait for the training's end");

    let asked = Instant::now();
    assert!(Command::new("kill").args(["-INT", &training.id().to_string()]).status().unwrap().success());
    let ended = training.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), Some(130), "{stderr}");
    assert!(stderr.contains("no step was trained yet"), "{stderr}");
    assert!(asked.elapsed() < Duration::from_secs(20), "it took {:?} to end", asked.elapsed());
    assert_eq!(job()["state"], "cancelled");
    assert!(!path.join("x.st").exists());
}

#[test]
fn the_steps_of_a_training_are_its_own_and_not_those_of_its_prior() {
    let folder = temporary();
    let path = folder.path();
    prepare(path, &format!("{SETTINGS}[prior]\nenabled = true\npictures = 2\nsampling_steps = 2\n"));
    let said = run_in(path, &train("x.st", &["--slot", "0", "--steps", "2", "--json"]));
    let said: serde_json::Value = serde_json::from_str(&said).unwrap();
    assert_eq!((said["steps"].as_u64(), said["resumed_at"].as_u64()), (Some(2), Some(0)), "{said}");
}

#[test]
fn every_line_of_the_captions_file_is_for_one_picture() {
    let folder = temporary();
    let path = folder.path();
    prepare(path, SETTINGS);
    let args = train("x.st", &["--slot", "0", "--steps", "1"]);
    let line = |name: &str, text: &str| serde_json::json!({"file_name": name, "text": text}).to_string();
    let write = |lines: &[String]| std::fs::write(path.join("photos/metadata.jsonl"), lines.join("\n")).unwrap();
    write(&[line("0.png", "a {c}"), String::new(), line("1.jpg", "a {c} at night"), line("9.png", "{c}")]);
    let needles = ["photos/metadata.jsonl", "line 3", "\"1.jpg\"", "correct file_name"];
    fails(path, 1, &args, &needles);
    write(&[line("0.png", "a {c}"), line("1.png", "{c}"), line("0.png", "a {c} at night")]);
    fails(path, 1, &args, &["photos/metadata.jsonl", "line 3", "\"0.png\"", "in line 1 already"]);
    write(&[line("1.png", "a {c} at night")]);
    run_in(path, &args);
}

/// A style's captions are never put into a template, so that one may be as long as the model can read.
#[test]
fn only_prompts_that_are_drawn_must_fit() {
    let folder = temporary();
    let path = folder.path();
    prepare(path, &format!("templates = true\n{SETTINGS}"));
    // Begin, end and the concept's two words have a place each.
    let words = common::model().tokenizer().length() - 4;
    std::fs::write(path.join("photos/0.txt"), format!("{{c}}{}", " a".repeat(words))).unwrap();
    let train = |kind, output| train(output, &["--slot", "0", "--steps", "1", "--kind", kind]);
    fails(path, 1, &train("subject", "x.st"), &["prompt", "a close-up of"]);
    run_in(path, &train("style", "style.st"));
}
