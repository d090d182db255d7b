//! The host's side: opening a library and making instances of it.

use std::path::Path;
use std::sync::Arc;
use std::thread::ThreadId;

use abi_stable::StableAbi;
use abi_stable::abi_stability::check_layout_compatibility;
use abi_stable::library::{LibHeader, LibraryError, RawLibrary, lib_header_from_raw_library};
use abi_stable::std_types::ROption;

use super::instance::RawInstance;
use super::magic::{ABI_STABLE_VERSION, MAGIC_SYMBOL, MAGIC_WORD, Magic, text};
use super::root::PluginRootRef;
use super::{merge, sample, train};
use crate::error::{Code, Error, Result};
use crate::manifest::PluginKind;
use crate::merge::AnyMergeStrategy;
use crate::sample::AnySampler;
use crate::train::AnyTrainer;
use crate::{ABI_VERSION, Value};

/// Why a library is no plugin that this host can use: one line that says the cure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal(pub String);

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Refusal {}

const REBUILD: &str = "rebuild it with the SDK of this release: cargo update -p blocklora-sdk && cargo build --release";

/// A plugin's library, open and checked. Never unloaded.
#[derive(Clone, Copy)]
pub struct Library {
    root: PluginRootRef,
    abi: (u32, u32),
}

/// Fails with a contract error off the thread that a call began on.
pub(super) fn check_thread(thread: ThreadId) -> Result<()> {
    if std::thread::current().id() == thread {
        return Ok(());
    }
    Err(Error::contract("the plugin called a function of its job from another thread than the job's"))
}

impl Library {
    /// Loads the library at `path`, checks its magic block first and the layout of everything it exchanges second.
    /// Loading runs the library's initialisers: what is not trusted is to be opened in another process first.
    pub fn open(path: &Path) -> Result<Self, Refusal> {
        // A bare name would be looked for in the loader's folders.
        let path = &std::path::absolute(path).map_err(|e| Refusal(not_loadable(&e.to_string())))?;
        super::elf::check_whole(path).map_err(|e| Refusal(not_loadable(&e)))?;
        let library = RawLibrary::load_at(path).map_err(|e| Refusal(not_loadable(&reason(&e))))?;
        // SAFETY: the symbol has this type in every plugin; a library that has another symbol of this name lies on
        // purpose, against which nothing helps in this process.
        let magic = unsafe { library.get::<extern "C" fn() -> *const Magic>(MAGIC_SYMBOL.as_bytes()) }
            .map_err(|_| Refusal(format!("not a plugin: it has no {MAGIC_SYMBOL}; make it with export_plugin!")))?(
        );
        // SAFETY: as above; the block is a static of the library.
        let magic = unsafe { magic.as_ref() }
            .ok_or_else(|| Refusal("not a plugin: its magic block is missing; make it with export_plugin!".into()))?;
        check_magic(magic)?;
        let name = text(&magic.name);
        // SAFETY: the library is never closed, see below.
        let header = unsafe { lib_header_from_raw_library(&library) }
            .map_err(|e| Refusal(format!("its root is not readable ({}): {REBUILD}", one_line(&e))))?;
        let root = checked_root(header)?;
        // Code of the library may be running from now on.
        std::mem::forget(library);
        if root.name().as_str() != name {
            return Err(Refusal(format!("it calls itself {name:?} and {:?}: {REBUILD}", root.name())));
        }
        Ok(Self { root, abi: (magic.abi_major, magic.abi_minor) })
    }

    /// The ABI version of the SDK that it was built with: major and minor.
    pub fn abi(&self) -> (u32, u32) {
        self.abi
    }

