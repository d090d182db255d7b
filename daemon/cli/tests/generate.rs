//! `generate` and `merge` end to end: the same pictures from the same settings, and a baked model that draws them, too.
#![allow(clippy::unwrap_used)]

mod common;

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use blocklora_engine::image::{Picture, read_parameters};
use blocklora_engine::model::Model;
use blocklora_engine::{DType, Device};
use common::{Make, adapter, succeeds, temporary, text};

/// Draws `prompt` with `options` into `folder`/`name`.
#[track_caller]
fn draw(folder: &Path, name: &str, prompt: &str, options: &[&str]) -> Picture {
    let path = folder.join(name);
    let fixed = ["--steps", "3", "--seed", "5", "-o", text(&path)];
    succeeds([&["generate", prompt], &fixed[..], options].concat());
    Picture::load(&path).unwrap()
}

#[test]
fn the_same_settings_give_the_same_picture_and_are_in_the_file() {
    let folder = temporary();
    let path = folder.path();
    let (milo, zuko) =
        (adapter(path, &Make::default()), adapter(path, &Make { name: "zuko", slot: Some(1), ..Make::default() }));
    let zuko_half = format!("{}=0.5", text(&zuko));
    let with = ["--with", text(&milo), "--with", &zuko_half];
    let prompt = "a <milo> and a <zuko>";
    let first = draw(path, "a.png", prompt, &with);
    assert!(first == draw(path, "b.png", prompt, &with), "the same settings gave another picture");
    let swapped = ["--with", &zuko_half, "--with", text(&milo), "--threads", "1"];
    assert!(first == draw(path, "c.png", prompt, &swapped), "the order of adapters or the threads changed the picture");
    assert!(
        first != draw(path, "d.png", prompt, &["--with", text(&milo), "--with", text(&zuko)]),
        "weights do nothing"
    );

    let parameters = read_parameters(&path.join("a.png")).unwrap().unwrap();
    assert_eq!(parameters.prompt, prompt);
    assert_eq!((parameters.steps, parameters.seed), (3, 5));
    let used: Vec<(&str, f32)> = parameters.adapters.iter().map(|a| (a.name.as_str(), a.weight)).collect();
    assert_eq!(used, [("milo", 1.0), ("zuko", 0.5)]);
}

#[test]
fn an_adapter_with_weight_0_changes_nothing_but_the_words_it_adds() {
    let folder = temporary();
    let milo = adapter(folder.path(), &Make::default());
    let plain = draw(folder.path(), "a.png", "a cat", &[]);
    let without = draw(folder.path(), "b.png", "a cat", &["--with", &format!("{}=0", text(&milo))]);
    let with = draw(folder.path(), "c.png", "a cat", &["--with", text(&milo)]);
    assert!(plain == without && plain != with);
}

#[test]
fn several_pictures_have_numbered_files_and_seeds_in_turn() {
    let folder = temporary();
    let path = folder.path();
    succeeds(["generate", "a cat", "--steps", "3", "--seed", "4", "--count", "2", "-o", text(&path.join("x.png"))]);
    let second = Picture::load(&path.join("x-2.png")).unwrap();
    assert!(path.join("x-1.png").is_file() && !path.join("x.png").exists());
    assert!(second == draw(path, "y.png", "a cat", &[]), "picture 2 of seed 4 is not the picture of seed 5");
}

#[test]
fn a_size_of_ones_own_is_kept() {
    let folder = temporary();
    let own = draw(folder.path(), "a.png", "a cat", &[]);
    let (width, height) = (own.width(), 2 * own.height());
    let tall = draw(folder.path(), "b.png", "a cat", &["--size", &format!("{width}x{height}")]);
    assert_eq!((tall.width(), tall.height()), (width, height));
}

/// Permissions of `path` and of everything in it.
fn modes(path: &Path) -> Vec<u32> {
    let own = path.metadata().unwrap().permissions().mode() & 0o777;
    let entries = path.read_dir().into_iter().flatten().map(|entry| entry.unwrap().path());
    entries.flat_map(|entry| modes(&entry)).chain([own]).collect()
}

