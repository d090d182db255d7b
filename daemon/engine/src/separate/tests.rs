#![allow(clippy::unwrap_used)]
use super::*;
use crate::rng::{Rng, Stream};

const LAYER: &str = "unet.to_q";

/// X X^T of `inputs`, each [n].
fn moment(inputs: &[Vec<f32>]) -> Vec<f32> {
    let n = inputs[0].len();
    (0..n * n).map(|e| inputs.iter().map(|x| x[e / n] * x[e % n]).sum()).collect()
}

fn normals(seed: u64, count: usize) -> Vec<f32> {
    Rng::new(seed, Stream::Init, 0, 0).normals(count)
}

fn adapter(name: &str, seed: u64, rank: usize, n: usize) -> AdapterFactors {
    let layer = AdapterLayer {
        name: LAYER.into(),
        outputs: 2,
        columns: n,
        rank,
        rows: vec![0],
        a: normals(seed, rank * n),
        b: vec![1.0; rank],
    };
    AdapterFactors::new(name, 1.0, vec![layer]).unwrap()
}

fn product(a: &[f32], x: &[f32]) -> Vec<f32> {
    a.chunks_exact(x.len()).map(|row| row.iter().zip(x).map(|(a, x)| a * x).sum()).collect()
}

fn separated(moments: &[Vec<f32>], adapters: &[AdapterFactors], ridge: f64) -> Vec<Vec<f32>> {
    let mut inputs = Inputs { name: LAYER.into(), ..Inputs::default() };
    for (i, (moment, adapter)) in moments.iter().zip(adapters).enumerate() {
        inputs.add(i, moment, adapter).unwrap();
    }
    inputs.solve(ridge).unwrap().into_iter().map(|(_, a)| a).collect()
}

#[test]
fn inputs_that_differ_are_told_apart() {
    let (n, rank) = (12, 2);
    let inputs: Vec<Vec<Vec<f32>>> = (0..3).map(|i| (0..3).map(|k| normals(10 * i + k, n)).collect()).collect();
    let moments: Vec<Vec<f32>> = inputs.iter().map(|inputs| moment(inputs)).collect();
    let adapters: Vec<AdapterFactors> = (0..3).map(|i| adapter("c", 100 + i, rank, n)).collect();
    let separated = separated(&moments, &adapters, 1e-6);
    for (i, (new, adapter)) in separated.iter().zip(&adapters).enumerate() {
        let old = &adapter.layer(LAYER).unwrap().a;
        for (j, inputs) in inputs.iter().enumerate() {
            for x in inputs {
                // Nine independent inputs in twelve dimensions: its own are answered as before, the others not at all.
                let wanted = if i == j { product(old, x) } else { vec![0.0; rank] };
                for (found, wanted) in product(new, x).iter().zip(wanted) {
                    assert!((found - wanted).abs() < 1e-2, "{i} {j}: {found} for {wanted}");
                }
            }
        }
    }
}

#[test]
fn it_is_the_minimum() {
    let (n, rank, ridge) = (5, 1, 0.1);
    let moments: Vec<Vec<f32>> = (0..3).map(|i| moment(&[normals(i, n), normals(20 + i, n)])).collect();
    let adapters: Vec<AdapterFactors> = (0..3).map(|i| adapter("c", 100 + i, rank, n)).collect();
    let new = &separated(&moments, &adapters, ridge)[1];
    let old = &adapters[1].layer(LAYER).unwrap().a;
    let scaled = |g: &[f32]| {
        let trace: f64 = (0..n).map(|k| f64::from(g[k * n + k])).sum();
        g.iter().map(|&g| f64::from(g) / trace).collect::<Vec<f64>>()
    };
    let quadratic = |x: &[f64], g: &[f64]| -> f64 { (0..n * n).map(|e| x[e / n] * g[e] * x[e % n]).sum() };
    let cost = |a: &[f64]| {
        let change: Vec<f64> = a.iter().zip(old).map(|(a, &old)| a - f64::from(old)).collect();
        let of = |(j, g): (usize, &Vec<f32>)| quadratic(if j == 1 { &change } else { a }, &scaled(g));
        moments.iter().enumerate().map(of).sum::<f64>() + ridge / n as f64 * a.iter().map(|a| a * a).sum::<f64>()
    };
    let found: Vec<f64> = new.iter().map(|&a| f64::from(a)).collect();
    for k in 0..n {
        for step in [-1e-2, 1e-2] {
            let mut other = found.clone();
            other[k] += step;
            assert!(cost(&other) > cost(&found), "{k} {step}");
        }
    }
}

#[test]
fn one_adapter_alone_stays_as_it_is_on_its_inputs() {
    let n = 6;
    let inputs = [normals(1, n), normals(2, n)];
    let adapter = adapter("c", 3, 2, n);
    let new = &separated(&[moment(&inputs)], std::slice::from_ref(&adapter), 1e-6)[0];
    for x in &inputs {
        let wanted = product(&adapter.layer(LAYER).unwrap().a, x);
        product(new, x).iter().zip(wanted).for_each(|(found, wanted)| assert!((found - wanted).abs() < 1e-3));
    }
}

#[test]
fn what_cannot_be_is_refused() {
    let mut inputs = Inputs { name: LAYER.into(), ..Inputs::default() };
    assert!(inputs.add(0, &[0.0; 4], &adapter("c", 1, 1, 2)).unwrap_err().to_string().contains(LAYER));
    assert!(inputs.add(0, &[f32::NAN; 4], &adapter("c", 1, 1, 2)).is_err());
    let nothing = Separation { layers: Vec::new(), adapters: 0 };
    assert!(nothing.separate(0.0).unwrap_err().to_string().contains("ridge"));
}
