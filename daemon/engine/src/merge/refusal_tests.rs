//! What merging refuses, and what it reads from a file.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::DType;

use super::strategy::{AdapterView, Coefficients, LayerInfo, LayerPlan, MergeStrategy, Plan, Term, Tile};
use super::tests::{SHAPES, TYPES, adapter, at_one, block, disjoint, mean, model, sum};
use super::*;
use crate::error::Result;

/// Merges `adapters` after a good composition and expects an error with all of `words`, and no bit changed.
fn refuses(adapters: &[(Arc<AdapterFactors>, f32)], strategy: &Arc<dyn MergeStrategy>, words: &[&str]) {
    for live in TYPES {
        let model = model(DType::F32, live);
        let mut merger = model.merger();
        let good = at_one(&disjoint(3, 4));
        merger.apply(&good, &sum()).unwrap();
        let before = model.bits();
        let error = merger.apply(adapters, strategy).unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{error:?} lacks one of {words:?}");
        assert!(model.bits() == before, "{error}: a bit changed");
        assert_eq!(merger.apply(&good, &sum()).unwrap().rows_rewritten, 0);
    }
}

/// One row of ones.
fn layer(name: &str, outputs: usize, columns: usize) -> AdapterLayer {
    AdapterLayer { name: name.into(), outputs, columns, rank: 1, rows: vec![0], a: vec![1.0; columns], b: vec![1.0] }
}

/// One row that does not stay finite.
fn huge(name: &str, outputs: usize, columns: usize) -> AdapterLayer {
    AdapterLayer { a: vec![4.0; columns], b: vec![f32::MAX], ..layer(name, outputs, columns) }
}

fn foreign(layer: AdapterLayer) -> Vec<(Arc<AdapterFactors>, f32)> {
    vec![(Arc::new(AdapterFactors::new("x", 1.0, vec![layer]).unwrap()), 1.0)]
}

#[test]
fn bad_input_changes_nothing() {
    let one = adapter("one", 1, 2, |m| block(2, m));
    refuses(&[(one.clone(), f32::NAN)], &mean(), &["one", "NaN", "finite"]);
    refuses(&[(one.clone(), 1.0), (one.clone(), 2.0)], &mean(), &["one", "twice"]);
    refuses(&foreign(layer("mid.to_q", 4, 4)), &mean(), &["x", "mid.to_q", "not in this model"]);
    refuses(&foreign(layer("layer64x128", 64, 127)), &mean(), &["layer64x128", "64 x 127", "64 x 128"]);
    refuses(&foreign(huge("layer96x96", 96, 96)), &mean(), &["\"x\"", "row 0", "layer96x96", "finite"]);
}

#[test]
fn a_merge_that_fails_in_its_first_layer_leaves_what_was_merged_in_the_others() {
    // One thread takes the layers in order and does not come to the others.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    pool.install(|| refuses(&foreign(huge("layer64x128", 64, 128)), &mean(), &["layer64x128", "finite"]));
}

#[test]
fn a_strategys_plan_is_checked() {
    struct Fixed(Plan);
    impl MergeStrategy for Fixed {
        fn id(&self) -> &str {
            "fixed"
        }
        fn fingerprint(&self) -> &str {
            "fixed"
        }
        fn plan(&self, _: &[LayerInfo], _: &[&dyn AdapterView]) -> Result<Plan> {
            Ok(self.0.clone())
        }
        fn fill(&self, _: Tile<'_>, _: &mut [f32]) -> Result<()> {
            unreachable!("nothing is planned dense")
        }
    }
    let list = at_one(&[adapter("one", 1, 2, |m| block(2, m))]);
    let term = |adapter, coefficients| Term { adapter, coefficients };
    let fixed = |plan| -> Arc<dyn MergeStrategy> { Arc::new(Fixed(plan)) };
    let rest = || (1..SHAPES.len()).map(|_| LayerPlan::default());
    let plan = |first: Vec<Term>| fixed(std::iter::once(LayerPlan::Factored(first)).chain(rest()).collect());
    refuses(&list, &fixed(vec![]), &["fixed", "0 layers"]);
    refuses(&list, &plan(vec![term(1, Coefficients::Uniform(1.0))]), &["no adapter 1"]);
    refuses(&list, &plan(vec![term(0, Coefficients::Uniform(1.0)); 2]), &["twice"]);
    refuses(&list, &plan(vec![term(0, Coefficients::Uniform(f32::INFINITY))]), &["one", "inf"]);
    refuses(&list, &plan(vec![term(0, Coefficients::PerRow(vec![1.0; 3].into()))]), &["3 coefficients"]);
}