    /// `<kind>-<id>`.
    pub fn name(&self) -> &'static str {
        self.root.name().as_str()
    }

    /// The plugin's own version.
    pub fn version(&self) -> &'static str {
        self.root.version().as_str()
    }

    /// The manifest that it was built with.
    pub fn manifest(&self) -> &'static str {
        self.root.manifest().as_str()
    }

    /// Whether it can do what `kind` does.
    pub fn has(&self, kind: PluginKind) -> bool {
        self.root.capability()(kind.as_str().into()) > 0
    }

    /// JSON Schema of its settings.
    pub fn schema(&self) -> Result<Value> {
        let text = self.root.schema()().into_result().map_err(Error::from)?;
        parse(&text)
    }

    /// Settings completed with their defaults and checked by the plugin.
    pub fn resolve(&self, settings: &Value) -> Result<Value> {
        let text = self.root.resolve()(settings.to_string().as_str().into()).into_result().map_err(Error::from)?;
        parse(&text)
    }

    /// The merge strategy with these settings.
    pub fn strategy(&self, settings: &Value) -> Result<Box<dyn AnyMergeStrategy>> {
        let ROption::RSome(table) = self.root.merge() else { return Err(self.is_no("merge strategy")) };
        Ok(Box::new(merge::Remote { instance: self.instance(settings)?, table }))
    }

    /// The trainer with these settings.
    pub fn trainer(&self, settings: &Value) -> Result<Box<dyn AnyTrainer>> {
        let ROption::RSome(table) = self.root.train() else { return Err(self.is_no("trainer")) };
        Ok(Box::new(train::Remote { instance: self.instance(settings)?, table }))
    }

    /// The sampler with these settings.
    pub fn sampler(&self, settings: &Value) -> Result<Box<dyn AnySampler>> {
        let ROption::RSome(table) = self.root.sample() else { return Err(self.is_no("sampler")) };
        Ok(Box::new(sample::Remote { instance: self.instance(settings)?, table }))
    }

    fn is_no(&self, what: &str) -> Error {
        Error::new(Code::NotSupported, format!("{} is no {what}", self.name()))
    }

    fn instance(&self, settings: &Value) -> Result<Instance> {
        let raw = self.root.create()(settings.to_string().as_str().into()).into_result().map_err(Error::from)?;
        Ok(Instance(Arc::new(Owned { raw, root: self.root })))
    }
}

/// An instance that is given back when its last user goes.
#[derive(Clone)]
pub struct Instance(Arc<Owned>);

struct Owned {
    raw: RawInstance,
    root: PluginRootRef,
}

impl Instance {
    pub(super) fn raw(&self) -> RawInstance {
        self.0.raw
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        self.root.destroy()(self.raw);
    }
}

fn parse(text: &str) -> Result<Value> {
    serde_json::from_str(text).map_err(|e| Error::contract(format!("the plugin answered no JSON: {e}")))
}

fn check_magic(magic: &Magic) -> Result<(), Refusal> {
    if magic.word != MAGIC_WORD || (magic.length as usize) < size_of::<Magic>() {
        return Err(Refusal("not a plugin: its magic block is another program's; make it with export_plugin!".into()));
    }
    let (ours, theirs) = (ABI_VERSION, (magic.abi_major, magic.abi_minor));
    let versions = format!("built for ABI {}.{}, this release has {}.{}", theirs.0, theirs.1, ours.0, ours.1);
    if theirs > ours {
        return Err(Refusal(format!("{versions}: install a newer BlockLoRA, or {REBUILD}")));
    }
    if theirs.0 < ours.0 {
        return Err(Refusal(format!("{versions}: {REBUILD}")));
    }
    let (target, here) = (text(&magic.target), env!("BLOCKLORA_TARGET"));
    if target != here {
        return Err(Refusal(format!("built for {target}, this machine is {here}: build it for {here}")));
    }
    let abi_stable = text(&magic.abi_stable);
    if abi_stable != ABI_STABLE_VERSION {
        return Err(Refusal(format!("built with abi_stable {abi_stable}, not {ABI_STABLE_VERSION}: {REBUILD}")));
    }
    Ok(())
}

/// The root of a library after a check of every layout that it reaches.
///
/// A plugin is never newer than its host, which the magic block has said, so that only the host's tables may have grown.
/// Therefore what the plugin was built with is what is expected here, and must be found in what the host has. (abi_stable
/// checks the other way round, for libraries newer than their users.)
fn checked_root(header: &'static LibHeader) -> Result<PluginRootRef, Refusal> {
    let layout = header.layout().ok_or_else(|| Refusal(format!("it hides the layout of its data: {REBUILD}")))?;
    // abi_stable explains a mismatch in pages, of which an author gets no more than of this line.
    check_layout_compatibility(layout, PluginRootRef::LAYOUT).into_result().map_err(|_| {
        Refusal(format!("the layout of its data differs from the ABI's, whatever its version says: {REBUILD}"))
    })?;
    // SAFETY: the layouts have been compared.
    unsafe { header.init_root_module_with_unchecked_layout::<PluginRootRef>() }
        .map_err(|e| Refusal(format!("its root does not start ({}): {REBUILD}", one_line(&e))))
}

fn one_line(error: &dyn std::fmt::Display) -> String {
    error.to_string().split_whitespace().collect::<Vec<_>>().join(" ")
}

fn reason(error: &LibraryError) -> String {
    match error {
        LibraryError::OpenError { err, .. } => one_line(err),
        other => one_line(other),
    }
}

fn not_loadable(reason: &str) -> String {
    format!("not a library that this machine can load ({reason}): build it for this machine, or copy it again whole")
}
