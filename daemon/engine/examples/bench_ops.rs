//! Time per operation, ours against the plain one, at the sizes of the bundled model and of Stable Diffusion 1.5.
//!
//! `cargo run --release --example bench_ops -- [starter|sd15] [part of an operation's name]`; the minimum of several
//! runs counts, so a busy machine disturbs little. RAYON_NUM_THREADS sets the threads.

use std::sync::Arc;
use std::time::{Duration, Instant};

use blocklora_engine::ops::{self, LoraBranch, reference};
use candle_core::{DType, Device, Result, Tensor, Var};

type Op<'a> = &'a dyn Fn(&[Tensor]) -> Result<Tensor>;

struct Bench {
    filter: String,
    /// How long to repeat each measurement.
    patience: Duration,
}

impl Bench {
    fn minimum(&self, mut f: impl FnMut() -> Result<()>) -> Result<f64> {
        f()?;
        let (start, mut best, mut runs) = (Instant::now(), f64::INFINITY, 0);
        while runs < 3 || start.elapsed() < self.patience {
            let run = Instant::now();
            f()?;
            best = best.min(run.elapsed().as_secs_f64());
            runs += 1;
        }
        Ok(best * 1e6)
    }

    /// `flops`: floating-point operations of the forward pass.
    fn case(&self, name: &str, flops: f64, shapes: &[&[usize]], ours: Op, plain: Op) -> Result<()> {
        if !name.contains(&self.filter) {
            return Ok(());
        }
        let vars =
            shapes.iter().map(|&shape| Var::from_tensor(&random(shape, DType::F32)?)).collect::<Result<Vec<_>>>()?;
        let tracked: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
        let detached: Vec<Tensor> = tracked.iter().map(|x| x.detach()).collect();
        let mut times = Vec::new();
        for op in [ours, plain] {
            let forward = self.minimum(|| op(&detached).map(|_| ()))?;
            let both = self.minimum(|| op(&tracked)?.backward().map(|_| ()))?;
            times.extend([forward, both]);
        }
        println!(
            "{name:<44} {:>10.1} {:>10.1} {:>6.2} {:>10.1} {:>10.1} {:>6.2} {:>8.1}",
            times[0],
            times[2],
            times[2] / times[0],
            times[1],
            times[3],
            times[3] / times[1],
            flops / times[0] * 1e-3,
        );
        Ok(())
    }

    fn linear(&self, batch: usize, tokens: usize, n: usize, m: usize, dtype: DType) -> Result<()> {
        let (weight, bias) = (random(&[m, n], dtype)?, random(&[m], dtype)?);
        let flops = 2.0 * (batch * tokens * n * m) as f64;
        self.case(
            &format!("linear {batch}x{tokens} {n}->{m} {dtype:?}"),
            flops,
            &[&[batch, tokens, n]],
            &|x| ops::linear(&x[0], &weight, Some(&bias)),
            &|x| reference::linear(&x[0], &weight, Some(&bias)),
        )?;
        let rows: Arc<[u32]> = (0..m as u32 / 8).map(|i| i * 8).collect();
        let shapes: [&[usize]; 3] = [&[batch, tokens, n], &[8, n], &[rows.len(), 8]];
        let branch = LoraBranch { rows, mask: None, scale: 1.0 };
        self.case(
            &format!("lora   {batch}x{tokens} {n}->{m} {dtype:?}"),
            flops,
            &shapes,
            &|x| ops::linear_lora(&x[0], &weight, Some(&bias), &x[1], &x[2], &branch),
            &|x| reference::linear_lora(&x[0], &weight, Some(&bias), &x[1], &x[2], &branch),
        )
    }

    fn conv2d(&self, shape: [usize; 4], outputs: usize, kernel: usize, stride: usize, dtype: DType) -> Result<()> {
        let [batch, channels, height, width] = shape;
        let (weight, bias) = (random(&[outputs, channels, kernel, kernel], dtype)?, random(&[outputs], dtype)?);
        let flops = 2.0 * (batch * channels * height * width * outputs * kernel * kernel / stride / stride) as f64;
        self.case(
            &format!("conv2d {batch}x{channels}x{height}x{width}->{outputs} k{kernel} s{stride} {dtype:?}"),
            flops,
            &[&shape],
            &|x| ops::conv2d(&x[0], &weight, Some(&bias), stride, kernel / 2),
            &|x| reference::conv2d(&x[0], &weight, Some(&bias), stride, kernel / 2),
        )
    }

    fn norms(&self, shape: [usize; 4]) -> Result<()> {
        let [batch, channels, height, width] = shape;
        let (weight, bias) = (random(&[channels], DType::F32)?, random(&[channels], DType::F32)?);
        let elements = (batch * channels * height * width) as f64;
        self.case(
            &format!("group norm + silu {batch}x{channels}x{height}x{width}"),
            elements,
            &[&shape],
            &|x| ops::group_norm(&x[0], &weight, &bias, 32, 1e-5, true),
            &|x| reference::group_norm(&x[0], &weight, &bias, 32, 1e-5, true),
        )?;
        self.case(
            &format!("layer norm {batch}x{}x{channels}", height * width),
            elements,
            &[&[batch, height * width, channels]],
            &|x| ops::layer_norm(&x[0], &weight, &bias, 1e-5),
            &|x| reference::layer_norm(&x[0], &weight, &bias, 1e-5),
        )?;
        self.case(
            &format!("geglu {batch}x{}x{}", height * width, 8 * channels),
            8.0 * elements,
            &[&[batch, height * width, 8 * channels]],
            &|x| ops::geglu(&x[0]),
            &|x| reference::geglu(&x[0]),
        )?;
        self.case(
            &format!("upsample {batch}x{channels}x{height}x{width}"),
            4.0 * elements,
            &[&shape],
            &|x| ops::upsample_nearest2x(&x[0]),
            &|x| reference::upsample_nearest2x(&x[0]),
        )
    }

