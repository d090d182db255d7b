//! The BlockLoRA daemon.

fn main() {}
