//! What is written is read back, bit for bit; damage is found.
#![allow(clippy::unwrap_used)]

mod common;

use blocklora_spec::{
    Adapter, AdapterBuilder, Delta, Error, Layer, Manifest, Partition, Scheme, Storage, TokenVectors,
};
use common::raw::{LAYER, Parts};
use proptest::prelude::*;

#[test]
fn written_and_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("milo.safetensors");
    let builder = common::builder(&common::manifest(), Storage::F32);
    let digest = builder.write(&path).unwrap();
    assert_eq!(builder.write(&path).unwrap(), digest, "writing over itself is allowed and deterministic");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "no temporary file is left");

    let adapter = Adapter::open(&path).unwrap();
    assert_eq!(adapter.path(), path);
    assert_eq!(adapter.digest(), digest);
    assert_eq!(adapter.scale(), 0.7);
    assert_eq!(adapter.tokens().iter().map(|t| (t.layers, t.width)).collect::<Vec<_>>(), [(3, 5), (3, 5)]);
    // The third layer has one output, which is not slot 1's: listed, but without tensors.
    assert_eq!(adapter.manifest().outputs.len(), 3);
    let names: Vec<_> = adapter.layers().iter().map(|l| l.name.as_str()).collect();
    assert_eq!(names, [common::LAYERS[0].0, common::LAYERS[1].0]);
    let layer = &adapter.layers()[1];
    assert_eq!((layer.outputs, layer.columns, layer.rank), (16, 8, 2));
    assert_eq!(layer.rows, common::SLOT.rows(16));
    assert_eq!((layer.a().len(), layer.b().len(), layer.rows.len()), (16, 8, 4));
    let full = layer.b_scattered();
    for p in 0..16 {
        let expected = match layer.rows.iter().position(|r| *r == p as u32) {
            Some(k) => layer.b()[2 * k..2 * k + 2].to_vec(),
            None => vec![0.0; 2],
        };
        assert_eq!(full[2 * p..2 * p + 2], expected);
    }
}

#[test]
fn other_readers_accept_the_file() {
    let bytes = common::bytes();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.len(), 6);
    let adapter = Adapter::from_bytes("f", bytes.clone()).unwrap();
    let tensor = file.tensor(&format!("{}.lora_A", common::LAYERS[1].0)).unwrap();
    let values: Vec<f32> = tensor.data().chunks(4).map(|c| f32::from_le_bytes(c.try_into().unwrap())).collect();
    assert_eq!(values, adapter.layers()[1].a());
}

#[test]
fn delta_formula_decides_the_scale() {
    let manifest = Manifest { delta: Delta::AlphaOverRank, alpha: 1.0, ..common::manifest() };
    assert_eq!(manifest.scale(), 0.5);
}

/// The builder does not write what the reader rejects, and leaves what was there.
#[test]
fn invalid_adapters_are_not_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    std::fs::write(&path, "before").unwrap();
    let good = common::manifest();
    let layer = Layer { name: common::LAYERS[1].0, outputs: 16, a: &[1.0; 16], b: &[1.0; 8] };
    let with =
        |layer: Layer<'_>| AdapterBuilder::new(&Manifest { tokens: vec![], ..good.clone() }, Storage::F16).layer(layer);
    assert!(with(layer).to_bytes("f").is_ok());
    let cases = [
        (with(Layer { b: &[1.0; 10], ..layer }), "must be [4, 2]: slot 1 of 4 owns 4 of the 16 rows"),
        (with(Layer { b: &[1.0; 7], ..layer }), "7 numbers were given"),
        (with(Layer { b: &[], ..layer }), "has no elements"),
        (with(Layer { a: &[f32::NAN; 16], ..layer }), "element 0 is NaN"),
        (with(Layer { a: &[70_000.0; 16], ..layer }), "element 0 is inf"),
        (with(Layer { name: "unet.../etc/passwd", ..layer }), "joined by single dots"),
        (AdapterBuilder::new(&good, Storage::F32).layer(layer), "\"tokens.milo_1\" is missing"),
        (AdapterBuilder::new(&Manifest { tokens: vec![], ..good.clone() }, Storage::F32), "no tensors"),
        (
            AdapterBuilder::new(&Manifest { name: "../milo".into(), ..good.clone() }, Storage::F32),
            "manifest: name: \"../milo\" must",
        ),
        (AdapterBuilder::new(&Manifest { alpha: f32::NAN, ..good.clone() }, Storage::F32), "alpha"),
        (
            with(layer).token(&TokenVectors { name: "a".into(), layers: usize::MAX, width: 2, values: vec![] }),
            "0 numbers were given",
        ),
    ];
    for (builder, expected) in cases {
        let error = builder.write(&path).unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains("x.safetensors"), "{error:?} lacks {expected:?}");
        assert_eq!(std::fs::read(&path).unwrap(), b"before");
    }
    assert!(matches!(Adapter::open(folder.path()), Err(Error::NotAFile { .. })));
    assert!(matches!(Adapter::open(folder.path().join("none")), Err(Error::Io { .. })));
    assert!(matches!(with(layer).write(folder.path().join("none/x")), Err(Error::Io { .. })));
}

