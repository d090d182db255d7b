//! The first look at a library, in a helper process: whatever it does there, this process goes on.

use std::fs::File;
use std::io::{self, Seek};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use blocklora_sdk::abi::Library;
use rustix::process::{Signal, set_parent_process_death_signal};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::discover::{self, Found};
use super::error::{PluginError, Result};
use super::helper::{self, End};
use super::records::{Records, Scanned, digest_of, open_file};
use crate::memfd;

/// The hidden command of the daemon's program.
pub const COMMAND: &str = "__plugin-scan";

/// How long a scan may take, if nothing else is said.
pub const TIME_LIMIT: Duration = Duration::from_secs(10);
/// Private memory of a scan.
const DATA_BYTES: u64 = 2 << 30;

/// What the helper answers on stdout.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Answer {
    Scanned(Scanned),
    Refused(String),
}

/// The helper: scans the plugin of the manifest at `path`, prints the answer and returns the exit code.
pub fn serve(path: &Path) -> u8 {
    helper::limit_self(DATA_BYTES);
    // The thread that waits for the scan is the one that started it.
    let _ = set_parent_process_death_signal(Some(Signal::KILL));
    let answer = match discover::read(path).and_then(|found| scan(&found)) {
        Ok(scanned) => Answer::Scanned(scanned),
        Err(reason) => Answer::Refused(reason),
    };
    match serde_json::to_string(&answer) {
        Ok(text) => {
            println!("{text}");
            0
        }
        Err(_) => 1,
    }
}

fn scan(found: &Found) -> Result<Scanned, String> {
    let (library, _) = open(&found.library)?;
    check(&library, found)?;
    let failed = |what: &str| {
        let what = what.to_owned();
        move |e: blocklora_sdk::Error| format!("{what} fails: {e}; report it to the plugin's author")
    };
    let schema = library.schema().map_err(failed("its settings schema"))?;
    let defaults = library.resolve(&Value::Null).map_err(failed("reading its default settings"))?;
    Ok(Scanned {
        name: library.name().to_owned(),
        version: library.version().to_owned(),
        manifest: library.manifest().to_owned(),
        schema,
        defaults,
    })
}

/// Opens a library as a copy in memory, so that what was digested is what is loaded and stays it, whatever is written
/// over the file meanwhile. Returns it with the digest of its file.
pub fn open(path: &Path) -> Result<(Library, String), String> {
    let missing = |e: io::Error| format!("its library {}: {e}: install the plugin again", path.display());
    let mut file = open_file(path).map_err(missing)?;
    // Where there is no room for a copy, the file itself.
    let mut opened = match memfd::sealed_with("blocklora-plugin-library", |out| io::copy(&mut file, out).map(drop)) {
        Ok(copy) => File::from(copy),
        Err(_) => file,
    };
    opened.rewind().map_err(missing)?;
    let digest = digest_of(&mut opened).map_err(missing)?;
    let by_descriptor = PathBuf::from(format!("/proc/self/fd/{}", opened.as_raw_fd()));
    let library = Library::open(&by_descriptor).map_err(|e| e.0.replace(&*by_descriptor.to_string_lossy(), "it"))?;
    // The loader knows the library by this name: the number must never mean another file.
    std::mem::forget(opened);
    Ok((library, digest))
}

/// Checks that the library is the one that its manifest describes.
pub fn check(library: &Library, found: &Found) -> Result<(), String> {
    let inside = discover::parse(library.manifest())
        .map_err(|reason| format!("the manifest inside its library is wrong ({reason}): build it again"))?;
    if inside != found.manifest {
        return Err(format!(
            "its manifest differs from the one inside {}: install both files of one build",
            found.manifest.library
        ));
    }
    if library.version() != found.manifest.version || library.name() != found.manifest.full_name() {
        return Err(format!(
            "its library is {} {}, its manifest says {} {}: let the manifest follow Cargo.toml and export_plugin!",
            library.name(),
            library.version(),
            found.manifest.full_name(),
            found.manifest.version
        ));
    }
    let (major, minor) = library.abi();
    if found.manifest.abi() != Some((major, minor)) {
        return Err(format!(
            "its library was built for ABI {major}.{minor}, its manifest says abi = {:?}: write {major}.{minor} there and \
             build it again",
            found.manifest.abi
        ));
    }
    if !library.has(found.manifest.kind) {
        return Err(format!("it has no functions of the kind {}: build it again", found.manifest.kind));
    }
    Ok(())
}

/// Scans the plugin in a helper process and records the result; a crash or a hang quarantines it.
pub fn scan_in_helper(records: &Records, digest: &str, found: &Found, limit: Duration) -> Result<Scanned> {
    let program = helper::program()?;
    let end = helper::run(&program, &[COMMAND.as_ref(), found.path.as_os_str()], limit)?;
    let reason = match end {
        End::Exited(status, stdout) if status.success() => match serde_json::from_slice(last_line(&stdout)) {
            Ok(Answer::Scanned(scanned)) => {
                records.update(digest, |record| record.scanned = Some(scanned.clone()));
                return Ok(scanned);
            }
            Ok(Answer::Refused(reason)) => {
                return Err(PluginError::Incompatible { path: found.path.clone(), reason });
            }
            Err(_) if stdout.is_empty() => format!("{} when it was loaded", helper::death(status)),
            Err(_) => "wrote to the helper's output when it was loaded".into(),
        },
        End::Exited(status, ..) if helper::was_ended(status) => {
            let name = found.manifest.full_name();
            let reason = format!("{} when it was loaded: try again", helper::death(status));
            return Err(PluginError::Crashed { name, reason });
        }
        End::Exited(status, ..) => format!("{} when it was loaded", helper::death(status)),
        End::TimedOut => format!("did not load within {} seconds", limit.as_secs()),
    };
    Err(quarantine(records, digest, &found.manifest.full_name(), &reason))
}

/// What the library itself may have written stands before the answer.
fn last_line(stdout: &[u8]) -> &[u8] {
    stdout.trim_ascii_end().rsplit(|&byte| byte == b'\n').next().unwrap_or_default()
}

/// Records that the library misbehaved; it is not loaded again.
pub fn quarantine(records: &Records, digest: &str, name: &str, reason: &str) -> PluginError {
    records.update(digest, |record| {
        record.crashes += 1;
        record.quarantine = Some(reason.to_owned());
    });
    PluginError::Quarantined { name: name.to_owned(), reason: reason.to_owned() }
}
