//! Tells the magic block which target the plugin is built for.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-env=BLOCKLORA_TARGET={}", std::env::var("TARGET").unwrap_or_default());
}
