//! Compiles `kernels/` for the feature `cuda`, with the compiler that candle's kernels are built with; else does nothing.

use std::env;
use std::path::Path;
use std::process::Command;

/// The oldest cards that compilers of CUDA 13 know; a driver translates for newer ones.
const COMPUTE_CAP: &str = "75";

fn main() {
    println!("cargo::rerun-if-changed=kernels");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    println!("cargo::rerun-if-env-changed=NVCC");
    println!("cargo::rerun-if-env-changed=CUDA_COMPUTE_CAP");
    let compiler = env::var("NVCC").unwrap_or_else(|_| "nvcc".into());
    let capability = env::var("CUDA_COMPUTE_CAP").unwrap_or_else(|_| COMPUTE_CAP.into());
    let out = env::var("OUT_DIR").unwrap_or_else(|_| fail("cargo did not say where to write"));
    for kernel in ["merge", "pointwise", "norm", "attention"] {
        let status = Command::new(&compiler)
            .args(["-ptx", "-O3", "-std=c++17", &format!("-arch=compute_{capability}"), "-o"])
            .arg(Path::new(&out).join(format!("{kernel}.ptx")))
            .arg(format!("kernels/{kernel}.cu"))
            .status();
        match status {
            Ok(status) if status.success() => {}
            Ok(status) => fail(&format!("{compiler} ended with {status} on kernels/{kernel}.cu")),
            Err(error) => fail(&format!("cannot run {compiler}: {error}; set NVCC, or see tests/gpu/build.sh")),
        }
    }
}

fn fail(reason: &str) -> ! {
    eprintln!("{reason}");
    std::process::exit(1)
}