#[test]
fn the_umask_decides_who_may_read_what_is_written() {
    let folder = temporary();
    let milo = adapter(folder.path(), &Make::default());
    for (umask, file_mode, folder_mode) in [("077", 0o600, 0o700), ("027", 0o640, 0o750)] {
        for (name, args) in [
            ("x.png", &["generate", "a cat", "--steps", "1"][..]),
            ("merged", &["merge", text(&milo)]),
            ("k.safetensors", &["export", text(&milo), "--format", "kohya"]),
            ("peft", &["export", text(&milo), "--format", "peft"]),
        ] {
            let output = folder.path().join(format!("{umask}-{name}"));
            let mut command = Command::new("sh");
            command.args(["-c", &format!("umask {umask}; exec \"$0\" \"$@\""), common::BLOCKLORA]).args(args);
            command.arg("-o").arg(&output).env("BLOCKLORA_DAEMON", "private").env("XDG_STATE_HOME", folder.path());
            let done = command.output().unwrap();
            assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
            let modes = modes(&output);
            assert!(modes.iter().all(|mode| [file_mode, folder_mode].contains(mode)), "{umask} {name}: {modes:?}");
            assert_eq!(modes.last(), Some(if output.is_dir() { &folder_mode } else { &file_mode }), "{umask} {name}");
        }
    }
}

/// Merged weights are rounded once, to the type of the base model's file, whether they stay in memory in that type or
/// go to a folder: the same bits, so the same pictures.
#[test]
fn a_baked_model_draws_the_same_pictures() {
    let folder = temporary();
    let path = folder.path();
    for (name, vectors) in [("layered", 0), ("plain", 1)] {
        let file = adapter(path, &Make { name, vectors, ..Make::default() });
        let prompt = format!("a <{name}> on the beach");
        let options = ["--precision", "f16"];
        let merged = draw(path, "merged.png", &prompt, &[&options[..], &["--with", text(&file)]].concat());
        let baked = path.join(format!("baked-{name}"));
        let said = succeeds(["merge", text(&file), "-o", text(&baked), "--json"]);
        let said: serde_json::Value = serde_json::from_str(&said).unwrap();
        assert!(said["merge"]["rows_rewritten"].as_u64().unwrap() > 0);
        let picture = draw(path, "baked.png", &prompt, &[&options[..], &["--base", text(&baked)]].concat());
        assert!(merged == picture, "{name}: the baked model draws another picture");
    }
}

/// Concepts that were baked in stay while others are added.
#[test]
fn a_baked_model_is_a_base_of_its_own() {
    let folder = temporary();
    let milo = adapter(folder.path(), &Make::default());
    let baked = folder.path().join("baked");
    succeeds(["merge", text(&milo), "-o", text(&baked)]);
    let again = ["generate", "<milo>", "--base", text(&baked), "--with", text(&milo), "--steps", "1", "-o", "x.png"];
    common::fails(folder.path(), 1, &again, &["--base"]);
    // A concept that was trained on it joins what is built in, here and in a folder of both.
    let digest = Model::load(&baked, &Device::Cpu, DType::F32).unwrap().digest().to_owned();
    let make = Make { name: "zuko", slot: Some(1), base: Some(&digest), ..Make::default() };
    let zuko = adapter(folder.path(), &make);
    let both = folder.path().join("both");
    succeeds(["merge", text(&zuko), "-o", text(&both), "--base", text(&baked)]);
    let draw = |name: &str, more: &[&str]| {
        let options = [&["--precision", "f16"][..], more].concat();
        draw(folder.path(), name, "<milo> and <zuko>", &options)
    };
    let joined = draw("joined.png", &["--base", text(&baked), "--with", text(&zuko)]);
    assert!(joined == draw("both.png", &["--base", text(&both)]), "the folder of both draws another picture");
}

#[test]
fn inspect_prints_json_and_a_plot() {
    let folder = temporary();
    let path = folder.path();
    let files = [("a", 0), ("b", 1), ("c", 1)]
        .map(|(name, slot)| adapter(path, &Make { name, slot: Some(slot), ..Make::default() }));
    let plot = path.join("plot.svg");
    let files: Vec<&str> = files.iter().map(|f| text(f)).collect();
    let json = succeeds([&["inspect", "--json", "--plot", text(&plot)], &files[..]].concat());
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    let pair = |i: usize| &json["overall"]["pairs"][i];
    assert_eq!(pair(0)["cosine"].as_f64(), Some(0.0), "a and b are in slots of their own");
    assert_eq!(pair(0)["sign_conflicts"].as_f64(), Some(0.0));
    assert_eq!(pair(0)["shared_rows"].as_u64(), Some(0));
    assert!(pair(2)["shared_rows"].as_u64().unwrap() > 0, "b and c share a slot");
    assert_eq!(json["adapters"][0]["manifest"]["name"], "a");
    let plot = std::fs::read_to_string(plot).unwrap();
    assert!(plot.starts_with("<svg") && plot.trim_end().ends_with("</svg>"));
    let table = succeeds([&["inspect", "--layers"], &files[..]].concat());
    assert!(table.contains("slot 1 of 16") && table.contains("b c") && table.contains("1 pair of concepts"), "{table}");
}

