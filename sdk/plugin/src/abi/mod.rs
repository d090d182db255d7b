//! The ABI, version 1.1: how a plugin's library and its host see each other. Authors need none of it, hosts only
//! [`Library`].
//!
//! # Rules
//! * **Version.** [`ABI_VERSION`](crate::ABI_VERSION) has its own count. Minor: functions are appended to tables, behind
//!   `last_prefix_field`, and found missing in older plugins. Major: anything else. `layout.golden` pins version 1.
//! * **Order.** The magic block first (plain bytes, from a C function), then abi_stable's check of the layout of every
//!   type that crosses (all that the plugin knows must be in what the host has), then use.
//! * **Ownership.** `RSlice`, `RStr` and `Raw*` with a lifetime are lent for the call. `RVec`, `RString` and `Owned*`
//!   are given to whoever receives them, and carry the allocator that made them. Instances are the host's from `create`
//!   to `destroy`.
//! * **Threads.** \[any\] any thread, several at once. \[job\] the thread on which the host's call into the plugin runs;
//!   checked by the host at run time.
//! * **Errors.** A [`Code`](crate::Code) and a line. A panic on either side becomes one; nothing unwinds across.
//! * **Shapes.** Row-major `f32`; every length is checked on the host's side before use, and what is broken is an error
//!   of the code `Contract`.
#![allow(unsafe_code, missing_docs, clippy::too_many_arguments)]

mod convert;
mod elf;
mod guard;
mod host;
mod instance;
mod job;
#[cfg(test)]
mod layout;
mod magic;
mod merge;
mod root;
mod sample;
mod train;
mod train_host;
pub(crate) mod types;

pub use host::{Library, Refusal};
pub use magic::{MAGIC_SYMBOL, Magic};

/// For [`export_plugin!`](crate::export_plugin) only.
#[doc(hidden)]
pub mod export {
    pub use super::merge::{MergeTableRef, Plugin as MergePlugin};
    pub use super::root::{Exported, header};
    pub use super::sample::{Plugin as SamplePlugin, SampleTableRef};
    pub use super::train::{Plugin as TrainPlugin, TrainTableRef};
    pub use abi_stable::library::LibHeader;
    pub use abi_stable::std_types::ROption;
}
