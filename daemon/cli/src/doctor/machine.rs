//! What this machine lets a daemon and its clients do: groups, polkit, drivers, and the directives of a unit.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Finding, Verdict, finding};

/// The group that may open the machine's socket.
const GROUP: &str = "blocklora";

/// What lets this user open the machine's socket, who may not do so now.
pub fn join_the_group() -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let user = std::env::var("USER").unwrap_or_default();
    how_to_join(&read("/etc/group"), &read("/proc/self/status"), &user)
}

fn how_to_join(groups: &str, status: &str, user: &str) -> String {
    // name:password:gid:member,member
    let line =
        groups.lines().map(|line| line.split(':').collect::<Vec<_>>()).find(|parts| parts.first() == Some(&GROUP));
    let Some(&[_, _, gid, members]) = line.as_deref() else {
        return format!("the group {GROUP} does not exist: install the package again, it makes the group");
    };
    let own = status.lines().find_map(|line| line.strip_prefix("Groups:")).unwrap_or_default();
    if own.split_whitespace().any(|one| one == gid) {
        return format!(
            "you are in the group {GROUP}: see who may open the socket with `ls -l`, and its unit's SocketGroup="
        );
    }
    if members.split(',').any(|member| member == user && !user.is_empty()) {
        return format!("you are in the group {GROUP}, but were not when you logged in: log in again");
    }
    format!(
        "join the group: sudo usermod -aG {GROUP} {}, then log in again",
        if user.is_empty() { "NAME" } else { user }
    )
}

/// Whether polkit can say who may train and manage models on the machine's daemon.
pub fn polkit() -> Finding {
    let service = Path::new("/usr/share/dbus-1/system-services/org.freedesktop.PolicyKit1.service");
    let actions = Path::new("/usr/share/polkit-1/actions/org.blocklora.Daemon1.policy");
    if !service.exists() {
        let says = "polkit is not installed: only root may train or manage models on the machine's daemon";
        return finding("polkit", Verdict::Warning, says, "install polkit (Debian: polkitd)");
    }
    if !actions.exists() {
        let says = format!("{} is missing: polkit refuses what it does not know", actions.display());
        return finding("polkit", Verdict::Warning, says, "install the package again");
    }
    finding("polkit", Verdict::Ok, "knows the daemon's actions", "")
}

/// A device node, and the name of its class as /proc/devices has it.
#[derive(Debug, PartialEq)]
struct Node {
    path: PathBuf,
    class: String,
}

/// What stands between the machine's GPUs and the daemon of the unit `blocklora.service`, each with the directive or
/// the driver that is in the way; nothing where there is no GPU.
pub fn gpu(system: bool) -> Vec<Finding> {
    let nodes = nodes(&std::fs::read_to_string("/proc/devices").unwrap_or_default());
    let driver = Path::new("/proc/driver/nvidia/version").exists();
    let on_bus = is_nvidia_on_the_bus();
    let mut findings: Vec<Finding> = driver_finding(on_bus, driver, &nodes).into_iter().collect();
    if !nodes.is_empty()
        && let Some(unit) = unit(system)
    {
        findings.extend(denied(&nodes, &unit));
    }
    findings
}

/// Whether a display controller of NVIDIA is plugged in.
fn is_nvidia_on_the_bus() -> bool {
    let devices = std::fs::read_dir("/sys/bus/pci/devices").into_iter().flatten().flatten();
    let read = |path: PathBuf| std::fs::read_to_string(path).unwrap_or_default();
    devices
        .map(|device| device.path())
        .any(|device| read(device.join("vendor")).trim() == "0x10de" && read(device.join("class")).starts_with("0x03"))
}

