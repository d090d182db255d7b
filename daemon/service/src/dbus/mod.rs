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
pub mod peer;
pub mod plugin;
pub mod serve;
pub mod sets;
pub mod signals;
pub mod slots;
pub mod standard;
pub mod training;
pub mod value;

pub use sets::{entries_of, set_of};
