//! What a run found out: for people and as JSON.

use std::fmt::Write;

use serde::{Deserialize, Serialize};

use crate::tests::Level;

/// How a test ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Status {
    /// As it should.
    Passed,
    /// The plugin broke what the test is about.
    Failed,
    /// The plugin took its process down.
    Crashed,
    /// The plugin did not come back in time.
    TimedOut,
    /// The plugin took more memory than its manifest declares.
    OutOfMemory,
    /// Not for this plugin: the message says why.
    Skipped,
}

impl Status {
    /// Whether the plugin may have it.
    pub fn is_fine(self) -> bool {
        matches!(self, Self::Passed | Self::Skipped)
    }

    fn word(self) -> &'static str {
        match self {
            Self::Passed => "passed",
            Self::Failed => "FAILED",
            Self::Crashed => "CRASHED",
            Self::TimedOut => "TIMED OUT",
            Self::OutOfMemory => "OUT OF MEMORY",
            Self::Skipped => "skipped",
        }
    }
}

/// One test's outcome.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// The test, such as "merge.order".
    pub test: String,
    /// The level that it belongs to.
    pub level: Level,
    /// How it ended.
    pub status: Status,
    /// What is wrong and what to do about it, one line; empty if it passed.
    pub message: String,
    /// Wall-clock time.
    pub seconds: f64,
}

/// A whole run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The library's file.
    pub file: String,
    /// `<kind>-<id>`, as far as the manifest says; else empty.
    pub plugin: String,
    /// The seed of all random numbers.
    pub seed: u64,
    /// Whether every test was run and is fine.
    pub passed: bool,
    /// The tests in the order in which they ran.
    pub tests: Vec<Outcome>,
}

impl Report {
    /// For people: a line for each test, and how to repeat what failed.
    pub fn to_text(&self) -> String {
        let mut text = format!("{}  {}\n", self.file, self.plugin);
        for Outcome { test, status, message, seconds, .. } in &self.tests {
            let space = if message.is_empty() { "" } else { "  " };
            let _ = writeln!(text, "  {:<13} {test:<22} {seconds:6.2} s{space}{message}", status.word());
        }
        let count = |fine: bool| self.tests.iter().filter(|t| t.status.is_fine() == fine).count();
        if self.passed {
            let _ = writeln!(text, "{} tests are fine; seed {}", count(true), self.seed);
        } else if count(false) == 0 {
            let _ = writeln!(text, "not all tests were run");
        } else {
            let _ = writeln!(text, "{} of {} tests failed; to repeat one:", count(false), self.tests.len());
            let failed = self.tests.iter().filter(|t| !t.status.is_fine());
            for test in failed {
                let (file, level, name, seed) = (&self.file, test.level.number(), &test.test, self.seed);
                let _ =
                    writeln!(text, "  blocklora plugin check {file} --level {level} --test {name} --reproduce {seed}");
            }
        }
        text
    }
}