fn driver_finding(on_bus: bool, driver: bool, nodes: &[Node]) -> Option<Finding> {
    match (on_bus, driver, nodes.is_empty()) {
        (true, false, _) => {
            let says = "there is an NVIDIA GPU, but its driver is not loaded";
            Some(finding("driver", Verdict::Warning, says, "install NVIDIA's driver, or `sudo modprobe nvidia`"))
        }
        (_, true, true) => {
            let says = "NVIDIA's driver is loaded, but /dev has no node of it";
            Some(finding("driver", Verdict::Warning, says, "start nvidia-persistenced, or run nvidia-smi once as root"))
        }
        (_, true, false) => Some(finding("driver", Verdict::Ok, "NVIDIA's driver is loaded", "")),
        _ => None,
    }
}

/// The nodes of NVIDIA's driver, and their classes by the text of /proc/devices.
fn nodes(devices: &str) -> Vec<Node> {
    use std::os::unix::fs::MetadataExt;
    let class_of = |major: u64| {
        let entries = devices
            .lines()
            .take_while(|line| !line.starts_with("Block"))
            .filter_map(|line| line.trim().split_once(' '));
        entries.filter(|(number, _)| number.parse() == Ok(major)).map(|(_, name)| name.trim().to_owned()).next()
    };
    let mut nodes = Vec::new();
    for entry in std::fs::read_dir("/dev").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Ok(metadata) = entry.metadata() else { continue };
        if !name.starts_with("nvidia") || metadata.is_dir() {
            continue;
        }
        // The major number of Linux: bits 8 to 19, and those above 32.
        let device = metadata.rdev();
        let major = (device >> 8 & 0xfff) | (device >> 32 & !0xfff);
        nodes.push(Node { path: entry.path(), class: class_of(major).unwrap_or_default() });
    }
    nodes.sort_by(|one, other| one.path.cmp(&other.path));
    nodes
}

/// The directives of the unit that decide about devices, if it runs.
fn unit(system: bool) -> Option<BTreeMap<String, Vec<String>>> {
    let scope = if system { "--system" } else { "--user" };
    let names = ["ActiveState", "PrivateDevices", "DevicePolicy", "DeviceAllow", "MemoryDenyWriteExecute"];
    let mut command = Command::new("systemctl");
    command.args([scope, "show", "blocklora.service"]).args(names.map(|name| format!("--property={name}")));
    let output = command.output().ok().filter(|output| output.status.success())?;
    let unit = directives(&String::from_utf8_lossy(&output.stdout));
    let active = unit.get("ActiveState").is_some_and(|state| state.iter().any(|state| state == "active"));
    active.then_some(unit)
}

/// `KEY=VALUE` lines; a directive that may be given often has several.
fn directives(text: &str) -> BTreeMap<String, Vec<String>> {
    let mut all: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (key, value) in text.lines().filter_map(|line| line.split_once('=')) {
        all.entry(key.to_owned()).or_default().push(value.to_owned());
    }
    all
}

/// Which of `nodes` the unit's directives deny, and by which.
fn denied(nodes: &[Node], unit: &BTreeMap<String, Vec<String>>) -> Vec<Finding> {
    let is = |key: &str, value: &str| unit.get(key).is_some_and(|values| values.iter().any(|v| v == value));
    let edit = |line: &str| format!("systemctl edit blocklora, add under [Service]: {line}; then restart it");
    if is("PrivateDevices", "yes") {
        let says = "the unit's PrivateDevices=yes hides every GPU";
        return vec![finding("unit", Verdict::Problem, says, edit("PrivateDevices=no"))];
    }
    let mut findings = Vec::new();
    if is("DevicePolicy", "closed") || is("DevicePolicy", "strict") {
        let allowed: Vec<&str> =
            unit.get("DeviceAllow").into_iter().flatten().filter_map(|v| v.split(' ').next()).collect();
        for node in nodes.iter().filter(|node| !allowed.iter().any(|pattern| covers(pattern, node))) {
            let path = node.path.display();
            let says = format!("the unit's DevicePolicy= and DeviceAllow= deny {path} (class {:?})", node.class);
            findings.push(finding("unit", Verdict::Problem, says, edit(&format!("DeviceAllow={path} rw"))));
        }
    }
    if is("MemoryDenyWriteExecute", "yes") {
        let says = "the unit's MemoryDenyWriteExecute=yes denies drivers to compile kernels as they run";
        let cure = format!("if the GPU is not ready for that reason: {}", edit("MemoryDenyWriteExecute=no"));
        findings.push(finding("unit", Verdict::Ok, says, cure));
    }
    findings
}