/// Numbers at which arithmetic goes wrong, and some that are nearly right.
fn edge() -> impl Strategy<Value = u64> {
    prop_oneof![
        6 => 0_u64..100,
        1 => prop_oneof![Just(u64::MAX), Just(u64::MAX - 3), Just(1 << 63), Just(1 << 62), Just(1 << 32), Just(65536)],
    ]
}

fn scheme() -> impl Strategy<Value = Scheme> {
    prop_oneof![Just(Scheme::Contiguous), Just(Scheme::Strided), Just(Scheme::Permuted)]
}

prop_compose! {
    fn partition()(scheme in scheme(), capacity in 1_u32..20, seed: u64, slot: u32) -> Partition {
        Partition { scheme, capacity, seed, slot: slot % capacity }
    }
}

prop_compose! {
    /// An adapter's parts: manifest, layers (outputs, inputs), the width of tokens, and numbers for all of it.
    fn parts()(
        partition in proptest::option::of(partition()),
        rank in 1_usize..5,
        alpha in 0.001_f32..100.0,
        shapes in proptest::collection::vec((1_usize..40, 1_usize..9), 1..5),
        vectors in proptest::collection::vec(1_usize..4, 1..4),
        width in 1_usize..7,
        lambda in 0.0_f32..0.999,
        seeds: (u64, u64),
        licence in proptest::option::of("[ -~é]{1,20}"),
        bf16: bool,
    ) -> (Manifest, Vec<(usize, usize)>, usize, u64, bool) {
        let mut manifest = common::manifest();
        manifest.tokens.clear();
        for (i, vectors) in vectors.into_iter().enumerate() {
            manifest.tokens.push(blocklora_spec::Token { name: format!("t{i}"), vectors });
        }
        (manifest.partition, manifest.rank, manifest.alpha) = (partition, rank, alpha);
        (manifest.erasure_lambda, manifest.training.seed, manifest.licence) = (lambda, seeds.0, licence);
        (manifest, shapes, width, seeds.1, bf16)
    }
}

