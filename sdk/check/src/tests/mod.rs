//! The tests.

mod config;
mod library;
mod memory;
mod merge;
mod sample;
mod train;

use blocklora_sdk::manifest::PluginKind;
use serde::{Deserialize, Serialize};

pub use memory::status_mib;

use crate::subject::{Subject, Verdict};

/// How much to test; each level includes the lower ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// It loads, and says the same in its manifest and in its library.
    Loads = 0,
    /// Its settings.
    Settings = 1,
    /// Its behaviour and its numbers.
    Behaviour = 2,
    /// Everything: the same on many random problems, and with settings made at random.
    Everything = 3,
}

impl Level {
    /// The level of this number.
    pub fn from_number(number: u32) -> Option<Self> {
        [Self::Loads, Self::Settings, Self::Behaviour, Self::Everything].into_iter().find(|l| l.number() == number)
    }

    /// 0 to 3.
    pub fn number(self) -> u32 {
        self as u32
    }
}

/// What a verdict begins with that means: not for this plugin.
pub const SKIP: &str = "skip: ";

/// Ends a test that is not for this plugin.
fn skip(why: &str) -> Verdict {
    Err(format!("{SKIP}{why}"))
}

/// One test.
pub struct Test {
    /// Its name.
    pub name: &'static str,
    /// Its level.
    pub level: Level,
    /// The kind of plugin that it is for, if not for all.
    pub kind: Option<PluginKind>,
    /// What it checks.
    pub what: &'static str,
    /// Runs it.
    pub run: fn(&Subject) -> Verdict,
}

const fn any(name: &'static str, level: Level, run: fn(&Subject) -> Verdict, what: &'static str) -> Test {
    Test { name, level, kind: None, what, run }
}

const fn of(
    kind: PluginKind,
    name: &'static str,
    level: Level,
    run: fn(&Subject) -> Verdict,
    what: &'static str,
) -> Test {
    Test { name, level, kind: Some(kind), what, run }
}

/// All tests, in the order in which they run.
pub fn all() -> impl Iterator<Item = &'static Test> {
    use Level::{Behaviour, Everything, Loads, Settings};
    use PluginKind::{Merge, Sample, Train};
    static TESTS: &[Test] = &[
        any("library.loads", Loads, library::loads, "magic block, ABI version, layout; the kind that it claims"),
        any(
            "manifest.agrees",
            Loads,
            library::manifest_agrees,
            "the manifest beside it is the one that it was built with",
        ),
        any(
            "config.schema",
            Settings,
            config::schema,
            "the JSON Schema is valid, closed, with descriptions and defaults",
        ),
        any("config.round-trip", Settings, config::round_trip, "defaults fit the schema and come back unchanged"),
        any("config.refuses", Settings, config::refuses, "unknown keys and wrong types are errors that name the key"),
        any("config.fuzz", Everything, config::fuzz, "no settings whatever make it crash"),
        of(Merge, "merge.plan", Behaviour, merge::plan, "plans that the engine accepts, for 1 to 15 adapters"),
        of(Merge, "merge.tiles", Behaviour, merge::tiles, "dense layers do not depend on how rows are cut into tiles"),
        of(Merge, "merge.identity", Behaviour, merge::identity, "one adapter at weight 1 gives its own delta"),
        of(Merge, "merge.order", Behaviour, merge::order, "the order of the adapters makes no difference"),
        of(Merge, "merge.scale", Behaviour, merge::scale, "all weights times c make the change times c"),
        of(Merge, "merge.deterministic", Behaviour, merge::deterministic, "same input, same bits"),
        of(Merge, "merge.cancel", Behaviour, merge::cancel, "a cancelled merge ends"),
        of(Merge, "merge.random", Everything, merge::random, "all of this on twenty random problems"),
        of(Sample, "sample.contract", Behaviour, sample::contract, "steps, cancellation and errors as promised"),
        of(Sample, "sample.progress", Behaviour, sample::progress, "every step is reported once, in order"),
        of(Sample, "sample.lands", Behaviour, sample::lands, "certain data are found, in 1 to 30 steps"),
        of(
            Sample,
            "sample.converges",
            Behaviour,
            sample::converges,
            "more steps come closer to the exact distribution",
        ),
        of(Sample, "sample.deterministic", Behaviour, sample::deterministic, "same input, same bits"),
        of(Sample, "sample.spacings", Everything, sample::spacings, "every timestep spacing and odd step counts work"),
        of(Train, "train.plan", Behaviour, train::plan, "what it says about its adapter is what it trains"),
        of(
            Train,
            "train.learns",
            Behaviour,
            train::learns,
            "the loss of a quadratic problem falls towards its optimum",
        ),
        of(Train, "train.progress", Behaviour, train::progress, "steps are reported in order, up to the last"),
        of(Train, "train.cancel", Behaviour, train::cancel, "a cancelled training ends within the step"),
        of(Train, "train.resume", Behaviour, train::resume, "an interrupted training ends with the same bits"),
        of(Train, "train.errors", Behaviour, train::errors, "a loss that is not finite and errors of the host end it"),
        any("memory.declared", Behaviour, memory::declared, "work of real size stays within memory_mib"),
    ];
    TESTS.iter()
}

/// Name, level and purpose of every test.
pub fn list() -> impl Iterator<Item = (&'static str, Level, &'static str)> {
    all().map(|test| (test.name, test.level, test.what))
}
