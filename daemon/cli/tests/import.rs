//! `import` end to end: what `export` wrote for other tools comes back, draws the same pictures, and merges like any
//! other adapter. tests/parity/check_imports.py has files of the other tools themselves.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::{Path, PathBuf};

use blocklora_engine::image::Picture;
use blocklora_spec::{Adapter, export};
use common::{Make, adapter, fails, succeeds, temporary, text};
use serde_json::{Value, json};

fn bundled() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../starter/adapters/teddy.safetensors")
}

fn draw(folder: &Path, prompt: &str, options: &[&str]) -> Picture {
    let path = folder.join("picture.png");
    succeeds([&["generate", prompt, "--steps", "2", "--seed", "5", "-o", text(&path)], options].concat());
    Picture::load(&path).unwrap()
}

/// Every layer of `one` and `other` has the same rows of A and scale B, to the bit.
#[track_caller]
fn same_change(one: &Adapter, other: &Adapter) {
    assert_eq!(one.layers().len(), other.layers().len());
    for (one_layer, other_layer) in one.layers().iter().zip(other.layers()) {
        assert_eq!(one_layer.name, other_layer.name);
        assert_eq!(other_layer.rows.len(), other_layer.outputs, "an imported adapter owns every row");
        let scaled = |adapter: &Adapter, b: Vec<f32>| b.iter().map(|x| x * adapter.scale()).collect::<Vec<f32>>();
        assert_eq!(one_layer.a(), other_layer.a(), "{}", one_layer.name);
        let [b, other_b] = [(one, one_layer), (other, other_layer)].map(|(a, l)| scaled(a, l.b_scattered()));
        assert_eq!(b, other_b, "{}", one_layer.name);
    }
}

#[test]
fn exports_of_a_bundled_concept_come_back_and_draw_the_same() {
    let folder = temporary();
    let path = |name: &str| folder.path().join(name);
    let original = Adapter::open(bundled()).unwrap();
    // Its words have a vector for each layer, which no other tool has.
    let picture = |file: &Path| draw(folder.path(), "a bear on a table", &["--with", text(file)]);
    let expected = picture(&bundled());
    assert!(expected != draw(folder.path(), "a bear on a table", &[]), "the concept changes nothing");
    for format in ["kohya", "diffusers", "peft"] {
        let (foreign, back) = (path(&format!("{format}-lora")), path(&format!("{format}.safetensors")));
        let said = succeeds(["export", text(&bundled()), "--format", format, "-o", text(&foreign), "--json"]);
        let said: Value = serde_json::from_str(&said).unwrap();
        assert_eq!(said, json!({"path": text(&foreign), "format": format, "embedding": null}));
        let said = succeeds(["import", text(&foreign), "-o", text(&back), "--class", "bear", "--json"]);
        let said: Value = serde_json::from_str(&said).unwrap();
        let imported = Adapter::open(&back).unwrap();
        assert_eq!((&said["format"], &said["digest"]), (&json!(format), &json!(imported.digest())));
        assert_eq!((said["layers"].as_u64(), said["unmatched"].as_array()), (Some(100), Some(&vec![])));
        same_change(&original, &imported);
        let manifest = imported.manifest();
        assert_eq!((&manifest.base, manifest.class_word.as_str()), (&original.manifest().base, "bear"));
        assert!(picture(&back) == expected, "{format}: another picture");
    }
    assert_eq!(Adapter::open(path("kohya.safetensors")).unwrap().manifest().name, "teddy", "the title is not the name");
}

#[test]
fn plain_words_come_back_too() {
    let folder = temporary();
    let path = |name: &str| folder.path().join(name);
    let original = adapter(folder.path(), &Make { name: "plain", vectors: 1, ..Make::default() });
    let (foreign, words, back) = (path("k.safetensors"), path("k.embedding.safetensors"), path("back.safetensors"));
    succeeds(["export", text(&original), "--format", "kohya", "-o", text(&foreign)]);
    let said = succeeds(["import", text(&foreign), "-o", text(&back), "--words", text(&words)]);
    assert!(said.contains("<plain>, from a kohya LoRA") && said.contains("2 words"), "{said}");
    let prompt = "a <plain> on the beach";
    let picture = |file: &Path| draw(folder.path(), prompt, &["--with", text(file)]);
    assert!(picture(&back) == picture(&original), "another picture");
    // Words alone are a concept as well.
    let alone = path("alone.safetensors");
    succeeds(["import", text(&words), "-o", text(&alone)]);
    let imported = Adapter::open(&alone).unwrap();
    assert_eq!((imported.layers().len(), imported.tokens().len()), (0, 2));
    assert!(picture(&alone) != picture(&original));
    assert!(succeeds(["inspect", text(&alone)]).contains("import-textual-inversion"));
}

#[test]
fn imported_concepts_merge_with_others() {
    let folder = temporary();
    let path = |name: &str| folder.path().join(name);
    let milo = adapter(folder.path(), &Make::default());
    let zuko = adapter(folder.path(), &Make { name: "zuko", slot: None, ..Make::default() });
    let (foreign, back) = (path("k.safetensors"), path("back.safetensors"));
    export::kohya(&Adapter::open(&zuko).unwrap(), &foreign).unwrap();
    succeeds(["import", text(&foreign), "-o", text(&back)]);
    let with =
        |other: &'static str| ["--with".to_owned(), text(&path(other)).to_owned(), "--with".into(), text(&milo).into()];
    for strategy in [&["--strategy", "average"][..], &["--strategy", "blocklora", "--on-clash", "mean"]] {
        let picture = |other| {
            let with = with(other);
            draw(folder.path(), "a dog", &[&with.each_ref().map(String::as_str)[..], strategy].concat())
        };
        assert!(picture("back.safetensors") == picture("zuko.safetensors"), "{strategy:?}: another picture");
    }
    let shared = ["generate", "a dog", "--with", "back.safetensors", "--with", "milo.safetensors", "-o", "x.png"];
    fails(folder.path(), 1, &shared, &["zuko", "milo", "--on-clash mean"]);
}

