//! The CUDA kernels compute what they should, run thread by thread on the CPU: no card is needed to find them wrong.

#![allow(missing_docs, clippy::unwrap_used)]

use std::process::Command;

use blocklora_tree::root;

#[test]
fn cuda_kernels_agree_with_plain_loops() {
    let done = Command::new(root().join("tests/gpu/emulate.sh")).output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    assert!(done.status.success(), "{out}{err}");
    assert!(out.contains("the kernels agree with plain loops"), "{out}{err}");
}
