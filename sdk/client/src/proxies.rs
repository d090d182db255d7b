//! The interfaces as they are: one proxy for each, method by method and property by property.
//!
//! What the arguments mean is written in `sdk/client/interfaces/*.xml`, beside the interface. The types of this crate's
//! root wrap these with typed options and results; use a proxy where something is missing there.

// Every member is explained in the interface files; a second copy here would drift.
#![allow(missing_docs)]

use std::collections::HashMap;

use zbus::{ObjectPath, OwnedFd, OwnedObjectPath, OwnedVariant, Result};

/// a{sv}.
pub type Dict = HashMap<String, OwnedVariant>;
/// a(oa{sv}): adapters, or "/" where the options give a digest, with their options.
pub type Entries = Vec<(OwnedObjectPath, Dict)>;

/// `org.blocklora.Daemon1.Manager`.
#[zbus::proxy(
    interface = "org.blocklora.Daemon1.Manager",
    default_service = "org.blocklora.Daemon1",
    default_path = "/org/blocklora/Daemon1"
)]
pub trait Manager {
    fn generate(&self, target: &ObjectPath<'_>, params: &Dict, options: &Dict) -> Result<OwnedObjectPath>;
    fn train(&self, plugin: &str, config: &Dict, data: &[zbus::Fd<'_>], options: &Dict) -> Result<OwnedObjectPath>;
    fn merge(&self, strategy: &str, parts: &Entries, options: &Dict) -> Result<OwnedObjectPath>;
    fn load_model(&self, id: &str, options: &Dict) -> Result<OwnedObjectPath>;
    fn register_adapter(&self, file: zbus::Fd<'_>, options: &Dict) -> Result<OwnedObjectPath>;
    fn open_adapter(&self, digest: &str, options: &Dict) -> Result<OwnedObjectPath>;
    fn query_library(&self, filter: &Dict, offset: u32, limit: u32) -> Result<Vec<Dict>>;
    fn count_library(&self, filter: &Dict) -> Result<u64>;
    fn validate_library(&self, options: &Dict) -> Result<OwnedObjectPath>;
    fn register_model(&self, path: &str, options: &Dict) -> Result<OwnedObjectPath>;
    fn forget_model(&self, id: &str, options: &Dict) -> Result<()>;
    fn list_jobs(&self, filter: &Dict, offset: u32, limit: u32) -> Result<Vec<Dict>>;
    fn list_slots(&self, filter: &Dict, offset: u32, limit: u32) -> Result<Vec<Dict>>;
    fn lease_slot(&self, partition: &Dict, options: &Dict) -> Result<(String, u32)>;
    fn release_slot(&self, lease: &str, options: &Dict) -> Result<()>;
    fn reclaim_memory(&self, device: &str, bytes: u64, options: &Dict) -> Result<u64>;
    fn empty_job(&self, options: &Dict) -> Result<OwnedObjectPath>;
    fn reload(&self, options: &Dict) -> Result<()>;

    #[zbus(property(emits_changed_signal = "const"))]
    fn version(&self) -> Result<String>;
    #[zbus(property(emits_changed_signal = "const"))]
    fn spec_versions(&self) -> Result<Vec<String>>;
    #[zbus(property(emits_changed_signal = "const"))]
    fn features(&self) -> Result<Vec<String>>;
    #[zbus(property)]
    fn devices(&self) -> Result<Vec<Dict>>;
    #[zbus(property)]
    fn default_model(&self) -> Result<String>;
    #[zbus(property)]
    fn samplers(&self) -> Result<Vec<String>>;
    #[zbus(property)]
    fn strategies(&self) -> Result<Vec<String>>;
    #[zbus(property)]
    fn trainers(&self) -> Result<Vec<String>>;
    #[zbus(property)]
    fn queue_length(&self) -> Result<u32>;
    #[zbus(property)]
    fn queue_limit(&self) -> Result<u32>;
    #[zbus(property, name = "IdleUnloadUSec")]
    fn idle_unload_usec(&self) -> Result<u64>;
    #[zbus(property, name = "IdleUnloadUSec")]
    fn set_idle_unload_usec(&self, usec: u64) -> Result<()>;
    #[zbus(property)]
    fn tainted(&self) -> Result<bool>;
    #[zbus(property(emits_changed_signal = "const"), name = "StartedUSec")]
    fn started_usec(&self) -> Result<u64>;
    #[zbus(property)]
    fn config_files(&self) -> Result<Vec<String>>;
}

/// `org.blocklora.Daemon1.Model`.
#[zbus::proxy(
    interface = "org.blocklora.Daemon1.Model",
    default_service = "org.blocklora.Daemon1",
    assume_defaults = false
)]
pub trait Model {
    fn compose(&self, entries: &Entries, options: &Dict) -> Result<OwnedObjectPath>;
    fn set_keep_alive(&self, usec: u64, options: &Dict) -> Result<()>;
    fn unload(&self, options: &Dict) -> Result<()>;

    #[zbus(property(emits_changed_signal = "const"))]
    fn id(&self) -> Result<String>;
    #[zbus(property)]
    fn digest(&self) -> Result<String>;
    #[zbus(property)]
    fn architecture(&self) -> Result<String>;
    #[zbus(property)]
    fn device(&self) -> Result<String>;
    #[zbus(property)]
    fn precision(&self) -> Result<String>;
    #[zbus(property)]
    fn state(&self) -> Result<String>;
    #[zbus(property)]
    fn problem(&self) -> Result<(String, String)>;
    #[zbus(property)]
    fn resident_bytes(&self) -> Result<u64>;
    #[zbus(property(emits_changed_signal = "const"))]
    fn path(&self) -> Result<String>;
    #[zbus(property)]
    fn width(&self) -> Result<u32>;
    #[zbus(property)]
    fn height(&self) -> Result<u32>;
    #[zbus(property)]
    fn size_multiple(&self) -> Result<u32>;
    #[zbus(property, name = "KeepAliveUSec")]
    fn keep_alive_usec(&self) -> Result<u64>;
}

/// `org.blocklora.Daemon1.Adapter`.
#[zbus::proxy(
    interface = "org.blocklora.Daemon1.Adapter",
    default_service = "org.blocklora.Daemon1",
    assume_defaults = false
)]
pub trait Adapter {
    fn inspect(&self, options: &Dict) -> Result<Dict>;
    fn export(&self, format: &str, options: &Dict) -> Result<Vec<(OwnedFd, Dict)>>;
    fn unregister(&self, options: &Dict) -> Result<()>;

