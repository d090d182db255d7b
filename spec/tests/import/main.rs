//! Other tools' files become adapters with the same change, or are refused by name. tests/parity/check_imports.py asks
//! the other tools' own writers.
#![allow(clippy::unwrap_used)]

#[path = "../common/mod.rs"]
mod common;
mod foreign;
mod forms;
mod refusals;
mod words;