/// Numbers of any size that every storage type holds exactly: eighths up to +-16.
fn numbers(rng: &mut blocklora_spec::rng::Rng, n: usize) -> Vec<f32> {
    (0..n).map(|_| rng.below(257) as f32 / 8.0 - 16.0).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..Default::default() })]

    #[test]
    fn random_adapters_round_trip((manifest, shapes, width, seed, narrow) in parts()) {
        let storage = if narrow { Storage::BF16 } else { Storage::F16 };
        for storage in [storage, Storage::F32] {
            let mut rng = blocklora_spec::rng::Rng::new(seed, blocklora_spec::rng::Stream::Test, 0, 0);
            let mut draw = |n: usize| match storage {
                Storage::BF16 => (0..n).map(|_| rng.below(257) as f32 - 128.0).collect(),
                Storage::F16 => numbers(&mut rng, n),
                Storage::F32 => rng.normals(n),
            };
            let mut builder = AdapterBuilder::new(&manifest, storage);
            let mut layers = Vec::new();
            for (i, &(outputs, inputs)) in shapes.iter().enumerate() {
                let (a, b) = (draw(manifest.rank * inputs), draw(manifest.rows(outputs).len() * manifest.rank));
                layers.push((format!("unet.blocks.{i}.to_q"), outputs, inputs, a, b));
            }
            for (name, outputs, _, a, b) in &layers {
                builder = builder.layer(Layer { name, outputs: *outputs, a, b });
            }
            let mut tokens = Vec::new();
            for token in &manifest.tokens {
                let (name, layers) = (token.name.clone(), token.vectors);
                tokens.push(TokenVectors { name, layers, width, values: draw(layers * width) });
                builder = builder.token(&tokens[tokens.len() - 1]);
            }
            let bytes = builder.to_bytes("f").unwrap();
            let adapter = Adapter::from_bytes("f", bytes.clone()).unwrap();
            prop_assert_eq!(adapter.tokens(), tokens);
            let owned: Vec<_> = layers.iter().filter(|l| !l.4.is_empty()).collect();
            prop_assert_eq!(adapter.layers().len(), owned.len());
            for (read, (name, outputs, inputs, a, b)) in adapter.layers().iter().zip(owned) {
                prop_assert_eq!((&read.name, read.outputs, read.columns), (name, *outputs, *inputs));
                prop_assert_eq!(&read.rows, &manifest.rows(*outputs));
                prop_assert_eq!((&read.a(), &read.b()), (a, b));
            }
            let mut expected = manifest.clone();
            expected.outputs = layers.iter().map(|l| (l.0.clone(), l.1)).collect();
            expected.tensor_digest = adapter.manifest().tensor_digest.clone();
            prop_assert_eq!(adapter.manifest(), &expected);
            // Reading and writing again gives the same file.
            let mut again = AdapterBuilder::new(adapter.manifest(), storage);
            for (name, outputs, _, a, b) in &layers {
                again = again.layer(Layer { name, outputs: *outputs, a, b });
            }
            let again = adapter.tokens().iter().fold(again, |b, t| b.token(t));
            prop_assert_eq!(again.to_bytes("f").unwrap(), bytes);
        }
    }

    #[test]
    fn damage_is_an_error_or_changes_nothing(changes in proptest::collection::vec((any::<usize>(), any::<u8>()), 1..4)) {
        let good = common::bytes();
        let expected = content(&Adapter::from_bytes("f", good.clone()).unwrap());
        let mut bad = good;
        for (at, value) in changes {
            let at = at % bad.len();
            bad[at] = value;
        }
        if let Ok(adapter) = Adapter::from_bytes("f", bad) {
            prop_assert_eq!(content(&adapter), expected);
        }
    }

    /// Faults that an attacker signs: what is accepted is consistent all the same.
    #[test]
    fn signed_damage_is_an_error_or_consistent(
        edits in proptest::collection::vec((0_usize..12, 0_usize..3, edge(), edge()), 1..5),
        data in 0_usize..200,
    ) {
        let mut parts = Parts::valid();
        for (what, which, x, y) in edits {
            let tensor = &mut parts.tensors[which];
            match what {
                0 => tensor.shape = vec![x, y],
                1 => tensor.offsets = [x, y],
                2 => tensor.offsets[which % 2] = x,
                3 => tensor.dtype = ["F16", "BF16", "F64"][which].into(),
                4 => parts.manifest["rank"] = x.into(),
                5 => parts.manifest["outputs"][LAYER] = x.into(),
                6 => parts.manifest["partition"]["slot"] = x.into(),
                7 => parts.manifest["partition"]["capacity"] = x.into(),
                8 => parts.manifest["partition"]["scheme"] = ["strided", "permuted", "contiguous"][which].into(),
                9 => parts.manifest["tokens"][0]["vectors"] = x.into(),
                10 => parts.manifest["partition"] = serde_json::Value::Null,
                _ => parts.data.resize(data, 0x3F),
            }
        }
        parts.sign();
        if let Ok(adapter) = Adapter::from_bytes("f", parts.bytes()) {
            for layer in adapter.layers() {
                prop_assert_eq!(layer.a().len(), layer.rank * layer.columns);
                prop_assert_eq!(layer.b().len(), layer.rank * layer.rows.len());
                prop_assert_eq!(layer.b_scattered().len(), layer.rank * layer.outputs);
                prop_assert_eq!(&layer.rows, &adapter.manifest().rows(layer.outputs));
                prop_assert!(layer.rows.iter().all(|row| (*row as usize) < layer.outputs));
            }
            for token in adapter.tokens() {
                prop_assert_eq!(token.values.len(), token.layers * token.width);
            }
        }
    }

    #[test]
    fn partitions_are_disjoint_and_cover(scheme in scheme(), capacity in 1_u32..70, seed: u64, m in 0_usize..200) {
        let mut owners = vec![0; m];
        for slot in 0..capacity {
            let partition = Partition { scheme, capacity, seed, slot };
            let rows = partition.rows(m);
            prop_assert_eq!(rows.len(), partition.count(m));
            prop_assert!(rows.windows(2).all(|w| w[0] < w[1]));
            // Fair: no slot has two rows more than another.
            prop_assert!(rows.len() == m / capacity as usize || rows.len() == m.div_ceil(capacity as usize));
            for row in rows {
                owners[row as usize] += 1;
            }
        }
        prop_assert!(owners.iter().all(|n| *n == 1));
    }
}

/// Every byte of a file set to something else, and every prefix of it: never a panic, never another adapter.
#[test]
fn every_byte_is_guarded() {
    let good = common::bytes();
    let expected = content(&Adapter::from_bytes("f", good.clone()).unwrap());
    let mut accepted = 0;
    for at in 0..good.len() {
        for flip in [1, 0x20, 0x80] {
            let mut bad = good.clone();
            bad[at] ^= flip;
            if let Ok(adapter) = Adapter::from_bytes("f", bad) {
                assert_eq!(content(&adapter), expected, "byte {at} ^ {flip}");
                accepted += 1;
            }
        }
        assert!(Adapter::from_bytes("f", good[..at].to_vec()).is_err(), "the first {at} bytes");
    }
    assert!(accepted < 16, "only padding and the case of a JSON escape may change: {accepted}");
}

type Content = (Manifest, Vec<(String, usize, Vec<u32>, Vec<f32>, Vec<f32>)>, Vec<TokenVectors>);

fn content(adapter: &Adapter) -> Content {
    let layers = adapter.layers().iter().map(|l| (l.name.clone(), l.outputs, l.rows.clone(), l.a(), l.b()));
    (adapter.manifest().clone(), layers.collect(), adapter.tokens().to_vec())
}
