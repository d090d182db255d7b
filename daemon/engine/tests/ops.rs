//! Every operation against the plain one: the value and all gradients.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use blocklora_engine::ops::{self, LoraBranch, reference};
use candle_core::{DType, Device, Result, Tensor, Var};

/// Numbers in about -1..1 that look random and are the same everywhere.
fn numbers(shape: &[usize], seed: u64) -> Tensor {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0xd1b5_4a32_d192_ed03;
    let count = shape.iter().product();
    let data: Vec<f32> = (0..count)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 40) as f32 / (1u64 << 24) as f32) * 2.0 - 1.0
        })
        .collect();
    Tensor::from_vec(data, shape, &Device::Cpu).unwrap()
}

fn var(shape: &[usize], seed: u64) -> Var {
    Var::from_tensor(&numbers(shape, seed)).unwrap()
}

fn flat(x: &Tensor) -> Vec<f32> {
    x.flatten_all().unwrap().to_vec1().unwrap()
}

/// Largest difference relative to the largest value (and at least 1).
fn assert_close(got: &Tensor, want: &Tensor, what: &str) {
    assert_eq!(got.dims(), want.dims(), "{what}");
    let (got, want) = (flat(got), flat(want));
    let scale = want.iter().fold(1.0f32, |max, x| max.max(x.abs()));
    for (i, (got, want)) in got.iter().zip(&want).enumerate() {
        assert!((got - want).abs() <= 2e-5 * scale, "{what}: element {i} is {got}, not {want} (scale {scale})");
    }
}

/// Value and gradients of sum(weighting * f(vars)).
fn run(vars: &[Var], f: &dyn Fn(&[Tensor]) -> Result<Tensor>) -> (Tensor, Vec<Tensor>) {
    let args: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let y = f(&args).unwrap();
    let loss = (&y * numbers(y.dims(), 77)).unwrap().sum_all().unwrap();
    let grads = loss.backward().unwrap();
    let grads = vars.iter().map(|v| grads.get(v).unwrap().clone()).collect();
    (y, grads)
}

fn compare(
    what: &str,
    vars: &[Var],
    ours: &dyn Fn(&[Tensor]) -> Result<Tensor>,
    plain: &dyn Fn(&[Tensor]) -> Result<Tensor>,
) {
    let ((y, grads), (y_plain, grads_plain)) = (run(vars, ours), run(vars, plain));
    assert_close(&y, &y_plain, what);
    for (i, (grad, plain)) in grads.iter().zip(&grads_plain).enumerate() {
        assert_close(grad, plain, &format!("{what}, gradient {i}"));
    }
}

const PRECISIONS: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

#[test]
fn linear() {
    for dtype in PRECISIONS {
        for (shape, m) in [
            (vec![1, 1, 1], 1),
            (vec![1, 1, 5], 7),
            (vec![3, 4, 32], 96),
            (vec![2, 6], 40),
            (vec![2, 64, 320], 640),
            (vec![3, 77, 129], 1031),
            (vec![5, 33, 2000], 70),
        ] {
            let weight = numbers(&[m, *shape.last().unwrap()], 1).to_dtype(dtype).unwrap();
            let bias = numbers(&[m], 2).to_dtype(dtype).unwrap();
            let x = [var(&shape, 3)];
            for bias in [None, Some(&bias)] {
                compare(&format!("linear {shape:?} {m} {dtype:?}"), &x, &|a| ops::linear(&a[0], &weight, bias), &|a| {
                    reference::linear(&a[0], &weight, bias)
                });
            }
        }
    }
}

#[test]
fn linear_reads_strided_inputs_and_views_of_weights() {
    let x = [var(&[3, 10, 4], 1)];
    let weight = numbers(&[9, 10], 2).narrow(0, 2, 5).unwrap();
    compare("strided", &x, &|a| ops::linear(&a[0].transpose(1, 2)?, &weight, None), &|a| {
        reference::linear(&a[0].transpose(1, 2)?.contiguous()?, &weight, None)
    });
}

fn branch(rows: Vec<u32>, mask: Option<Tensor>) -> LoraBranch {
    LoraBranch { rows: Arc::from(rows), mask, scale: 0.7 }
}

