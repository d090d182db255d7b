//! Bad input to every command is one clear line on stderr, an exit code that is not 0, and no file written.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;
use std::process::Command;

use common::{BLOCKLORA, Make, adapter, fails, is_one_clear_line, snapshot, temporary, text};

/// A small picture, as a PNG file.
fn picture(path: &Path) {
    let picture = blocklora_engine::image::Picture::filled(8, 8, [200, 30, 30]).unwrap();
    std::fs::write(path, picture.to_png(None).unwrap()).unwrap();
}

#[test]
fn usage_errors_are_one_line_with_exit_code_2() {
    let folder = temporary();
    let fails = |args: &[&str], needles: &[&str]| fails(folder.path(), 2, args, needles);
    fails(&["nonsense"], &["nonsense", "--help"]);
    fails(&["generate", "-o", "x.png"], &["<PROMPT>"]);
    fails(&["generate", "a cat", "--steps", "0", "-o", "x.png"], &["--steps", "0"]);
    fails(&["generate", "a cat", "--size", "12y", "-o", "x.png"], &["12y", "512x768"]);
    fails(&["generate", "a cat", "--with", "x=y", "-o", "x.png"], &["\"y\" is not a number"]);
    fails(&["merge", "-o", "x"], &["FILE"]);
    fails(&["inspect"], &["FILE"]);
    // A plot is not drawn over the second of two adapters.
    adapter(folder.path(), &Make::default());
    adapter(folder.path(), &Make { name: "zuko", slot: Some(1), ..Make::default() });
    fails(&["inspect", "--plot", "milo.safetensors", "zuko.safetensors"], &["--plot milo.safetensors", ".svg"]);
    fails(&["generate", "a cat", "--size", "5000000000", "-o", "x.png"], &["5000000000 pixels are too many"]);
    fails(&["export", "x.safetensors", "--format", "gif", "-o", "x"], &["gif", "kohya"]);
    fails(&["train", "--images", ".", "--class", "dog", "--name", "x"], &["--output"]);
    fails(&["train", "--images", ".", "--class", "dog", "--name", "x", "--slot", "16", "-o", "x"], &["0 to 15"]);
    fails(&["score", "--set", "x=nonsense"], &["nonsense"]);
    fails(&["score", "--sizes", "0"], &["--sizes"]);
    // Options that mean nothing are not ignored.
    for option in ["--layers=unet.", "--sizes=2"] {
        fails(&["score", "--drift", option], &["--drift", &option[..7]]);
        fails(&["score", "--cross-talk", option], &["--cross-talk", &option[..7]]);
    }
    fails(&["score", "--cross-talk", "--steps", "2"], &["--cross-talk", "--steps"]);
    fails(&["score", "--drift", "--set", "x=average,blocklora"], &["--set", "--drift", "one strategy"]);
    fails(&["score", "--cross-talk", "--set", "x=average"], &["--set", "--cross-talk", "blocklora"]);
    fails(&["bench", "start", "--steps", "2"], &["--steps"]);
    fails(&["bench", "text", "--latents", "2"], &["--latents"]);
    fails(&["bench", "unet", "--checkpointing"], &["--checkpointing"]);
    fails(&["doctor", "--precision", "f16"], &["--precision"]);
}

#[test]
fn missing_files_are_named() {
    let folder = temporary();
    let fails = |args: &[&str], needles: &[&str]| fails(folder.path(), 1, args, needles);
    fails(&["generate", "a cat", "--with", "gone.safetensors", "-o", "x.png"], &["gone.safetensors", "No such file"]);
    fails(&["merge", "gone.safetensors", "-o", "x"], &["gone.safetensors", "No such file"]);
    fails(&["inspect", "gone.safetensors"], &["gone.safetensors", "No such file"]);
    fails(&["export", "gone.safetensors", "--format", "kohya", "-o", "x"], &["gone.safetensors", "No such file"]);
    fails(&["train", "--images", "gone", "--class", "dog", "--name", "x", "-o", "x"], &["gone", "is not a folder"]);
    fails(&["score", "--set", "gone=average"], &["gone", "No such file"]);
    fails(&["score", "--concepts", "gone"], &["gone", "No such file"]);
    for command in [
        &["generate", "a cat", "--base", "gone", "-o", "x.png"][..],
        &["bench", "step", "--base", "gone"],
        &["demo", "--base", "gone"],
    ] {
        fails(command, &["gone", "is not a folder"]);
    }
}