/// A safetensors file of f32 zeros.
fn foreign(path: &Path, tensors: &[(&str, &[usize])]) {
    let (mut header, mut end) = (serde_json::Map::new(), 0);
    for (name, shape) in tensors {
        let begin = end;
        end += 4 * shape.iter().product::<usize>();
        let entry = json!({"dtype": "F32", "shape": shape, "data_offsets": [begin, end]});
        header.insert((*name).to_owned(), entry);
    }
    let mut text = Value::Object(header).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    let bytes = [&(text.len() as u64).to_le_bytes()[..], &text, &vec![0; end]].concat();
    std::fs::write(path, bytes).unwrap();
}

const CONV: &str = "lora_unet_conv_in.lora_down.weight";

#[test]
fn foreign_files_are_named_with_what_to_do() {
    let folder = temporary();
    let path = |name: &str| folder.path().join(name);
    export::kohya(&Adapter::open(bundled()).unwrap(), path("k.safetensors")).unwrap();
    foreign(&path("conv.safetensors"), &[(CONV, &[1, 4, 3, 3])]);
    foreign(&path("loha.safetensors"), &[("lora_unet_x.hada_w1_a", &[1, 1])]);
    std::fs::write(path("old.pt"), b"PK\x03\x04").unwrap();
    let fails = |args: &[&str], needles: &[&str]| fails(folder.path(), 1, args, needles);
    for command in [
        &["inspect", "k.safetensors"][..],
        &["adapters", "add", "k.safetensors"],
        &["generate", "a cat", "--with", "k.safetensors", "-o", "x.png"],
        &["merge", "k.safetensors", "-o", "x"],
        &["export", "k.safetensors", "--format", "kohya", "-o", "x.safetensors"],
    ] {
        fails(command, &["k.safetensors", "a kohya LoRA", "`blocklora import`"]);
    }
    fails(&["inspect", "loha.safetensors"], &["a file of LoHa", "cannot be written"]);
    fails(&["import", "loha.safetensors", "-o", "x.safetensors"], &["loha.safetensors", "none of its keys", "LoHa"]);
    fails(&["import", "conv.safetensors", "-o", "x.safetensors"], &[CONV, "unet.conv_in", "a convolution"]);
    let unet = common::model_dir().join("unet/diffusion_pytorch_model.safetensors");
    fails(&["import", text(&unet), "-o", "x.safetensors"], &["diffusion_pytorch_model", "a model's weights"]);
    fails(&["import", "conv.safetensors", "-o", "x.safetensors", "--allow-unmatched"], &["none of its keys"]);
    fails(&["import", "old.pt", "-o", "x.safetensors"], &["old.pt", "pickle", "save_file"]);
    fails(&["import", "gone.safetensors", "-o", "x.safetensors"], &["gone.safetensors", "No such file"]);
    fails(&["import", ".", "-o", "x.safetensors"], &["adapter_config.json"]);
    fails(&["import", "k.safetensors", "-o", "k.safetensors"], &["k.safetensors", "which would be lost"]);
    export::peft(&Adapter::open(bundled()).unwrap(), path("peft")).unwrap();
    for name in ["adapter_model.safetensors", "adapter_config.json"] {
        let output = format!("peft/unet/{name}");
        fails(&["import", "peft", "-o", &output], &[name, "which would be lost"]);
        fails(&["import", "peft/unet", "-o", &output], &[name, "which would be lost"]);
    }
    fails(&["import", "k.safetensors", "-o", "x.safetensors", "--base", "gone"], &["gone", "is not a folder"]);
    fails(&["import", "k.safetensors", "-o", "x.safetensors", "--name", "a b"], &["a b", "1 to 64"]);
    fails(&["import", "k.safetensors", "-o", "x.safetensors", "--class", ""], &["class_word"]);
}

#[test]
fn keys_that_are_left_out_are_listed() {
    let folder = temporary();
    let path = |name: &str| folder.path().join(name);
    let layer = "lora_te_text_model_encoder_layers_0_mlp_fc1";
    let (down, up) = (format!("{layer}.lora_down.weight"), format!("{layer}.lora_up.weight"));
    let [m, n] = [640, 160];
    let (mixed, output) = (path("mixed.safetensors"), path("x.safetensors"));
    foreign(&mixed, &[(&down, &[1, n]), (&up, &[m, 1]), (CONV, &[1, 4, 3, 3])]);
    let args = ["import", text(&mixed), "-o", text(&output), "--allow-unmatched"];
    let said = succeeds(args);
    assert!(said.contains("1 layers of rank 1") && said.contains(&format!("left out {CONV:?}: ")), "{said}");
    let said: Value = serde_json::from_str(&succeeds([&args[..], &["--json"]].concat())).unwrap();
    assert_eq!(said["unmatched"].as_array().map(Vec::len), Some(1));
    assert_eq!(said["unmatched"][0]["key"], CONV);
}