#[test]
fn exports_are_written_and_named() {
    let folder = temporary();
    let path = folder.path();
    let plain = adapter(path, &Make { name: "plain", vectors: 1, ..Make::default() });
    let kohya = path.join("kohya.safetensors");
    let said = succeeds(["export", text(&plain), "--format", "kohya", "-o", text(&kohya)]);
    let words = path.join("kohya.embedding.safetensors");
    assert_eq!(said, format!("{}\n{}\n", kohya.display(), words.display()));
    assert!(kohya.is_file() && words.is_file());
    let peft = path.join("peft");
    succeeds(["export", text(&plain), "--format", "peft", "-o", text(&peft)]);
    assert!(peft.join("unet/adapter_config.json").is_file());
    let words = |name: &str| std::fs::read(path.join(name)).unwrap();
    assert!(words("peft.embedding.safetensors") == words("kohya.embedding.safetensors"));
    // What follows a dot is part of a name, unless it is the extension of all such files.
    let other = adapter(path, &Make { name: "other", vectors: 1, ..Make::default() });
    for (file, name) in [(&plain, "milo-1.0"), (&other, "milo-1.5")] {
        succeeds(["export", text(file), "--format", "diffusers", "-o", text(&path.join(name))]);
    }
    assert!(words("milo-1.0.embedding.safetensors") == words("kohya.embedding.safetensors"));
    assert!(words("milo-1.5.embedding.safetensors") != words("kohya.embedding.safetensors"));
    // Words for which there is no file are not forgotten in silence.
    let layer_wise = adapter(path, &Make::default());
    for format in ["kohya", "diffusers", "peft"] {
        let to = path.join(format!("{format}-of-milo"));
        let output = common::blocklora(["export", text(&layer_wise), "--format", format, "-o", text(&to)]);
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success() && said.contains("words of <milo>") && said.lines().count() == 1, "{said}");
        assert!(!path.join(format!("{format}-of-milo.embedding.safetensors")).exists());
    }
}

/// Texts of files cannot turn the line around that they are shown in.
#[test]
fn what_a_terminal_might_obey_is_escaped() {
    let folder = temporary();
    let architecture = Some("sd\u{202e}1\u{200b}");
    let milo = adapter(folder.path(), &Make { architecture, ..Make::default() });
    assert!(succeeds(["inspect", text(&milo)]).contains("base        sd\\u{202e}1\\u{200b} "));
    common::fails(folder.path(), 1, &["generate", "a <milo>", "--with", text(&milo), "-o", "x.png"], &["sd\\u{202e}1"]);
}

/// Ctrl-C while drawing ends with 130 and leaves no file.
#[test]
fn an_interrupted_drawing_leaves_nothing_behind() {
    let folder = temporary();
    let args = ["generate", "a cat", "--steps", "500", "--count", "1000", "-o", "x.png"];
    let mut child = common::command().args(args).current_dir(folder.path()).spawn().unwrap();
    std::thread::sleep(std::time::Duration::from_millis(1500));
    let kill = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(kill.success());
    let status = child.wait().unwrap();
    assert_eq!(status.code(), Some(130));
    assert!(common::snapshot(folder.path()).is_empty());
}

/// Two of these steps would be at one timestep, and what solvers divide by zero is no picture.
#[test]
fn as_many_steps_as_timesteps_are_refused_where_the_schedule_is_moved() {
    let folder = temporary();
    for sampler in ["dpmpp-2m", "dpmpp-2m-sde"] {
        let args = ["generate", "a cat", "--steps", "999", "--sampler", sampler, "-o", "x.png"];
        common::fails(folder.path(), 1, &args, &["steps = 999", "steps_offset = 1", "take fewer"]);
    }
}

#[test]
fn help_and_version_go_to_stdout() {
    assert!(succeeds(["bench", "merge", "--help"]).contains("--capacity"));
    assert!(succeeds(["--help"]).contains("130"));
    assert!(succeeds(["--version"]).starts_with("blocklora "));
}