#[test]
fn files_of_another_kind_are_refused() {
    let folder = temporary();
    let path = |name: &str| folder.path().join(name);
    std::fs::write(path("text.safetensors"), "this is not an adapter").unwrap();
    std::fs::create_dir(path("photos")).unwrap();
    std::fs::create_dir(path("empty")).unwrap();
    std::fs::write(path("photos/a.png"), "this is not a picture").unwrap();
    picture(&path("picture.png"));
    let fails = |args: &[&str], needles: &[&str]| fails(folder.path(), 1, args, needles);
    for command in [
        &["generate", "a cat", "--with", "text.safetensors", "-o", "x.png"][..],
        &["merge", "text.safetensors", "-o", "x"],
        &["inspect", "text.safetensors"],
        &["export", "text.safetensors", "--format", "peft", "-o", "x"],
    ] {
        fails(command, &["text.safetensors"]);
    }
    fails(&["inspect", "picture.png"], &["picture.png"]);
    let train = |images: &'static str| ["train", "--images", images, "--class", "dog", "--name", "x", "-o", "x.st"];
    fails(&train("photos"), &["photos/a.png", "PNG, JPEG or WebP"]);
    fails(&train("empty"), &["empty", "no picture"]);
    fails(&train("picture.png"), &["picture.png", "is not a folder"]);
    fails(&["generate", "a cat", "--base", "photos", "-o", "x.png"], &["photos", "not a model", "unet"]);
    // A model whose weights are missing.
    let model = path("model");
    for part in ["unet", "vae", "text_encoder", "tokenizer", "scheduler"] {
        std::fs::create_dir_all(model.join(part)).unwrap();
    }
    fails(&["generate", "a cat", "--base", "model", "-o", "x.png"], &["model", "model_index.json"]);
}

#[test]
fn what_the_daemon_does_not_know_is_named_with_where_to_look() {
    let folder = temporary();
    let daemon = common::Daemon::start();
    let socket = daemon.socket();
    let fails = |args: &[&str], needles: &[&str]| {
        fails(folder.path(), 1, &[args, &["--daemon", text(&socket)]].concat(), needles);
    };
    for command in [
        &["adapters", "show", "milo"][..],
        &["adapters", "remove", "milo"],
        &["adapters", "export", "milo", "-o", "x"],
        &["generate", "<milo>", "--with", "milo", "-o", "x.png"],
        &["merge", "milo", "-o", "x"],
    ] {
        fails(command, &["no adapter \"milo\"", "blocklora adapters list"]);
    }
    fails(&["adapters", "list", "--kind", "dog"], &["\"dog\"", "subject, person, scene, style"]);
    fails(&["adapters", "list", "--state", "bad"], &["\"bad\"", "ok, missing, corrupt"]);
    fails(&["adapters", "list", "--sort", "bad"], &["\"bad\"", "name, added or size"]);
    fails(&["jobs", "list", "--state", "bad"], &["\"bad\"", "queued, running"]);
    fails(&["jobs", "list", "--kind", "bad"], &["\"bad\"", "generate, train"]);
    fails(&["jobs", "watch", "1j99"], &["no job \"1j99\"", "blocklora jobs list"]);
    fails(&["jobs", "cancel", "1j99"], &["no job \"1j99\"", "blocklora jobs list"]);
    fails(&["models", "load", "none"], &["no model \"none\""]);
    fails(&["models", "remove", "none"], &["no model \"none\""]);
    fails(&["models", "add", "."], &["model_index.json"]);
    fails(&["slots", "--scheme", "bad"], &["\"bad\"", "contiguous, strided or permuted"]);
}

#[test]
fn broken_settings_are_named() {
    let folder = temporary();
    std::fs::create_dir(folder.path().join("photos")).unwrap();
    picture(&folder.path().join("photos/a.png"));
    let train = ["train", "--images", "photos", "--class", "dog", "--name", "x", "-o", "x.st", "--config", "c.toml"];
    for (settings, needle) in [
        ("steps = ", "steps"),
        ("stepz = 3", "stepz"),
        ("steps = -1", "steps"),
        ("rank = 0", "rank"),
        ("[erasure]\nlambda = 1.5", "lambda"),
    ] {
        std::fs::write(folder.path().join("c.toml"), settings).unwrap();
        fails(folder.path(), 1, &train, &[needle]);
    }
}

