//! Which processor computes: the CPU, or a CUDA card in a binary built with the feature `cuda`.
//!
//! Nothing falls back in silence: a card that was asked for and is not there is an error, and every choice comes with
//! its reason, for the log, `status` and `doctor`.

use std::fmt;
use std::fs;
use std::path::Path;
use std::str::FromStr;

use candle_core::Device;

use crate::error::{Error, Result};

/// What the user asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Wanted {
    /// A card if this binary can use one and one is there, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The CUDA card with this number.
    Cuda(usize),
}

impl FromStr for Wanted {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        match (text, text.strip_prefix("cuda:").map(str::parse)) {
            ("auto", _) => Ok(Self::Auto),
            ("cpu", _) => Ok(Self::Cpu),
            ("cuda", _) => Ok(Self::Cuda(0)),
            (_, Some(Ok(card))) => Ok(Self::Cuda(card)),
            _ => Err(Error::option("device", text, "must be auto, cpu, cuda or cuda:NUMBER")),
        }
    }
}

/// A device and why it was chosen.
#[derive(Clone, Debug)]
pub struct Chosen {
    /// To load a model on.
    pub device: Device,
    /// Its name, as [`Wanted`] reads it.
    pub name: String,
    /// One sentence.
    pub reason: String,
}

impl fmt::Display for Chosen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.name, self.reason)
    }
}

/// Whether this binary can compute on a card at all.
pub const fn has_cuda() -> bool {
    cfg!(feature = "cuda")
}

/// The devices that this binary can use here, by name.
pub fn list() -> Vec<String> {
    let mut names = vec!["cpu".to_owned()];
    if has_cuda() && nvidia_driver().is_ok() {
        names.extend((0..).take_while(|&card| Device::new_cuda(card).is_ok()).map(|card| format!("cuda:{card}")));
    }
    names
}

/// Opens what `wanted` asks for. Only [`Wanted::Auto`] may end on the CPU without having asked for it, and says why.
pub fn choose(wanted: Wanted) -> Result<Chosen> {
    let cpu = |reason: String| Chosen { device: Device::Cpu, name: "cpu".into(), reason };
    let card = |number: usize| -> Result<Chosen> {
        let refuse = |reason: String| Error::option("device", format!("cuda:{number}"), reason);
        if !has_cuda() {
            return Err(refuse("this program computes on the CPU only; use the one built with CUDA".into()));
        }
        let driver = nvidia_driver().map_err(refuse)?;
        // A stream of its own: the default would be another one on each thread, and a merge's threads write weights that
        // another thread then reads.
        let device =
            Device::new_cuda_with_stream(number).map_err(|e| refuse(format!("the card cannot be opened: {e}")))?;
        Ok(Chosen { device, name: format!("cuda:{number}"), reason: driver })
    };
    match wanted {
        Wanted::Cpu => Ok(cpu("it was asked for".into())),
        Wanted::Cuda(number) => card(number),
        Wanted::Auto if !has_cuda() => Ok(cpu("this program computes on the CPU only".into())),
        Wanted::Auto => Ok(card(0).unwrap_or_else(|error| cpu(format!("no card can be used: {error}")))),
    }
}

/// Whether the system has an NVIDIA driver and a card, without loading anything: the first line of the driver's version,
/// or what is missing. A program that links CUDA does not even start without them, so that whoever starts it asks here
/// first.
pub fn nvidia_driver() -> std::result::Result<String, String> {
    driver_in(Path::new("/"))
}

fn driver_in(root: &Path) -> std::result::Result<String, String> {
    let version = root.join("proc/driver/nvidia/version");
    let version = fs::read_to_string(&version).map_err(|_| "no NVIDIA driver is loaded".to_owned())?;
    let has_card = fs::read_dir(root.join("dev")).is_ok_and(|mut entries| {
        entries.any(|entry| {
            let name = entry.map(|entry| entry.file_name()).unwrap_or_default();
            let number = name.to_str().and_then(|name| name.strip_prefix("nvidia"));
            number.is_some_and(|number| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()))
        })
    });
    if !has_card {
        return Err("the NVIDIA driver is loaded, but there is no card in /dev".into());
    }
    Ok(version.lines().next().unwrap_or_default().trim().to_owned())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn names_are_read() {
        assert_eq!("auto".parse::<Wanted>().unwrap(), Wanted::Auto);
        assert_eq!("cpu".parse::<Wanted>().unwrap(), Wanted::Cpu);
        assert_eq!("cuda".parse::<Wanted>().unwrap(), Wanted::Cuda(0));
        assert_eq!("cuda:3".parse::<Wanted>().unwrap(), Wanted::Cuda(3));
        for wrong in ["", "gpu", "cuda:", "cuda:x", "cuda:-1"] {
            assert!(wrong.parse::<Wanted>().is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_driver_needs_its_version_and_a_card() {
        let root = tempfile::tempdir().unwrap();
        assert!(driver_in(root.path()).unwrap_err().contains("no NVIDIA driver"));
        fs::create_dir_all(root.path().join("proc/driver/nvidia")).unwrap();
        fs::write(root.path().join("proc/driver/nvidia/version"), "NVRM version: 1.2\nGCC\n").unwrap();
        fs::create_dir(root.path().join("dev")).unwrap();
        fs::write(root.path().join("dev/nvidiactl"), "").unwrap();
        assert!(driver_in(root.path()).unwrap_err().contains("no card"));
        fs::write(root.path().join("dev/nvidia0"), "").unwrap();
        assert_eq!(driver_in(root.path()).unwrap(), "NVRM version: 1.2");
    }

    #[test]
    fn the_cpu_is_there_and_a_missing_card_is_an_error() {
        assert!(choose(Wanted::Cpu).unwrap().device.is_cpu());
        assert_eq!(list()[0], "cpu");
        if list().len() == 1 {
            assert!(choose(Wanted::Cuda(0)).is_err());
            let chosen = choose(Wanted::Auto).unwrap();
            assert!(chosen.device.is_cpu() && !chosen.reason.is_empty());
        }
    }
}
