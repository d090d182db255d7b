//! The process of one test.

use std::ffi::OsString;
use std::path::Path;

use rustix::process::{Resource, Rlimit, Signal, set_parent_process_death_signal, setrlimit};

use crate::report::Status;
use crate::subject::Subject;
use crate::tests::{all, status_mib};

/// What a process needs besides what its plugin declares: the test's own data, and stacks of threads.
const OWN_BYTES: u64 = 512 << 20;

/// Runs one test: `arguments` are what [`check`](crate::check) put behind the fixed ones (the test's name, the seed, the
/// file for the result, the library). The result goes into that file, whatever the plugin prints. Returns the exit code.
pub fn run_one(arguments: &[OsString]) -> u8 {
    let [name, seed, result, file] = arguments else {
        eprintln!("usage: TEST SEED RESULT FILE");
        return 2;
    };
    // A test that hangs must not outlive whoever started it. The kernel keeps to that thread, which waits for this one.
    let _ = set_parent_process_death_signal(Some(Signal::KILL));
    let name = name.to_string_lossy();
    let Some(test) = all().find(|test| test.name == name) else {
        eprintln!("there is no test {name}");
        return 2;
    };
    let seed = seed.to_string_lossy().parse().unwrap_or_default();
    let verdict = match Subject::open(Path::new(file), seed) {
        Ok(subject) => {
            limit_memory(&subject);
            match (test.run)(&subject) {
                Ok(()) => (Status::Passed, String::new()),
                Err(message) => match message.strip_prefix(crate::tests::SKIP) {
                    Some(why) => (Status::Skipped, why.to_owned()),
                    None => (Status::Failed, message),
                },
            }
        }
        Err(message) => (Status::Failed, message),
    };
    let written = serde_json::to_string(&verdict).map(|text| std::fs::write(result, text));
    match written {
        Ok(Ok(())) => 0,
        _ => 3,
    }
}

/// From here on allocations beyond the declared memory fail, which ends the process with a message.
fn limit_memory(subject: &Subject) {
    // An allocator may have reserved a lot before anything was asked for.
    let reserved = status_mib("VmData:").unwrap_or(0);
    let bytes = ((reserved + subject.manifest.memory_mib) << 20) + OWN_BYTES;
    // Without a limit the time limit is what ends a process that takes too much.
    let _ = setrlimit(Resource::Data, Rlimit { current: Some(bytes), maximum: Some(bytes) });
}
