//! Ctrl-C: the first press asks the running command to stop cleanly, the second stops at once.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;

static REQUESTED: AtomicBool = AtomicBool::new(false);

/// Begins to listen for Ctrl-C.
pub fn install() -> anyhow::Result<()> {
    ctrlc::set_handler(|| {
        if REQUESTED.swap(true, Ordering::SeqCst) {
            std::process::exit(130);
        }
    })
    .context("cannot listen for Ctrl-C")
}

/// Whether Ctrl-C has been pressed.
pub fn requested() -> bool {
    REQUESTED.load(Ordering::SeqCst)
}

/// [`blocklora_engine::Error::Cancelled`] if Ctrl-C has been pressed.
pub fn check() -> blocklora_engine::Result<()> {
    if requested() { Err(blocklora_engine::Error::Cancelled) } else { Ok(()) }
}
