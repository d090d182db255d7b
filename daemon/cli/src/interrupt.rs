//! Ctrl-C: the first press asks the running command to stop cleanly, the second stops at once; so does the first one
//! where the command does not look.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;

use crate::held;

static REQUESTED: AtomicBool = AtomicBool::new(false);

/// Whether the running command looks for Ctrl-C.
static LOOKS: AtomicBool = AtomicBool::new(false);

/// Begins to listen for Ctrl-C.
pub fn install() -> anyhow::Result<()> {
    ctrlc::set_handler(|| {
        let is_first = !REQUESTED.swap(true, Ordering::SeqCst);
        if is_first && LOOKS.load(Ordering::SeqCst) {
            return;
        }
        let _none_is_made_any_more = held::remove_all();
        if is_first {
            eprintln!("blocklora: interrupted");
        }
        std::process::exit(130);
    })
    .context("cannot listen for Ctrl-C")
}

/// Whether Ctrl-C has been pressed. Whoever asks once goes on to ask.
pub fn requested() -> bool {
    LOOKS.store(true, Ordering::SeqCst);
    REQUESTED.load(Ordering::SeqCst)
}

/// [`blocklora_engine::Error::Cancelled`] if Ctrl-C has been pressed.
pub fn check() -> blocklora_engine::Result<()> {
    if requested() { Err(blocklora_engine::Error::Cancelled) } else { Ok(()) }
}
