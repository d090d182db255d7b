//! Textual inversions, and what files and users say of themselves.

use blocklora_spec::Format;
use blocklora_spec::import::{Options, import};
use blocklora_spec::{Manifest, Storage, TokenVectors};
use serde_json::{Value, json};

use crate::foreign::*;

#[test]
fn words_become_tokens() {
    let word =
        |key: &str, shape: &[usize]| Foreign::default().f32(key, shape, &vectors(shape.iter().product::<usize>() / 4));
    for (file, name) in
        [(word("<my cat>", &[2, 4]), "my_cat"), (word("emb_params", &[2, 4]), "x"), (word("clip_l", &[2, 4]), "x")]
    {
        let (imported, adapter) = imports(&file);
        assert_eq!(
            (imported.format, imported.layers, adapter.manifest().name.as_str()),
            (Format::TextualInversion, 0, name)
        );
        let expected: Vec<TokenVectors> = [1, 2]
            .map(|i| TokenVectors {
                name: format!("{name}-{i}"),
                layers: 1,
                width: 4,
                values: vectors(2)[4 * (i - 1)..4 * i].into(),
            })
            .into();
        assert_eq!(adapter.tokens(), expected);
    }
    assert_eq!(imports(&word("<milo>", &[4])).1.tokens().len(), 1);
    refused(&word("<milo>", &[1, 8]), &["<milo>", "8 elements", "have 4", "another base model"]);
    refused(&word("<milo>", &[17, 4]), &["17 vectors", "at most 16"]);
    refused(&word("clip_l", &[1, 4]).f32("clip_g", &[1, 8], &[0.0; 8]), &["clip_g", "SDXL"]);
    refused(&Foreign::default().f32("emb_params", &[1, 4], &[f32::NAN; 4]), &["emb_params", "NaN"]);
}

#[test]
fn words_come_along_with_a_lora() {
    let folder = tempfile::tempdir().unwrap();
    let bundled = kohya().f32("bundle_emb.cat.string_to_param.*", &[1, 4], &vectors(1));
    let (imported, adapter) = imports(&bundled);
    assert_eq!((imported.format, imported.words[0].name.as_str(), adapter.tokens().len()), (Format::Kohya, "cat", 1));
    close(&delta(&adapter, Q), &expected(2, 1, 1.0));
    refused(&bundled.f32("bundle_emb.cat.clip_g", &[1, 4], &vectors(1)), &["bundle_emb.cat.clip_g", "SDXL"]);
    let words = [("one", 1), ("two", 2)].map(|(name, count)| {
        Foreign::default().f32(name, &[count, 4], &vectors(count)).write(&folder, &format!("{name}.safetensors"))
    });
    let with = Options { words: words.into(), ..options() };
    let imported = import(kohya().write(&folder, "x.safetensors"), &target(), &with).unwrap();
    let adapter = to_adapter(&imported);
    let values: Vec<f32> = adapter.tokens().iter().flat_map(|t| t.values.clone()).collect();
    assert_eq!(values, [vectors(1), vectors(2)].concat());
    let named: Vec<(&str, usize)> = imported.words.iter().map(|w| (w.name.as_str(), w.vectors)).collect();
    assert_eq!((named, imported.origins.len()), (vec![("one", 1), ("two", 2)], 3));
    // A LoRA is not a file of words.
    let wrong = Options { words: vec![kohya().write(&folder, "y.safetensors")], ..options() };
    refused_with(&kohya(), &wrong, &[KOHYA_Q[0], "textual inversion"]);
}

#[test]
fn what_the_user_says_counts_more_than_the_file() {
    let file = kohya()
        .meta("modelspec.title", "A Cat!")
        .meta("ss_output_name", "other")
        .meta("modelspec.license", "CC0-1.0")
        .meta("modelspec.trigger_phrase", "sks cat")
        .meta("ss_tag_frequency", &"x".repeat(1000));
    let (imported, adapter) = imports(&file);
    let manifest = adapter.manifest();
    assert_eq!((manifest.name.as_str(), manifest.licence.as_deref()), ("A_Cat", Some("CC0-1.0")));
    assert_eq!(imported.trigger_phrase.as_deref(), Some("sks cat"));
    let kept = &manifest.algorithm.config["metadata"];
    assert_eq!((&kept["ss_output_name"], &kept["ss_tag_frequency"]), (&json!("other"), &Value::Null));
    let folder = tempfile::tempdir().unwrap();
    let path = file.write(&folder, "x.safetensors");
    let say = |name: &str| Options {
        name: Some(name.into()),
        class_word: Some("cat".into()),
        licence: Some("MIT".into()),
        storage: Some(Storage::F16),
        ..options()
    };
    let imported = import(&path, &target(), &say("tom")).unwrap();
    let manifest = to_adapter(&imported).manifest().clone();
    let Manifest { name, class_word, licence, .. } = manifest;
    assert_eq!((name.as_str(), class_word.as_str(), licence.as_deref()), ("tom", "cat", Some("MIT")));
    assert_eq!(imported.storage, Storage::F16);
    let error = import(&path, &target(), &say("no name")).unwrap_err().to_string();
    assert!(error.contains("\"no name\" must be"), "{error}");
    assert_eq!(
        imported.builder.to_bytes("a").unwrap(),
        import(&path, &target(), &say("tom")).unwrap().builder.to_bytes("a").unwrap()
    );
}
