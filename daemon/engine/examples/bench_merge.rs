//! Measures a merge on random weights of a real model's shapes and prints the figures as JSON.
//!
//! `cargo run --release --example bench_merge -- [f32|f16|bf16] [threads] [repeats] [adapters] [rank] [capacity]`

use blocklora_engine::{Result, bench};
use candle_core::{DType, Device};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |index: usize, default: usize| arguments.get(index).and_then(|a| a.parse().ok()).unwrap_or(default);
    let precision = match arguments.first().map_or("f32", String::as_str) {
        "f16" => DType::F16,
        "bf16" => DType::BF16,
        _ => DType::F32,
    };
    let capacity = number(5, 16) as u32;
    let figures = bench::merge(
        bench::Shape::Sd15,
        number(3, 15),
        number(4, 4),
        capacity,
        precision,
        &Device::Cpu,
        number(1, 2),
        number(2, 9),
    )?;
    println!(
        "{}",
        serde_json::to_string_pretty(&figures).map_err(|e| blocklora_engine::Error::option(
            "json",
            "",
            e.to_string()
        ))?
    );
    Ok(())
}
