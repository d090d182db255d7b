//! The interface: on a message bus, and the same on a socket.

pub mod adapter;
pub mod bus_api;
pub mod call;
pub mod composition;
pub mod interfaces;
pub mod job;
pub mod library;
pub mod manager;
pub mod model;
pub mod outgoing;
pub mod peer;
pub mod plugin;
pub mod serve;
pub mod sets;
pub mod signals;
pub mod slots;
pub mod standard;
pub mod stream;
pub mod training;
pub mod value;

/// Bytes of one message, in either direction. Files cross as descriptors, so that what remains is small; a bus of the usual
/// configuration disconnects who sends more than twice as much.
pub const MESSAGE_BYTES_MAX: usize = 16 << 20;

pub use sets::{entries_of, set_of};