/// Whether what DeviceAllow= names, a path or `char-CLASS` with `*`, covers the node.
fn covers(pattern: &str, node: &Node) -> bool {
    match pattern.strip_prefix("char-") {
        Some(class) => match class.split_once('*') {
            Some((begin, end)) => {
                node.class.len() >= begin.len() + end.len()
                    && node.class.starts_with(begin)
                    && node.class.ends_with(end)
            }
            None => node.class == class,
        },
        None => Path::new(pattern) == node.path,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GROUPS: &str = "root:x:0:\nblocklora:x:987:ann,bob\nvideo:x:44:ann\n";

    #[test]
    fn a_user_is_told_what_is_missing() {
        let status = |groups: &str| format!("Name:\tx\nGroups:\t{groups} \n");
        assert!(how_to_join("root:x:0:\n", &status("0"), "ann").starts_with("the group blocklora does not exist"));
        assert!(how_to_join(GROUPS, &status("44 987"), "ann").starts_with("you are in the group blocklora: see"));
        assert!(how_to_join(GROUPS, &status("44"), "ann").ends_with("log in again"));
        assert!(how_to_join(GROUPS, &status("44"), "eve").contains("usermod -aG blocklora eve"));
        assert!(how_to_join(GROUPS, &status("44"), "").contains("usermod -aG blocklora NAME"));
    }

    #[test]
    fn a_denied_device_is_named_with_its_directive() {
        let node = |path: &str, class: &str| Node { path: path.into(), class: class.into() };
        let nodes = [node("/dev/nvidia0", "nvidia-frontend"), node("/dev/nvidia-uvm", "nvidia-uvm")];
        let says = |text: &str| -> Vec<String> {
            denied(&nodes, &directives(text))
                .into_iter()
                .filter(|f| f.verdict == Verdict::Problem)
                .map(|f| f.says)
                .collect()
        };
        assert_eq!(
            says("PrivateDevices=yes\nDevicePolicy=closed\n"),
            ["the unit's PrivateDevices=yes hides every GPU"]
        );
        let both = "PrivateDevices=no\nDevicePolicy=closed\nDeviceAllow=char-nvidia* rw\nDeviceAllow=char-drm rw\n";
        assert!(says(both).is_empty());
        // A class that the kernel did not have when the unit started is left out of what systemd shows.
        let one = says("DevicePolicy=closed\nDeviceAllow=char-nvidia-frontend rw\n");
        assert_eq!(one, ["the unit's DevicePolicy= and DeviceAllow= deny /dev/nvidia-uvm (class \"nvidia-uvm\")"]);
        assert_eq!(says("DevicePolicy=strict\nDeviceAllow=/dev/nvidia0 rw\n").len(), 1);
        assert!(says("DevicePolicy=auto\n").is_empty());
        let all = denied(&nodes, &directives("DevicePolicy=auto\nMemoryDenyWriteExecute=yes\n"));
        assert!(all.iter().any(|f| f.says.contains("MemoryDenyWriteExecute=yes") && f.cure.contains("systemctl edit")));
    }

    #[test]
    fn a_driver_that_is_not_loaded_is_named() {
        let says = |on_bus, driver| driver_finding(on_bus, driver, &[]).map(|f| f.says).unwrap_or_default();
        assert!(says(true, false).contains("driver is not loaded"));
        assert!(says(true, true).contains("/dev has no node"));
        assert_eq!(says(false, false), "");
    }
}
