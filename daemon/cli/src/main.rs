//! The blocklora command line.
fn main() {}
