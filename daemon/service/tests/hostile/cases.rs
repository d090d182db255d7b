//! Each way of breaking the contract, and how it ends.

use blocklora_sdk::manifest::PluginKind;

/// What each place of a hostile plugin can do, as `<way>-<place>`.
pub const WAYS: &[&str] = &["panic", "segfault", "abort", "exit", "hang", "allocate"];

/// How a use of a plugin ends.
#[derive(Clone, Debug)]
pub enum Ends {
    /// As if nothing were wrong: only the conformance tests can tell.
    Well,
    /// With an error that says this, and this as the cure; the plugin may be used again.
    Refused(&'static str, &'static str),
    /// Cancelled, once its process has been killed.
    Killed,
    /// With an error that says one of these; the plugin is quarantined.
    Quarantined(&'static [&'static str]),
}

/// One way.
#[derive(Clone, Debug)]
pub struct Case {
    pub kind: PluginKind,
    pub mode: String,
    pub ends: Ends,
}

impl Case {
    /// Whether it may happen in the process that the model lives in.
    pub fn spares_its_process(&self) -> bool {
        !matches!(self.ends, Ends::Quarantined(_) | Ends::Killed)
    }
}

const REPORT: &str = "report it to the method's author, and use another one meanwhile";

/// How `way` ends at `place`, which says so in a panic.
fn ends(way: &str, place: &str) -> Ends {
    // What happens when a library is loaded or asked for its settings happens in the scan.
    match (way, matches!(place, "load" | "defaults")) {
        ("panic", false) => Ends::Refused("today", REPORT),
        ("panic", true) if place == "defaults" => {
            Ends::Refused("no defaults today", "report it to the plugin's author")
        }
        // An initialiser has nobody who could be told of a panic.
        ("panic" | "abort", true) => Ends::Quarantined(&["crashed (aborted) when it was loaded"]),
        ("segfault", true) => Ends::Quarantined(&["crashed (segmentation fault) when it was loaded"]),
        ("exit", true) => Ends::Quarantined(&["ended its process (exit status 0) when it was loaded"]),
        ("hang", true) => Ends::Quarantined(&["did not load within 3 seconds"]),
        ("allocate", true) => {
            Ends::Quarantined(&["crashed (aborted) when it was loaded", "did not load within 3 seconds"])
        }
        ("segfault", false) => Ends::Quarantined(&["crashed (segmentation fault) in its worker process"]),
        ("abort", false) => Ends::Quarantined(&["crashed (aborted) in its worker process"]),
        ("exit", false) => Ends::Quarantined(&["ended its process (exit status 0) in its worker process"]),
        ("hang", false) => Ends::Quarantined(&["did not answer for 3 seconds; its worker process was killed"]),
        // The kernel's limit may come before the host's look.
        ("allocate", false) => {
            Ends::Quarantined(&["MiB of memory where its manifest declares 64", "crashed (aborted) in its worker"])
        }
        other => panic!("{other:?} is new: say how it ends"),
    }
}

/// All of them.
pub fn cases() -> Vec<Case> {
    use PluginKind::{Merge, Sample, Train};
    let others: &[(PluginKind, &str, Ends)] = &[
        (Merge, "honest", Ends::Well),
        (Merge, "dense", Ends::Well),
        (Merge, "twice", Ends::Well),
        (Merge, "plans-for-long", Ends::Well),
        (Merge, "tiles", Ends::Well),
        (Merge, "panic-check", Ends::Refused("no settings today", "report it to the plugin's author")),
        (Merge, "panic-drop", Ends::Refused("no farewell today", "report it to the plugin's author")),
        (Merge, "nan", Ends::Refused("is NaN; it must be finite", REPORT)),
        (Merge, "nan-fill", Ends::Refused("the change that it writes for row 0 of", REPORT)),
        (Merge, "wrong-shape", Ends::Refused("planned", REPORT)),
        (Merge, "rows-outside", Ends::Refused("coefficients for the", REPORT)),
        (Merge, "adapter-outside", Ends::Refused("adapter 99", REPORT)),
        (Sample, "honest", Ends::Well),
        (Sample, "biased", Ends::Well),
        (Sample, "nan", Ends::Refused("not finite", "use other settings, or another method")),
        (Sample, "wrong-shape", Ends::Refused("latents", REPORT)),
        (Sample, "wrong-timestep", Ends::Refused("timestep -1", REPORT)),
        (Sample, "silent", Ends::Refused("it told of 0 steps instead of 3", REPORT)),
        (Sample, "ignores-steps", Ends::Refused("it told of 20 steps instead of 3", REPORT)),
        // Cancelled is cancelled, also where the plugin goes on: there is nothing to mend.
        (Sample, "ignores-cancel", Ends::Refused("cancelled", "")),
        (Sample, "never-ends", Ends::Killed),
        (Sample, "cancelled", Ends::Refused("it says that the job is cancelled, which nobody has done", REPORT)),
        (Sample, "short-noise", Ends::Refused("numbers for", REPORT)),
        (Train, "honest", Ends::Well),
        (Train, "plans-more", Ends::Refused("it told of 1 steps in all, but planned 2", REPORT)),
        (Train, "wrong-shape", Ends::Refused("B has", REPORT)),
        (Train, "rows-outside", Ends::Refused("rows", REPORT)),
        (Train, "nan", Ends::Refused("a trained number is not finite", "use other settings, or another method")),
    ];
    let mut cases = Vec::new();
    for kind in [Merge, Sample, Train] {
        let outside = Ends::Refused("artefact \"../outside\": its name must be", REPORT);
        cases.push(Case { kind, mode: "artefacts".into(), ends: Ends::Well });
        cases.push(Case { kind, mode: "artefact-outside".into(), ends: outside });
    }
    cases.extend(others.iter().map(|(kind, mode, ends)| Case {
        kind: *kind,
        mode: (*mode).into(),
        ends: ends.clone(),
    }));
    let places: &[(PluginKind, &[&str])] = &[
        (Merge, &["load", "defaults", "plan", "fill"]),
        (Sample, &["load", "sample"]),
        (Train, &["load", "plan", "train"]),
    ];
    for (kind, places) in places {
        for place in *places {
            let case = |way: &&str| Case { kind: *kind, mode: format!("{way}-{place}"), ends: ends(way, place) };
            cases.extend(WAYS.iter().map(case));
        }
    }
    cases
}