    #[zbus(property(emits_changed_signal = "const"))]
    fn name(&self) -> Result<String>;
    #[zbus(property(emits_changed_signal = "const"))]
    fn digest(&self) -> Result<String>;
    #[zbus(property(emits_changed_signal = "const"))]
    fn spec_version(&self) -> Result<String>;
    #[zbus(property(emits_changed_signal = "const"))]
    fn architecture(&self) -> Result<String>;
    #[zbus(property(emits_changed_signal = "const"))]
    fn base_digest(&self) -> Result<String>;
    #[zbus(property(emits_changed_signal = "const"))]
    fn algorithm(&self) -> Result<String>;
    #[zbus(property(emits_changed_signal = "const"))]
    fn producer(&self) -> Result<(String, String)>;
    #[zbus(property(emits_changed_signal = "const"))]
    fn kind(&self) -> Result<String>;
    #[zbus(property(emits_changed_signal = "const"))]
    fn class_word(&self) -> Result<String>;
    #[zbus(property(emits_changed_signal = "const"))]
    fn rank(&self) -> Result<u32>;
    #[zbus(property(emits_changed_signal = "const"))]
    fn partition(&self) -> Result<Dict>;
    #[zbus(property(emits_changed_signal = "const"))]
    fn size_bytes(&self) -> Result<u64>;
    #[zbus(property)]
    fn problems(&self) -> Result<Vec<(String, String)>>;
}

