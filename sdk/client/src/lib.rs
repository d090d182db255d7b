//! A typed, asynchronous client of the BlockLoRA daemon.
//!
//! The daemon, `blocklorad`, owns an image model and draws, merges and trains for its clients. This crate talks to it
//! over D-Bus: on the session bus, on the system bus, or without a bus on the daemon's own Unix socket. All three are
//! the same to the caller.
//!
//! ```no_run
//! use blocklora_client::{Client, Entry, Generate, Place};
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let client = Client::connect(Place::SessionBus).await?;
//! let milo = client.register_adapter("milo.safetensors".as_ref()).await?;
//! let job = client
//!     .generate(&Generate { adapters: vec![Entry::new(&milo)], seed: Some(7), ..Generate::new("<milo> on the beach") })
//!     .await?;
//! let done = job.wait().await?;
//! for file in job.take_results(false).await?.iter().filter(|file| file.media_type == "image/png") {
//!     std::fs::write(format!("milo-{}.png", done.seeds[file.index as usize]), &file.bytes)?;
//! }
//! # Ok(())
//! # }
//! ```
//!
//! # How it works
//! - **A method that starts work returns a [`Job`] at once.** [`Job::wait`] answers when it ends, [`Job::progress`] says
//!   how far it is, [`Job::previews`] shows a drawing in progress, [`Job::cancel`] ends it.
//! - **Files travel as file descriptors.** Adapters and training pictures are opened by the caller: the daemon never
//!   looks into anybody's folders. Pictures come back in sealed memory files, which are checked and copied.
//! - **Errors have types.** [`Error::kind`] tells the daemon's named errors apart; the message is one line for people.
//! - **When the daemon goes, pending calls fail at once** with [`Error::Disconnected`]. The client itself connects again
//!   with the next call; [`Client::reconnect`] waits for that.
//! - What has no typed wrapper is in [`proxies`], method by method.
//!
//! Following a job:
//!
//! ```no_run
//! use futures_util::StreamExt;
//! # async fn example(job: blocklora_client::Job<blocklora_client::Generated>) -> blocklora_client::Result<()> {
//! let mut progress = job.progress().await?;
//! while let Some(state) = progress.next().await {
//!     println!("{}: step {} of {}", state.stage, state.step.0, state.step.1);
//! }
//! job.wait().await?;
//! # Ok(())
//! # }
//! ```

mod adapter;
mod client;
mod composition;
mod error;
mod job;
pub mod memfd;
mod model;
mod place;
mod plugin;
mod previews;
mod properties;
pub mod proxies;
mod requests;
mod results;
pub mod value;

pub use adapter::{Adapter, AdapterState};
pub use client::{BUS_NAME, Client, PATH};
pub use composition::Composition;
pub use error::{Error, ErrorKind, PREFIX, Result};
pub use job::{CancelMode, Job, JobState, Progress};
pub use model::{Model, ModelState};
pub use place::Place;
pub use plugin::{Plugin, PluginState};
pub use previews::{Preview, Previews};
pub use requests::{Entry, Generate, JobOptions, Load, Merge, Partition, Train};
pub use results::{
    AdapterUse, Baked, Device, Generated, JobEntry, LibraryEntry, Loaded, Merged, ResultFile, Slot, Status, Trained,
};
pub use value::Options;
/// An object path, such as those of lists and results.
pub use zbus::OwnedObjectPath as Path;
