//! Resident memory of this process, where the system tells.

use std::fs;

/// Bytes resident now.
pub fn resident() -> Option<u64> {
    status("VmRSS:")
}

/// The most bytes resident since `reset_peak`.
pub fn peak() -> Option<u64> {
    status("VmHWM:")
}

/// Starts a new measurement of the peak; none where the system cannot.
pub fn reset_peak() -> Option<()> {
    fs::write("/proc/self/clear_refs", "5").ok()
}

fn status(field: &str) -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(field))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib << 10)
}