#[test]
fn linear_lora() {
    let (n, m, r) = (24, 30, 4);
    let scattered = vec![1u32, 4, 5, 11, 29];
    let masks = |batch: usize, owned: usize| {
        let one = numbers(&[owned], 5).abs().unwrap();
        let each = numbers(&[batch, owned], 6).abs().unwrap();
        [None, Some(one), Some(each)]
    };
    for dtype in PRECISIONS {
        let weight = numbers(&[m, n], 1).to_dtype(dtype).unwrap();
        let bias = numbers(&[m], 2).to_dtype(dtype).unwrap();
        for batch in [1, 3] {
            for tokens in [1, 7, 64] {
                for rows in [scattered.clone(), (6..12).collect(), (0..m as u32).collect(), vec![3]] {
                    for mask in masks(batch, rows.len()) {
                        let vars = [var(&[batch, tokens, n], 3), var(&[r, n], 4), var(&[rows.len(), r], 8)];
                        let branch = branch(rows.clone(), mask);
                        compare(
                            &format!("linear_lora {batch} {tokens} {rows:?} {dtype:?}"),
                            &vars,
                            &|a| ops::linear_lora(&a[0], &weight, Some(&bias), &a[1], &a[2], &branch),
                            &|a| reference::linear_lora(&a[0], &weight, Some(&bias), &a[1], &a[2], &branch),
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn linear_lora_owning_no_rows_is_linear() {
    let (x, weight) = (numbers(&[2, 3, 8], 1), numbers(&[5, 8], 2));
    let (a, b) = (numbers(&[2, 8], 3), Tensor::zeros((0, 2), DType::F32, &Device::Cpu).unwrap());
    let y = ops::linear_lora(&x, &weight, None, &a, &b, &branch(vec![], None)).unwrap();
    assert_close(&y, &reference::linear(&x, &weight, None).unwrap(), "no rows");
}

#[test]
fn linear_lora_skips_gradients_nobody_asks_for() {
    let (x, weight) = (numbers(&[2, 3, 8], 1), numbers(&[5, 8], 2));
    let (a, b) = (var(&[2, 8], 3), var(&[2, 2], 4));
    let y = ops::linear_lora(&x, &weight, None, a.as_tensor(), b.as_tensor(), &branch(vec![0, 4], None)).unwrap();
    let grads = y.sum_all().unwrap().backward().unwrap();
    assert!(grads.get(&a).is_some() && grads.get(&b).is_some() && grads.get(&x).is_none());
}

#[test]
fn conv2d() {
    for dtype in PRECISIONS {
        for (batch, channels, height, width, outputs, kernel, stride, padding) in [
            (1, 1, 1, 1, 1, 1, 1, 0),
            (3, 2, 1, 1, 3, 3, 1, 1),
            (1, 5, 8, 8, 7, 3, 1, 1),
            (3, 5, 8, 8, 7, 3, 1, 1),
            (3, 8, 2, 2, 8, 3, 1, 1),
            (2, 6, 9, 7, 4, 3, 2, 1),
            (1, 6, 9, 8, 4, 3, 2, 0),
            (3, 4, 5, 5, 6, 3, 2, 1),
            (2, 16, 8, 8, 8, 1, 1, 0),
            (1, 16, 24, 30, 8, 1, 1, 0),
            (2, 3, 40, 33, 5, 3, 1, 1),
            (1, 70, 40, 33, 9, 3, 1, 1),
            (1, 3, 12, 12, 4, 4, 4, 0),
            // Winograd's tiles: part tiles, several images in one vector, several groups, all paddings
            (1, 32, 16, 16, 16, 3, 1, 1),
            (2, 70, 17, 33, 49, 3, 1, 1),
            (3, 40, 8, 8, 25, 3, 1, 1),
            (1, 130, 18, 18, 33, 3, 1, 0),
            (1, 33, 14, 15, 50, 3, 1, 2),
            (1, 32, 50, 61, 17, 3, 1, 1),
            (1, 2, 6, 6, 3, 1, 2, 0),
            (2, 2, 3, 2, 3, 5, 1, 2),
            (1, 2, 3, 3, 2, 3, 1, 3),
        ] {
            let weight = numbers(&[outputs, channels, kernel, kernel], 1).to_dtype(dtype).unwrap();
            let bias = numbers(&[outputs], 2).to_dtype(dtype).unwrap();
            let x = [var(&[batch, channels, height, width], 3)];
            let what = format!("conv2d {batch}x{channels}x{height}x{width} o{outputs} k{kernel} s{stride} p{padding}");
            for bias in [None, Some(&bias)] {
                // candle's own gradient of a convolution leaves out pixels that no tap reads
                let plain = |a: &[Tensor]| by_definition(&a[0], &weight, bias, stride, padding);
                compare(&what, &x, &|a| ops::conv2d(&a[0], &weight, bias, stride, padding), &plain);
                let y = ops::conv2d(x[0].as_tensor(), &weight, bias, stride, padding).unwrap();
                assert_close(&y, &reference::conv2d(x[0].as_tensor(), &weight, bias, stride, padding).unwrap(), &what);
            }
        }
    }
}

/// The sum over taps of shifted, strided images, each through the tap's matrix.
fn by_definition(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, stride: usize, padding: usize) -> Result<Tensor> {
    let weight = weight.to_dtype(DType::F32)?;
    let (outputs, _, kernel, _) = weight.dims4()?;
    let x = x.pad_with_zeros(2, padding, padding)?.pad_with_zeros(3, padding, padding)?;
    let (batch, channels, height, width) = x.dims4()?;
    let (out_height, out_width) = ((height - kernel) / stride + 1, (width - kernel) / stride + 1);
    let mut total = Tensor::zeros((batch, outputs, out_height * out_width), DType::F32, x.device())?;
    for tap_y in 0..kernel {
        for tap_x in 0..kernel {
            let index = |tap: usize, out: usize| {
                Tensor::from_vec((0..out).map(|i| (i * stride + tap) as u32).collect::<Vec<_>>(), out, x.device())
            };
            let image = x.index_select(&index(tap_y, out_height)?, 2)?.index_select(&index(tap_x, out_width)?, 3)?;
            let matrix = weight.narrow(2, tap_y, 1)?.narrow(3, tap_x, 1)?.reshape((outputs, channels))?;
            let image = image.reshape((batch, channels, ()))?;
            total = (total + matrix.unsqueeze(0)?.broadcast_matmul(&image)?)?;
        }
    }
    let y = total.reshape((batch, outputs, out_height, out_width))?;
    match bias {
        Some(bias) => y.broadcast_add(&bias.to_dtype(DType::F32)?.reshape((1, (), 1, 1))?),
        None => Ok(y),
    }
}

#[test]
fn group_norm() {
    for dtype in PRECISIONS {
        for (shape, groups) in [
            (vec![1, 2, 1, 1], 1),
            (vec![3, 8, 8, 8], 4),
            (vec![1, 6, 3, 5], 3),
            (vec![2, 12, 2, 2], 4),
            (vec![2, 64, 17, 16], 32),
            (vec![2, 8, 33], 2),
            (vec![2, 8], 2),
        ] {
            let channels = shape[1];
            let (weight, bias) = (numbers(&[channels], 1), numbers(&[channels], 2));
            let (weight, bias) = (weight.to_dtype(dtype).unwrap(), bias.to_dtype(dtype).unwrap());
            let x = [var(&shape, 3)];
            for with_silu in [false, true] {
                compare(
                    &format!("group_norm {shape:?} {groups} {with_silu} {dtype:?}"),
                    &x,
                    &|a| ops::group_norm(&(&a[0] + 0.5)?, &weight, &bias, groups, 1e-5, with_silu),
                    &|a| reference::group_norm(&(&a[0] + 0.5)?, &weight, &bias, groups, 1e-5, with_silu),
                );
            }
        }
    }
}

#[test]
fn layer_norm() {
    for dtype in PRECISIONS {
        for shape in [vec![1, 1, 2], vec![3, 7, 32], vec![2, 77, 769], vec![5, 33]] {
            let width = *shape.last().unwrap();
            let weight = numbers(&[width], 1).to_dtype(dtype).unwrap();
            let bias = numbers(&[width], 2).to_dtype(dtype).unwrap();
            compare(
                &format!("layer_norm {shape:?} {dtype:?}"),
                &[var(&shape, 3)],
                &|a| ops::layer_norm(&a[0], &weight, &bias, 1e-5),
                &|a| reference::layer_norm(&a[0], &weight, &bias, 1e-5),
            );
        }
    }
}

#[test]
fn attention() {
    for (batch, queries, keys, heads, depth) in [
        (1, 1, 1, 1, 1),
        (3, 4, 4, 2, 32),
        (2, 16, 32, 4, 28),
        (1, 64, 77, 3, 40),
        (3, 5, 33, 2, 7),
        (1, 150, 150, 2, 16),
        (1, 300, 1100, 1, 8),
        (2, 65, 65, 1, 160),
    ] {
        let width = heads * depth;
        let vars = [var(&[batch, queries, width], 1), var(&[batch, keys, width], 2), var(&[batch, keys, width], 3)];
        for causal in [false, true] {
            if causal && queries != keys {
                continue;
            }
            let scale = 3.0 / (depth as f64).sqrt();
            compare(
                &format!("attention {batch} {queries} {keys} {heads}x{depth} {causal}"),
                &vars,
                &|a| ops::attention(&a[0], &a[1], &a[2], heads, scale, causal),
                &|a| reference::attention(&a[0], &a[1], &a[2], heads, scale, causal),
            );
        }
    }
}

#[test]
fn attention_of_huge_scores_stays_finite() {
    let q = (numbers(&[1, 8, 16], 1) * 1e4).unwrap();
    let y = ops::attention(&q, &q, &numbers(&[1, 8, 16], 2), 2, 1.0, false).unwrap();
    assert!(flat(&y).iter().all(|x| x.is_finite()));
}

type Unary = fn(&Tensor) -> Result<Tensor>;

#[test]
fn elementwise() {
    let pairs: [(&str, Unary, Unary); 4] = [
        ("silu", ops::silu, reference::silu),
        ("gelu", ops::gelu, reference::gelu),
        ("quick_gelu", ops::quick_gelu, reference::quick_gelu),
        ("geglu", ops::geglu, reference::geglu),
    ];
    for (name, ours, plain) in pairs {
        for shape in [vec![1, 1, 2], vec![3, 5, 34], vec![2, 130, 640]] {
            compare(name, &[var(&shape, 1)], &|a| ours(&(&a[0] * 9.0)?), &|a| plain(&(&a[0] * 9.0)?));
        }
        let nan = Tensor::new(&[[f32::NAN, 1.0]], &Device::Cpu).unwrap();
        assert!(flat(&ours(&nan).unwrap())[0].is_nan(), "{name} hides a NaN");
        let ends = Tensor::new(&[[-1000.0f32, 1000.0, 1000.0, -1000.0]], &Device::Cpu).unwrap();
        assert_close(&ours(&ends).unwrap(), &plain(&ends).unwrap(), name);
    }
}

#[test]
fn upsample() {
    for shape in [[1, 1, 1, 1], [3, 2, 3, 5], [2, 64, 16, 17]] {
        compare("upsample", &[var(&shape, 1)], &|a| ops::upsample_nearest2x(&a[0]), &|a| {
            reference::upsample_nearest2x(&a[0])
        });
    }
}

/// Central differences of every argument against the gradients, in directions rather than by element.
fn finite_differences(what: &str, vars: &[Var], f: &dyn Fn(&[Tensor]) -> Result<Tensor>) {
    let (_, grads) = run(vars, f);
    let loss = |args: &[Tensor]| -> f64 {
        let y = flat(&f(args).unwrap());
        let weighting = flat(&numbers(&[y.len()], 77));
        y.iter().zip(weighting).map(|(&y, w)| f64::from(y) * f64::from(w)).sum()
    };
    for (i, grad) in grads.iter().enumerate() {
        let direction = numbers(grad.dims(), 100 + i as u64);
        let step = 1e-2;
        let at = |sign: f64| {
            let mut args: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
            args[i] = (&args[i] + (&direction * (sign * step)).unwrap()).unwrap();
            loss(&args)
        };
        let measured = (at(1.0) - at(-1.0)) / (2.0 * step);
        let predicted: f64 = flat(grad).iter().zip(flat(&direction)).map(|(&g, d)| f64::from(g) * f64::from(d)).sum();
        assert!(
            (measured - predicted).abs() < 2e-3 * (1.0 + predicted.abs()),
            "{what}: argument {i}: {measured} by differences, {predicted} by the gradient"
        );
    }
}

#[test]
fn gradients_are_finite_differences() {
    let weight = numbers(&[12, 10], 1);
    let mask = numbers(&[2, 4], 9).abs().unwrap();
    let branch = branch(vec![0, 3, 4, 10], Some(mask));
    finite_differences("linear_lora", &[var(&[2, 6, 10], 2), var(&[3, 10], 3), var(&[4, 3], 4)], &|a| {
        ops::linear_lora(&a[0], &weight, None, &a[1], &a[2], &branch)
    });
    for causal in [false, true] {
        finite_differences("attention", &[var(&[2, 9, 24], 2), var(&[2, 9, 24], 3), var(&[2, 9, 24], 4)], &|a| {
            ops::attention(&a[0], &a[1], &a[2], 3, 0.4, causal)
        });
    }
}

/// All operations on sizes that are split over threads; every bit of the values and gradients.
fn everything() -> Vec<u32> {
    let mut bits = Vec::new();
    let mut add = |vars: &[Var], f: &dyn Fn(&[Tensor]) -> Result<Tensor>| {
        let (y, grads) = run(vars, f);
        for x in std::iter::once(&y).chain(&grads) {
            bits.extend(flat(x).iter().map(|x| x.to_bits()));
        }
    };
    for dtype in PRECISIONS {
        let weight = numbers(&[300, 200], 1).to_dtype(dtype).unwrap();
        let vars = [var(&[3, 64, 200], 2), var(&[8, 200], 3), var(&[60, 8], 4)];
        let branch = branch((0..60).map(|i| i * 5).collect(), None);
        add(&vars[..1], &|a| ops::linear(&a[0], &weight, None));
        add(&vars, &|a| ops::linear_lora(&a[0], &weight, None, &a[1], &a[2], &branch));
        let kernel = numbers(&[70, 64, 3, 3], 5).to_dtype(dtype).unwrap();
        for size in [4, 8, 40] {
            add(&[var(&[5, 64, size, size], 6)], &|a| ops::conv2d(&a[0], &kernel, None, 1, 1));
            add(&[var(&[5, 64, size, size], 6)], &|a| ops::conv2d(&a[0], &kernel, None, 2, 1));
        }
        let scale = numbers(&[64], 7).to_dtype(dtype).unwrap();
        add(&[var(&[5, 64, 40, 40], 6)], &|a| ops::group_norm(&a[0], &scale, &scale, 32, 1e-5, true));
        add(&[var(&[5, 99, 64], 6)], &|a| ops::layer_norm(&a[0], &scale, &scale, 1e-5));
    }
    let vars = [var(&[2, 600, 80], 1), var(&[2, 600, 80], 2), var(&[2, 600, 80], 3)];
    for causal in [false, true] {
        add(&vars, &|a| ops::attention(&a[0], &a[1], &a[2], 2, 0.2, causal));
    }
    for op in [ops::silu, ops::gelu, ops::quick_gelu, ops::geglu] {
        add(&vars[..1], &|a| op(&a[0]));
    }
    add(&[var(&[3, 70, 20, 20], 1)], &|a| ops::upsample_nearest2x(&a[0]));
    bits
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let with =
        |threads: usize| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(everything);
    let one = with(1);
    for threads in [1, 2, 3, 8] {
        assert!(with(threads) == one, "{threads} threads give other bits than one");
    }
}

#[test]
fn wrong_shapes_are_errors() {
    let x = numbers(&[2, 3, 8], 1);
    let image = numbers(&[2, 8, 3, 3], 1);
    let w = |shape: &[usize]| numbers(shape, 2);
    assert!(ops::linear(&x, w(&[5, 7]), None).is_err());
    assert!(ops::linear(&x, w(&[5, 8]), Some(&w(&[4]))).is_err());
    let lora =
        |a: &[usize], b: &[usize], branch: &LoraBranch| ops::linear_lora(&x, w(&[5, 8]), None, &w(a), &w(b), branch);
    assert!(lora(&[2, 8], &[2, 2], &branch(vec![0, 4], None)).is_ok());
    assert!(lora(&[2, 8], &[2, 2], &branch(vec![0, 5], None)).is_err());
    assert!(lora(&[2, 7], &[2, 2], &branch(vec![0, 4], None)).is_err());
    assert!(lora(&[2, 8], &[3, 2], &branch(vec![0, 4], None)).is_err());
    assert!(lora(&[2, 8], &[2, 2], &branch(vec![0, 4], Some(w(&[3])))).is_err());
    assert!(ops::conv2d(&image, w(&[4, 7, 3, 3]), None, 1, 1).is_err());
    assert!(ops::conv2d(&image, w(&[4, 8, 3, 3]), None, 0, 1).is_err());
    assert!(ops::conv2d(&image, w(&[4, 8, 5, 5]), None, 1, 0).is_err());
    assert!(ops::conv2d(&image, w(&[4, 8, 3, 3]), Some(&w(&[3])), 1, 1).is_err());
    assert!(ops::group_norm(&image, &w(&[8]), &w(&[8]), 3, 1e-5, false).is_err());
    assert!(ops::group_norm(&image, &w(&[7]), &w(&[8]), 2, 1e-5, false).is_err());
    assert!(ops::layer_norm(&x, &w(&[7]), &w(&[8]), 1e-5).is_err());
    assert!(ops::attention(&x, &x, &w(&[2, 4, 8]), 2, 1.0, false).is_err());
    assert!(ops::attention(&x, &x, &x, 3, 1.0, false).is_err());
    assert!(ops::attention(&x, &w(&[2, 4, 8]), &w(&[2, 4, 8]), 2, 1.0, true).is_err());
    assert!(ops::geglu(&w(&[2, 3])).is_err());
}
