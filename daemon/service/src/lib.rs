//! The BlockLoRA daemon: one process that owns the model, and whose objects clients call over D-Bus, on a message bus or
//! peer to peer on a socket.
//!
//! A control plane that never blocks (`dbus`, `catalogue`, `life`) and one worker thread that owns the device
//! (`worker`), with one queue (`jobs`) between them.

pub mod authority;
pub mod catalogue;
pub mod config;
pub mod cut;
pub mod daemon;
pub mod dbus;
pub mod error;
pub mod jobs;
pub mod life;
pub mod memfd;
pub mod methods;
pub mod objects;
pub mod plugins;
pub mod tar;
pub mod worker;