#[test]
fn prompts_must_name_known_concepts_and_fit() {
    let folder = temporary();
    adapter(folder.path(), &Make::default());
    let fails = |prompt: &str, needles: &[&str]| {
        fails(folder.path(), 1, &["generate", prompt, "--with", "milo.safetensors", "-o", "x.png"], needles);
    };
    fails("<zuko> on the beach", &["<zuko>", "<milo>"]);
    let long = "cat ".repeat(500);
    fails(&long, &["too long", "shorten it"]);
    let output = ["generate", "<milo>", "-o", "x.png"];
    common::fails(folder.path(), 1, &output, &["<milo>", "--with FILE"]);
}

#[test]
fn settings_out_of_range_are_refused_before_drawing() {
    let folder = temporary();
    let fails = |option: &[&str], needles: &[&str]| {
        fails(folder.path(), 1, &[&["generate", "a cat", "-o", "x.png"], option].concat(), needles);
    };
    fails(&["--size", "33"], &["33", "multiple of"]);
    fails(&["--guidance", "-1"], &["guidance", "-1"]);
    fails(&["--guidance", "NaN"], &["guidance", "NaN"]);
    fails(&["--sampler", "magic"], &["magic", "ddim"]);
}

#[test]
fn adapters_that_do_not_fit_together_are_refused() {
    let folder = temporary();
    let other = "f".repeat(64);
    adapter(folder.path(), &Make { name: "milo", slot: Some(3), ..Make::default() });
    adapter(folder.path(), &Make { name: "rival", slot: Some(3), ..Make::default() });
    adapter(folder.path(), &Make { name: "stranger", base: Some(&other), ..Make::default() });
    adapter(folder.path(), &Make { name: "alien", architecture: Some("flux/1"), ..Make::default() });
    std::fs::copy(folder.path().join("milo.safetensors"), folder.path().join("copy.safetensors")).unwrap();
    let check = |files: &[&str], needles: &[&str]| {
        let with: Vec<&str> = files.iter().flat_map(|f| ["--with", f]).collect();
        let generate = [&["generate", "a cat", "-o", "x.png", "--steps", "1"], &with[..]].concat();
        fails(folder.path(), 1, &generate, needles);
        fails(folder.path(), 1, &[&["merge", "-o", "x"], files].concat(), needles);
    };
    check(&["stranger.safetensors"], &["stranger.safetensors", "other weights", "--base"]);
    check(&["alien.safetensors"], &["alien.safetensors", "flux/1", "--base"]);
    check(&["milo.safetensors", "copy.safetensors"], &["milo.safetensors", "copy.safetensors", "leave one out"]);
    check(&["milo.safetensors", "rival.safetensors"], &["\"milo\"", "\"rival\"", "slot", "--on-clash mean"]);
    let heavy = ["generate", "a cat", "-o", "x.png", "--steps", "1", "--with", "milo.safetensors=1e38"];
    fails(folder.path(), 1, &heavy, &["not finite", "lower the concepts' weights"]);
    fails(
        folder.path(),
        1,
        &["merge", "-o", "x", "milo.safetensors=1e38"],
        &["not finite in F16", "lower the adapters' weights"],
    );
}

