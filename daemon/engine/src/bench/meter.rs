//! Time, processor time, page faults and memory of something that is done several times.

use std::fs;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;

use super::memory;
use crate::error::{Error, Result};

/// What something costs each time.
#[derive(Clone, Debug, Serialize)]
pub struct Cost {
    /// How often it was measured, after once to warm up.
    pub repeats: usize,
    /// Median wall time in milliseconds.
    pub wall_ms: f64,
    /// The shortest.
    pub wall_ms_min: f64,
    /// Median processor time of all threads in milliseconds: what counts on a machine that does other work, too.
    pub cpu_ms: f64,
    /// The shortest.
    pub cpu_ms_min: f64,
    /// Median number of pages that the system had to hand out.
    pub page_faults: u64,
    /// The most bytes resident, from the start of the process.
    pub peak_resident_bytes: Option<u64>,
}

/// Measures `work`, `repeats` times after once to warm up.
pub fn measure(repeats: usize, mut work: impl FnMut() -> Result<()>) -> Result<Cost> {
    if repeats == 0 {
        return Err(Error::option("repeats", repeats, "it must be 1 or more"));
    }
    work()?;
    let (mut wall, mut cpu, mut faults) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..repeats {
        let (start, cpu_start, faults_start) = (Instant::now(), cpu_time(), page_faults());
        work()?;
        wall.push(1e3 * start.elapsed().as_secs_f64());
        cpu.push(1e3 * (cpu_time() - cpu_start).as_secs_f64());
        faults.push(page_faults() - faults_start);
    }
    wall.sort_by(f64::total_cmp);
    cpu.sort_by(f64::total_cmp);
    faults.sort_unstable();
    Ok(Cost {
        repeats,
        wall_ms: wall[repeats / 2],
        wall_ms_min: wall[0],
        cpu_ms: cpu[repeats / 2],
        cpu_ms_min: cpu[0],
        page_faults: faults[repeats / 2],
        peak_resident_bytes: memory::peak(),
    })
}

/// Processor time of this process so far.
pub fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec.try_into().unwrap_or(0), time.tv_nsec.try_into().unwrap_or(0))
}

/// Minor page faults so far; 0 where the system does not tell.
fn page_faults() -> u64 {
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The second field, the name, may hold spaces; it ends with the last parenthesis.
    let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
    fields.split_whitespace().nth(7).and_then(|count| count.parse().ok()).unwrap_or(0)
}