/// `org.blocklora.Daemon1.Composition`.
#[zbus::proxy(
    interface = "org.blocklora.Daemon1.Composition",
    default_service = "org.blocklora.Daemon1",
    assume_defaults = false
)]
pub trait Composition {
    fn swap(&self, entries: &Entries, if_generation: u64, options: &Dict) -> Result<u64>;
    fn set_weights(&self, weights: &[(ObjectPath<'_>, f64)], options: &Dict) -> Result<u64>;
    fn explain(&self, options: &Dict) -> Result<Dict>;
    fn bake(&self, out: zbus::Fd<'_>, options: &Dict) -> Result<OwnedObjectPath>;
    fn close(&self) -> Result<()>;

    #[zbus(property(emits_changed_signal = "const"))]
    fn model(&self) -> Result<OwnedObjectPath>;
    #[zbus(property)]
    fn entries(&self) -> Result<Entries>;
    #[zbus(property)]
    fn strategy(&self) -> Result<String>;
    #[zbus(property)]
    fn generation(&self) -> Result<u64>;
    #[zbus(property(emits_changed_signal = "const"))]
    fn owner_uid(&self) -> Result<u32>;
    #[zbus(property(emits_changed_signal = "const"))]
    fn lifetime(&self) -> Result<String>;
}

/// `org.blocklora.Daemon1.Job`.
#[zbus::proxy(
    interface = "org.blocklora.Daemon1.Job",
    default_service = "org.blocklora.Daemon1",
    assume_defaults = false
)]
pub trait Job {
    fn wait(&self) -> Result<(String, Dict)>;
    fn cancel(&self, mode: &str, options: &Dict) -> Result<()>;
    fn take_results(&self, options: &Dict) -> Result<Vec<(OwnedFd, Dict)>>;
    fn open_previews(&self, options: &Dict) -> Result<OwnedFd>;
    #[zbus(signal)]
    fn finished(&self, result: String, details: Dict) -> Result<()>;

    #[zbus(property(emits_changed_signal = "const"))]
    fn kind(&self) -> Result<String>;
    #[zbus(property)]
    fn state(&self) -> Result<String>;
    #[zbus(property)]
    fn stage(&self) -> Result<String>;
    #[zbus(property)]
    fn progress(&self) -> Result<f64>;
    #[zbus(property)]
    fn progress_valid(&self) -> Result<bool>;
    #[zbus(property)]
    fn step(&self) -> Result<(u32, u32)>;
    #[zbus(property)]
    fn queue_position(&self) -> Result<u32>;
    #[zbus(property(emits_changed_signal = "const"), name = "CreatedUSec")]
    fn created_usec(&self) -> Result<u64>;
    #[zbus(property, name = "StartedUSec")]
    fn started_usec(&self) -> Result<u64>;
    #[zbus(property, name = "FinishedUSec")]
    fn finished_usec(&self) -> Result<u64>;
    #[zbus(property, name = "ExpectedEndUSec")]
    fn expected_end_usec(&self) -> Result<u64>;
    #[zbus(property(emits_changed_signal = "const"))]
    fn owner_uid(&self) -> Result<u32>;
    #[zbus(property(emits_changed_signal = "const"))]
    fn priority(&self) -> Result<String>;
    #[zbus(property(emits_changed_signal = "const"))]
    fn lifetime(&self) -> Result<String>;
    #[zbus(property(emits_changed_signal = "const"))]
    fn description(&self) -> Result<String>;
    #[zbus(property)]
    fn error(&self) -> Result<(String, String, Dict)>;
}

/// `org.blocklora.Daemon1.Plugin`.
#[zbus::proxy(
    interface = "org.blocklora.Daemon1.Plugin",
    default_service = "org.blocklora.Daemon1",
    assume_defaults = false
)]
pub trait Plugin {
    fn set_state(&self, state: &str, options: &Dict) -> Result<()>;
    fn validate(&self, level: u32, options: &Dict) -> Result<OwnedObjectPath>;

    #[zbus(property(emits_changed_signal = "const"))]
    fn id(&self) -> Result<String>;
    #[zbus(property)]
    fn version(&self) -> Result<String>;
    #[zbus(property)]
    fn config_schema(&self) -> Result<String>;
    #[zbus(property)]
    fn state(&self) -> Result<String>;
    #[zbus(property)]
    fn digest(&self) -> Result<String>;
    #[zbus(property)]
    fn abi_version(&self) -> Result<(u32, u32)>;
    #[zbus(property)]
    fn kinds(&self) -> Result<Vec<String>>;
    #[zbus(property)]
    fn reason(&self) -> Result<(String, String)>;
    #[zbus(property)]
    fn crashes(&self) -> Result<u32>;
}
