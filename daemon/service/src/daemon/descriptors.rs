//! How many file descriptors are for what. The process may have so many open and no more: what clients keep leaves room for
//! those who connect, and for the daemon's own files.

use crate::error::{Error, Kind, Result};

/// For results of finished jobs: a half.
pub fn for_results() -> usize {
    most() / 2
}

/// For adapters that clients brought: an eighth.
pub fn for_adapters() -> usize {
    most() / 8
}

/// For previews: an eighth.
pub fn for_previews() -> usize {
    most() / 8
}

/// Fails where `open`, which are `what`, are as many as may be; `cure` is what their owner can do.
pub fn check(open: usize, most: usize, what: &str, cure: &str) -> Result<()> {
    if open < most {
        return Ok(());
    }
    Err(Error::new(Kind::NotSupported, format!("{open} {what}, and no more may be ({CURE}); {cure}")))
}

/// What to change where they do not suffice.
pub const CURE: &str = "LimitNOFILE of the service, or ulimit -n";

fn most() -> usize {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    limit.current.map_or(usize::MAX, |most| usize::try_from(most).unwrap_or(usize::MAX))
}
