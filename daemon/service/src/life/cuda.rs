//! The program built with CUDA in the place of this one.
//!
//! What links CUDA does not even start without a driver, so there are two programs: `blocklorad`, which everybody starts,
//! and `blocklorad-cuda` beside it. Where a card is wanted and both are there, the first becomes the second: the same
//! process with the same arguments, environment and descriptors, so that units, sockets and pipes notice nothing.

use std::fmt::Display;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use blocklora_engine::device::{self, Chosen, Wanted};

use crate::error::{Error, Result};

/// Opens the configured device, in the program that can: does not return where the CUDA program takes over.
///
/// A device that is asked for and cannot be had is an error, because nothing computes elsewhere in silence; of `auto`
/// the reason says what stood in the way of a card.
pub fn choose(configured: &str) -> Result<Chosen> {
    let wanted: Wanted = configured.parse().map_err(option)?;
    if device::has_cuda() || wanted == Wanted::Cpu {
        return device::choose(wanted).map_err(option);
    }
    let why = match successor(device::nvidia_driver(), &beside()) {
        Ok((driver, program)) => {
            tracing::info!("{driver}: {} takes over", program.display());
            let error = Command::new(&program).args(std::env::args_os().skip(1)).exec();
            format!("{}: {error}", program.display())
        }
        Err(why) => why,
    };
    match wanted {
        Wanted::Auto => Ok(Chosen { reason: why, ..device::choose(Wanted::Cpu).map_err(option)? }),
        _ => Err(option(format!("{configured} cannot be used: {why}"))),
    }
}

fn option(error: impl Display) -> Error {
    Error::option(error.to_string()).context("models.device")
}

/// Where the CUDA program is if it is installed.
fn beside() -> PathBuf {
    // Of a program that has been replaced since it started, Linux says that it is deleted.
    let executable = std::env::current_exe().unwrap_or_default();
    executable.with_file_name("blocklorad-cuda")
}

/// The driver's version and the program, if both are there and fit; else what stands in the way and what to do.
fn successor(driver: Result<String, String>, program: &Path) -> Result<(String, PathBuf), String> {
    let driver = driver?;
    let name = program.display();
    if !program.is_file() {
        return Err(format!("there is a card, but this program computes on the CPU only: install {name}"));
    }
    // A library that is missing shows here, not after this process is gone.
    let said = Command::new(program).arg("--version").stdin(Stdio::null()).output();
    let said = said.map_err(|error| format!("{name} does not start: {error}"))?;
    if !said.status.success() {
        let reason = String::from_utf8_lossy(&said.stderr);
        let reason = reason.trim().lines().last().map_or_else(|| said.status.to_string(), str::to_owned);
        return Err(format!("{name} does not start: {reason}; are CUDA's libraries installed?"));
    }
    let version = String::from_utf8_lossy(&said.stdout);
    let version = version.split_whitespace().last().unwrap_or_default();
    if version != env!("CARGO_PKG_VERSION") {
        let own = env!("CARGO_PKG_VERSION");
        return Err(format!("{name} is version {version:?}, this program {own}: install the same of both"));
    }
    Ok((driver, program.to_path_buf()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const DRIVER: Result<String, String> = Ok(String::new());

    fn program(folder: &Path, script: &str) -> PathBuf {
        let path = folder.join("blocklorad-cuda");
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    #[test]
    fn the_cuda_program_takes_over_where_it_can_and_says_why_not() {
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("blocklorad-cuda");
        let why = successor(Err("no NVIDIA driver is loaded".into()), &missing).unwrap_err();
        assert_eq!(why, "no NVIDIA driver is loaded");
        let why = successor(DRIVER, &missing).unwrap_err();
        assert!(why.contains("install") && why.contains("blocklorad-cuda"), "{why}");
        // What the loader does where CUDA's libraries are missing.
        let broken = program(dir.path(), "echo 'libcublas.so.13: cannot open shared object file' >&2; exit 127");
        let why = successor(DRIVER, &broken).unwrap_err();
        assert!(why.contains("libcublas.so.13: cannot open") && why.contains("installed?"), "{why}");
        let other = program(dir.path(), "echo blocklorad 99.1.0");
        let why = successor(DRIVER, &other).unwrap_err();
        assert!(why.contains("99.1.0") && why.contains(env!("CARGO_PKG_VERSION")), "{why}");
        let right = program(dir.path(), concat!("echo blocklorad ", env!("CARGO_PKG_VERSION")));
        assert_eq!(successor(DRIVER, &right).unwrap().1, right);
    }

    #[test]
    fn nothing_computes_elsewhere_in_silence() {
        assert_eq!(choose("cpu").unwrap().reason, "it was asked for");
        assert!(choose("gpu").unwrap_err().message.starts_with("models.device: "));
        if !device::has_cuda() && device::nvidia_driver().is_err() {
            assert_eq!(choose("auto").unwrap().reason, device::nvidia_driver().unwrap_err());
            let message = choose("cuda:77").unwrap_err().message;
            assert!(message.contains("cuda:77") && message.contains("driver"), "{message}");
        }
    }
}
