//! How long mimalloc, which the programs allocate with, keeps pages that nobody uses.

use std::ffi::{c_int, c_long};
use std::sync::Once;

// Linked for its options; where a program allocates with something else, they change nothing.
use libmimalloc_sys as _;

#[allow(unsafe_code)]
// SAFETY: the signatures are those of mimalloc.h.
unsafe extern "C" {
    fn mi_option_set(option: c_int, value: c_long);
    fn mi_collect(force: bool);
}

/// `mi_option_purge_delay` of mimalloc.h.
const PURGE_DELAY: c_int = 15;
/// Longer than a prediction on a slow processor, after which the next one wants the same pages.
const KEEP_MS: c_long = 60_000;

/// Keeps pages for a minute after their last use instead of a second: a prediction needs the memory of the one before,
/// and getting a page back from the system costs more than computing what it holds.
pub(crate) fn keep_freed_pages() {
    static ONCE: Once = Once::new();
    // SAFETY: the option exists and takes any number of milliseconds; it is one word, which other threads only read.
    #[allow(unsafe_code)]
    ONCE.call_once(|| unsafe { mi_option_set(PURGE_DELAY, KEEP_MS) });
}

/// Gives the pages that nobody uses back to the system now, before something needs much memory of other sizes: they would
/// count beside it. The next prediction gets them anew, which takes tenths of a second for a gigabyte.
pub(crate) fn give_back_freed_pages() {
    // SAFETY: may be called at any time by any thread.
    #[allow(unsafe_code)]
    unsafe {
        mi_collect(true);
    }
}