    fn attention(&self, batch: usize, queries: usize, keys: usize, heads: usize, depth: usize) -> Result<()> {
        let width = heads * depth;
        let scale = (depth as f64).powf(-0.5);
        self.case(
            &format!("attention {batch}x{queries}x{keys} {heads}x{depth}"),
            4.0 * (batch * queries * keys * width) as f64,
            &[&[batch, queries, width], &[batch, keys, width], &[batch, keys, width]],
            &|x| ops::attention(&x[0], &x[1], &x[2], heads, scale, false),
            &|x| reference::attention(&x[0], &x[1], &x[2], heads, scale, false),
        )
    }
}

fn random(shape: &[usize], dtype: DType) -> Result<Tensor> {
    Tensor::randn(0f32, 1.0, shape, &Device::Cpu)?.to_dtype(dtype)
}

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let sizes = arguments.next().unwrap_or_else(|| "starter".into());
    let bench = Bench {
        filter: arguments.next().unwrap_or_default(),
        patience: Duration::from_millis(if sizes == "sd15" { 1000 } else { 100 }),
    };
    println!(
        "{:<44} {:>10} {:>10} {:>6} {:>10} {:>10} {:>6} {:>8}",
        "microseconds", "forward", "plain", "x", "fwd + bwd", "plain", "x", "GFLOP/s"
    );
    if sizes == "sd15" {
        for dtype in [DType::F32, DType::F16] {
            bench.linear(2, 4096, 320, 320, dtype)?;
            bench.linear(1, 77, 768, 768, dtype)?;
            bench.linear(1, 77, 768, 3072, dtype)?;
            bench.linear(1, 77, 3072, 768, dtype)?;
            bench.linear(2, 1024, 640, 5120, dtype)?;
            bench.linear(2, 64, 1280, 1280, dtype)?;
            bench.linear(2, 77, 768, 320, dtype)?;
            bench.conv2d([2, 320, 64, 64], 320, 3, 1, dtype)?;
            bench.conv2d([2, 640, 32, 32], 640, 3, 1, dtype)?;
            bench.conv2d([2, 1280, 16, 16], 1280, 3, 1, dtype)?;
            bench.conv2d([2, 2560, 8, 8], 1280, 3, 1, dtype)?;
        }
        bench.conv2d([2, 320, 64, 64], 320, 3, 2, DType::F32)?;
        bench.conv2d([2, 640, 64, 64], 320, 1, 1, DType::F32)?;
        bench.conv2d([1, 128, 256, 256], 128, 3, 1, DType::F32)?;
        bench.norms([2, 320, 64, 64])?;
        bench.norms([2, 1280, 8, 8])?;
        bench.attention(2, 4096, 4096, 8, 40)?;
        bench.attention(2, 1024, 1024, 8, 80)?;
        bench.attention(2, 64, 64, 8, 160)?;
        bench.attention(2, 4096, 77, 8, 40)?;
        return bench.attention(2, 77, 77, 12, 64);
    }
    for dtype in [DType::F32, DType::F16] {
        bench.linear(8, 64, 64, 64, dtype)?;
        bench.linear(8, 16, 128, 1024, dtype)?;
        bench.linear(8, 4, 224, 224, dtype)?;
        bench.linear(8, 32, 96, 224, dtype)?;
        bench.linear(2, 1, 64, 256, dtype)?;
        bench.linear(2, 1, 256, 224, dtype)?;
        bench.conv2d([8, 64, 8, 8], 64, 3, 1, dtype)?;
        bench.conv2d([2, 64, 8, 8], 64, 3, 1, dtype)?;
        bench.conv2d([8, 128, 4, 4], 128, 3, 1, dtype)?;
        bench.conv2d([8, 224, 2, 2], 224, 3, 1, dtype)?;
        bench.conv2d([2, 448, 2, 2], 224, 3, 1, dtype)?;
    }
    bench.conv2d([8, 64, 8, 8], 64, 3, 2, DType::F32)?;
    bench.conv2d([8, 192, 8, 8], 64, 1, 1, DType::F32)?;
    bench.conv2d([8, 64, 32, 32], 64, 3, 1, DType::F32)?;
    bench.norms([8, 64, 8, 8])?;
    bench.norms([8, 224, 2, 2])?;
    bench.attention(8, 64, 64, 2, 32)?;
    bench.attention(8, 16, 32, 4, 32)?;
    bench.attention(8, 4, 32, 7, 32)?;
    bench.attention(2, 4, 4, 7, 32)?;
    bench.attention(8, 32, 32, 4, 24)
}