#[test]
fn invalid_factors_are_refused() {
    let good = AdapterLayer {
        name: "l".into(),
        outputs: 4,
        columns: 3,
        rank: 2,
        rows: vec![1, 3],
        a: vec![1.0; 6],
        b: vec![1.0; 4],
    };
    let error = |change: &dyn Fn(&mut AdapterLayer)| {
        let mut layer = good.clone();
        change(&mut layer);
        AdapterFactors::new("x", 1.0, vec![layer]).unwrap_err().to_string()
    };
    assert!(error(&|l| l.a.truncate(5)).contains("A has 5 values"));
    assert!(error(&|l| l.b.truncate(3)).contains("B has 3 values"));
    assert!(error(&|l| l.rows = vec![3, 1]).contains("ascending"));
    assert!(error(&|l| l.rows = vec![1, 4]).contains("row 4"));
    assert!(error(&|l| l.a[2] = f32::NAN).contains("NaN"));
    assert!(AdapterFactors::new("x", f32::INFINITY, vec![good.clone()]).is_err());
    assert!(AdapterFactors::new("x", 1.0, vec![good.clone(), good]).unwrap_err().to_string().contains("twice"));
}

#[test]
fn targets_that_do_not_fit_are_refused() {
    let model = model(DType::F32, DType::F32);
    let broken = |change: &dyn Fn(&mut Vec<Target>)| {
        let mut targets = model.targets.clone();
        change(&mut targets);
        Merger::new(targets).unwrap_err().to_string()
    };
    assert!(broken(&|t| t[0].live = t[1].live.clone()).contains("layer64x128"));
    assert!(broken(&|t| t.push(t[0].clone())).contains("shared with another"));
    assert!(broken(&|t| t[0].live = t[0].live.to_dtype(DType::F64).unwrap()).contains("F64"));
    assert!(broken(&|t| t[5].live = t[5].live.t().unwrap()).contains("contiguous"));
    assert!(broken(&|t| t[1].info.name = t[0].info.name.clone()).contains("two Linears"));
}

#[test]
fn factors_of_a_file_are_those_written() {
    use blocklora_spec::*;
    let digest = "ab".repeat(32);
    let manifest = Manifest {
        name: "milo".into(),
        kind: Kind::Subject,
        class_word: "dog".into(),
        tokens: vec![],
        base: Base { architecture: "test".into(), digest: digest.clone() },
        algorithm: Algorithm {
            id: "test".into(),
            version: "1.0.0".into(),
            digest: None,
            config: serde_json::Value::Object(Default::default()),
        },
        partition: Some(Partition { scheme: Scheme::Strided, capacity: 4, seed: 0, slot: 1 }),
        rank: 2,
        alpha: 0.5,
        delta: Delta::Alpha,
        outputs: BTreeMap::new(),
        erasure_lambda: 0.0,
        training: Training { steps: 1, seed: 1, data_digest: digest },
        licence: None,
        created: None,
        tensor_digest: String::new(),
    };
    let (a, b) = ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [7.0, 8.0, 9.0, 10.0]);
    let layer = Layer { name: "unet.to_q", outputs: 7, a: &a, b: &b };
    let bytes = AdapterBuilder::new(&manifest, Storage::F32).layer(layer).to_bytes("milo").unwrap();
    let file = Adapter::from_bytes("milo", bytes).unwrap();
    let factors = AdapterFactors::from_adapter(&file).unwrap();
    assert_eq!((factors.name(), factors.digest(), factors.scale()), ("milo", file.digest(), 0.5));
    let read = factors.layer("unet.to_q").unwrap();
    assert_eq!((read.outputs, read.columns, read.rank), (7, 3, 2));
    assert_eq!((&read.rows[..], &read.a[..], &read.b[..]), (&[1, 5][..], &a[..], &b[..]));
}
