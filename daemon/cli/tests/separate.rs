//! `separate` end to end: what the new files keep, what they say of themselves, and that they merge like the old ones.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::{Path, PathBuf};

use blocklora_spec::Adapter;
use common::{Make, adapter, blocklora, fails, is_one_clear_line, snapshot, succeeds, temporary, text};
use serde_json::{Value, json};

/// Three concepts in slots of their own.
fn three(folder: &Path) -> Vec<PathBuf> {
    let make = |(slot, name)| adapter(folder, &Make { name, slot: Some(slot), scale: 0.1, ..Make::default() });
    [(0, "milo"), (1, "zuko"), (2, "rex")].map(make).to_vec()
}

const QUICK: [&str; 6] = ["--steps", "2", "--images", "1", "--prompt", "a {} in the snow"];

#[test]
fn others_are_felt_less_and_nothing_else_changes() {
    let folder = temporary();
    let path = |name: &str| folder.path().join(name);
    let old = three(folder.path());
    let new = path("new");
    let args = [&["separate", text(&old[0]), text(&old[1]), text(&old[2]), "-o", text(&new), "--json"], &QUICK[..]];
    let said: Value = serde_json::from_str(&succeeds(args.concat())).unwrap();
    let digests: Vec<String> = old.iter().map(|file| Adapter::open(file).unwrap().digest().to_owned()).collect();
    for ((file, said), digest) in old.iter().zip(said.as_array().unwrap()).zip(&digests) {
        let new = new.join(file.file_name().unwrap());
        let (before, after) = (Adapter::open(file).unwrap(), Adapter::open(&new).unwrap());
        assert_eq!((&said["file"], &said["digest"]), (&json!(text(&new)), &json!(after.digest())));
        let number = |key: &str| said[key].as_f64().unwrap();
        // Random factors answer to everything alike.
        assert!((0.5..2.0).contains(&number("others_before")), "{said}");
        assert!(number("others_after") < 0.5 * number("others_before"), "{said}");
        assert!((0.3..1.01).contains(&number("own")), "{said}");

        // The words, the rows and B are the old ones, to the bit; A is not.
        assert_eq!(before.tokens(), after.tokens());
        assert_eq!(before.layers().len(), after.layers().len());
        for (before, after) in before.layers().iter().zip(after.layers()) {
            assert_eq!((&before.name, &before.rows, before.b()), (&after.name, &after.rows, after.b()));
            assert_ne!(before.a(), after.a(), "{}", before.name);
        }
        let mut manifest = after.manifest().clone();
        let made = manifest.algorithm.config.as_object_mut().unwrap().remove("separated").unwrap();
        assert_eq!(made, json!({"from": digest, "among": digests, "ridge": 0.01}));
        let old = before.manifest();
        manifest.tensor_digest.clone_from(&old.tensor_digest);
        assert_eq!(&manifest, old);
    }
    // The same again gives the same bytes, and a folder stands for its files, in the order of their names.
    let content = |folder: &Path| {
        let files = snapshot(folder).into_iter();
        files.map(|(path, content)| (path.file_name().unwrap().to_owned(), content)).collect::<Vec<_>>()
    };
    let (again, of_folder) = (path("again"), path("of-folder"));
    let args = [&["separate", text(&old[0]), text(&old[1]), text(&old[2]), "-o", text(&again)], &QUICK[..]];
    let table = succeeds(args.concat());
    assert_eq!(table.lines().count(), 4, "{table}");
    assert_eq!(content(&new), content(&again));
    succeeds([&["separate", text(folder.path()), "-o", text(&of_folder)], &QUICK[..]].concat());
    let among =
        Adapter::open(of_folder.join("rex.safetensors")).unwrap().manifest().algorithm.config["separated"]["among"]
            .clone();
    assert_eq!(among, json!([digests[0], digests[2], digests[1]]));

    // And they are merged like any others.
    let picture = path("picture.png");
    let with = old.iter().flat_map(|file| ["--with".to_owned(), text(&new.join(file.file_name().unwrap())).to_owned()]);
    let mut args: Vec<String> =
        ["generate", "<milo> and <rex>", "--steps", "2", "-o", text(&picture)].map(str::to_owned).to_vec();
    args.extend(with);
    succeeds(args);
    assert!(picture.is_file());
}

#[test]
fn what_cannot_be_separated_is_refused() {
    let folder = temporary();
    let path = folder.path();
    let files = three(path);
    let [milo, zuko, _] = [0, 1, 2].map(|i| text(&files[i]));
    fails(path, 1, &["separate", milo, "-o", "new"], &["1 concept", "give more files"]);
    fails(path, 1, &["separate", milo, milo, "-o", "new"], &["milo.safetensors", "called so, too"]);
    fails(path, 1, &["separate", milo, zuko, "-o", "new", "--prompt", "a dog"], &["a dog", "{}"]);
    std::fs::create_dir_all(path.join("full/of")).unwrap();
    fails(path, 1, &["separate", milo, zuko, "-o", "full"], &["full", "is not empty"]);
    fails(path, 1, &["separate", milo, "nowhere.safetensors", "-o", "new"], &["nowhere.safetensors"]);
    let other = path.join("other");
    std::fs::create_dir(&other).unwrap();
    let foreign = adapter(&other, &Make { name: "foreign", base: Some(&"0".repeat(64)), ..Make::default() });
    fails(path, 1, &["separate", milo, text(&foreign), "-o", "new"], &["foreign.safetensors", "other weights"]);
    is_one_clear_line(&blocklora(["separate", milo, zuko, "-o", "new", "--ridge", "0"]), 2, &["--ridge", "1e-6"]);
}