#[test]
fn what_is_there_is_not_overwritten_by_folders() {
    let folder = temporary();
    adapter(folder.path(), &Make::default());
    std::fs::create_dir(folder.path().join("full")).unwrap();
    std::fs::write(folder.path().join("full/file"), "precious").unwrap();
    let fails = |args: &[&str], needles: &[&str]| fails(folder.path(), 1, args, needles);
    fails(&["merge", "milo.safetensors", "-o", "full"], &["full", "not empty"]);
    fails(&["merge", "milo.safetensors", "-o", "milo.safetensors"], &["milo.safetensors", "is a file"]);
    fails(&["merge", "milo.safetensors", "-o", "no/where"], &["no", "does not exist"]);
    fails(&["export", "milo.safetensors", "--format", "peft", "-o", "full"], &["full", "not empty"]);
    fails(&["export", "milo.safetensors", "--format", "kohya", "-o", "full"], &["full", "is a folder"]);
    fails(&["export", "milo.safetensors", "--format", "textual-inversion", "-o", "x.st"], &["layer-wise", "plain"]);
    for format in ["kohya", "diffusers", "textual-inversion"] {
        let output = "./milo.safetensors";
        fails(&["export", "milo.safetensors", "--format", format, "-o", output], &["milo", "which would be lost"]);
    }
    fails(&["generate", "a cat", "-o", "full"], &["full", "is a folder"]);
    fails(&["generate", "a cat", "-o", "no/where.png"], &["no", "does not exist"]);
    let with = ["generate", "a cat", "--with", "milo.safetensors", "-o", "./milo.safetensors"];
    fails(&with, &["milo", "which would be lost"]);
    std::fs::create_dir(folder.path().join("full.svg")).unwrap();
    fails(&["inspect", "milo.safetensors", "--plot", "full.svg"], &["full.svg", "is a folder"]);
    std::fs::copy(folder.path().join("milo.safetensors"), folder.path().join("milo.svg")).unwrap();
    fails(&["inspect", "milo.svg", "--plot", "./milo.svg"], &["milo.svg", "which would be lost"]);
    fails(&["demo", "-o", "full"], &["full", "is a folder"]);
}

/// Every command that writes, with its output in the folder `out`.
fn writers(folder: &Path) -> Vec<Vec<String>> {
    let milo = adapter(folder, &Make::default());
    std::fs::create_dir(folder.join("photos")).unwrap();
    picture(&folder.join("photos/a.png"));
    let photos = folder.join("photos");
    let (milo, photos) = (text(&milo), text(&photos));
    let commands: &[&[&str]] = &[
        &["generate", "<milo>", "--with", milo, "--steps", "1", "-o", "out/x.png"],
        &["merge", milo, "-o", "out/x"],
        &["inspect", milo, "--plot", "out/x.svg"],
        &["export", milo, "--format", "kohya", "-o", "out/x.safetensors"],
        &["export", milo, "--format", "diffusers", "-o", "out/x.safetensors"],
        &["export", milo, "--format", "peft", "-o", "out/x"],
        &["train", "--images", photos, "--class", "dog", "--name", "x", "--steps", "1", "-o", "out/x.safetensors"],
    ];
    commands.iter().map(|c| c.iter().map(|&a| a.to_owned()).collect()).collect()
}

/// On a full disk a write fails in the middle. A limit on the size of files does the same without a disk to fill:
/// the shell sets it for the command, and has the signal ignored that would end the command instead. The daemon, whose
/// memory files would count, too, runs without that limit, for all commands.
#[test]
fn a_full_disk_leaves_nothing_behind() {
    let folder = temporary();
    let daemon = common::Daemon::start();
    let commands = writers(folder.path());
    std::fs::create_dir(folder.path().join("out")).unwrap();
    let before = snapshot(folder.path());
    for command in commands {
        let output = Command::new("sh")
            .args(["-c", "trap '' XFSZ; ulimit -f 0; exec \"$0\" \"$@\"", BLOCKLORA])
            .args(&command)
            .env("BLOCKLORA_DAEMON", daemon.socket())
            .current_dir(folder.path())
            .output()
            .unwrap();
        is_one_clear_line(&output, 1, &["out", "File too large"]);
        assert_eq!(snapshot(folder.path()), before, "{command:?} left something behind");
    }
}

/// A folder that cannot be written to. Root may write everywhere, so where the tests run as root a file takes the
/// folder's place: nobody can write into that.
#[test]
fn a_read_only_folder_is_found_at_once() {
    use std::os::unix::fs::PermissionsExt;
    let folder = temporary();
    let commands = writers(folder.path());
    let out = folder.path().join("out");
    std::fs::create_dir(&out).unwrap();
    std::fs::set_permissions(&out, std::fs::Permissions::from_mode(0o555)).unwrap();
    let root_writes_anyway = std::fs::write(out.join("probe"), "").is_ok();
    if root_writes_anyway {
        std::fs::remove_dir_all(&out).unwrap();
        std::fs::write(&out, "").unwrap();
    }
    for command in commands {
        let command: Vec<&str> = command.iter().map(String::as_str).collect();
        let needle = if root_writes_anyway { "is not a folder" } else { "Permission denied" };
        fails(folder.path(), 1, &command, &["out", needle]);
    }
    if !root_writes_anyway {
        std::fs::set_permissions(&out, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
}
