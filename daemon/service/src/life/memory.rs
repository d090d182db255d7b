//! What the machine has.

/// Main memory: bytes in all and bytes that can be had; (0, 0) if the system does not say.
pub fn system() -> (u64, u64) {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let of = |key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key))?;
        line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib << 10)
    };
    (of("MemTotal:").unwrap_or(0), of("MemAvailable:").unwrap_or(0))
}

/// The processor's name.
pub fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    name.map_or_else(|| "processor".to_owned(), |(_, name)| name.trim().to_owned())
}
