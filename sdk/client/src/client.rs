//! The connection to a daemon, and what can be asked of it.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Map, Value};
use tokio::sync::Mutex;
use zbus::connection::Builder;
use zbus::proxy::CacheProperties;
use zbus::{Connection, ObjectPath, OwnedObjectPath};

use crate::adapter::Adapter;
use crate::composition::Composition;
use crate::error::{Error, ErrorKind, Result};
use crate::job::{FILES_PER_CALL, Job};
use crate::memfd;
use crate::model::Model;
use crate::place::Place;
use crate::plugin::Plugin;
use crate::proxies::{Dict, ManagerProxy};
use crate::requests::{Generate, JobOptions, Load, Merge, Partition, Train};
use crate::results::{Baked, Device, Generated, JobEntry, LibraryEntry, Loaded, Merged, Slot, Status, Trained};
use crate::value::{Options, dict_of_json, read_all};

/// The daemon's name on a message bus.
pub const BUS_NAME: &str = "org.blocklora.Daemon1";
/// The path of its manager.
pub const PATH: &str = "/org/blocklora/Daemon1";

/// How long a daemon may take to answer that it is there.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// How long one may take that has just been started: on a machine that is busy with other work, a while. One that ends
/// instead is noticed at once.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// Pages of long lists are fetched by this many entries.
const PAGE: u32 = 500;

/// A client of one daemon. Copies share the connection.
#[derive(Clone, Debug)]
pub struct Client {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    /// None for a socket that somebody else made: there is nowhere to connect to again.
    place: Option<Place>,
    connection: Mutex<Connection>,
}

impl Client {
    /// Connects to the daemon at `place`, which must answer. On a message bus that can start the daemon, it is started.
    /// Errors: [`Error::NotRunning`]; on a bus whose policy forbids it, [`crate::ErrorKind::NotAuthorized`].
    pub async fn connect(place: Place) -> Result<Self> {
        let connection = open(&place).await?;
        let client = Self { inner: Arc::new(Inner { place: Some(place), connection: Mutex::new(connection) }) };
        client.answers().await?;
        Ok(client)
    }

    /// Connects to the first of `places` where a daemon answers. Errors: each place's own, if none does.
    pub async fn connect_first(places: &[Place]) -> std::result::Result<Self, Vec<(Place, Error)>> {
        let mut errors = Vec::new();
        for place in places {
            match Self::connect(place.clone()).await {
                Ok(client) => return Ok(client),
                Err(error) => errors.push((place.clone(), error)),
            }
        }
        Err(errors)
    }

    /// Talks to the daemon at the other end of `stream`, such as one that was started with its option "private".
    pub async fn from_stream(stream: UnixStream) -> Result<Self> {
        let building = Builder::unix_stream(stream).p2p().build();
        let timed_out = |_| Error::Disconnected("the daemon does not answer".into());
        let connection = tokio::time::timeout(START_TIMEOUT, building).await.map_err(timed_out)??;
        let client = Self { inner: Arc::new(Inner { place: None, connection: Mutex::new(connection) }) };
        client.answers().await?;
        Ok(client)
    }

    /// Where it is connected to; none after [`Self::from_stream`].
    pub fn place(&self) -> Option<&Place> {
        self.inner.place.as_ref()
    }

    /// The connection as it is now. If it has ended, for example because the daemon was restarted, a new one is made;
    /// jobs and other objects of the old one stay with the old one. Errors: [`Error::NotRunning`].
    pub async fn connection(&self) -> Result<Connection> {
        let mut connection = self.inner.connection.lock().await;
        if connection.is_closed() {
            let Some(place) = &self.inner.place else {
                return Err(Error::Disconnected("the daemon at the other end is gone".into()));
            };
            *connection = open(place).await?;
        }
        Ok(connection.clone())
    }

    /// Waits until the daemon answers again, for at most `limit`: for a daemon that is being restarted.
    pub async fn reconnect(&self, limit: Duration) -> Result<()> {
        let give_up = tokio::time::Instant::now() + limit;
        loop {
            match self.answers().await {
                Err(error) if error.is_disconnected() && self.inner.place.is_some() => {
                    if tokio::time::Instant::now() >= give_up {
                        return Err(error);
                    }
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
                other => return other,
            }
        }
    }

    async fn answers(&self) -> Result<()> {
        let place = || self.inner.place.as_ref().map_or("the given socket".to_owned(), ToString::to_string);
        let asked = async { Ok(self.manager().await?.version().await?) };
        match tokio::time::timeout(ANSWER_TIMEOUT, asked).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(Error::NotRunning { reason, .. })) => Err(Error::NotRunning { place: place(), reason }),
            Ok(Err(error)) => Err(error),
            Err(_) => {
                let reason = format!("no answer within {} s", ANSWER_TIMEOUT.as_secs());
                Err(Error::NotRunning { place: place(), reason })
            }
        }
    }

    /// The manager's interface itself.
    pub async fn manager(&self) -> Result<ManagerProxy<'static>> {
        let connection = self.connection().await?;
        Ok(ManagerProxy::builder(&connection).cache_properties(CacheProperties::No).build().await?)
    }

    /// What the daemon is and does.
    pub async fn status(&self) -> Result<Status> {
        let connection = self.connection().await?;
        let properties = crate::properties::all(&connection, PATH, "org.blocklora.Daemon1.Manager").await?;
        crate::value::read(&properties)
    }

    /// Its devices.
    pub async fn devices(&self) -> Result<Vec<Device>> {
        read_all(&self.manager().await?.devices().await?)
    }

    /// Draws pictures; the job ends with the connection unless its options say otherwise.
    pub async fn generate(&self, request: &Generate) -> Result<Job<Generated>> {
        let (target, params, options) = request.arguments()?;
        let path = self.manager().await?.generate(&target, &params, &options).await?;
        self.job(path).await
    }

    /// Trains an adapter with the trainer `plugin`, whose settings are `config`, on `pictures` opened for reading; the
    /// job outlives the connection unless its options say otherwise.
    pub async fn train(
        &self,
        plugin: &str,
        config: &Map<String, Value>,
        pictures: &[File],
        request: &Train,
    ) -> Result<Job<Trained>> {
        let (joined, mut options) = (join(pictures)?, request.options());
        let data: Vec<zbus::Fd<'_>> = match &joined {
            None => pictures.iter().map(zbus::Fd::from).collect(),
            Some((file, lengths)) => {
                options.extend(Options::new().with("lengths", lengths.clone()).into_dict());
                vec![file.into()]
            }
        };
        let config = dict_of_json(config)?;
        let path = self.manager().await?.train(plugin, &config, &data, &options).await?;
        self.job(path).await
    }

    /// Merges a set once and keeps it as a composition.
    pub async fn merge(&self, request: &Merge) -> Result<Job<Merged>> {
        let (strategy, parts, options) = request.arguments()?;
        let path = self.manager().await?.merge(&strategy, &parts, &options).await?;
        self.job(path).await
    }

    /// Writes a model folder with `composition` merged in, as a tar archive into `out`.
    pub async fn bake(&self, composition: &Composition, out: &File, options: &JobOptions) -> Result<Job<Baked>> {
        let path = composition.proxy().bake(out.into(), &options.set(Options::new()).into_dict()).await?;
        self.job(path).await
    }

    /// Loads a registered model.
    pub async fn load_model(&self, id: &str, request: &Load) -> Result<Job<Loaded>> {
        let path = self.manager().await?.load_model(id, &request.options()).await?;
        self.job(path).await
    }

    /// Makes the model folder `path`, absolute, known under `id` or its folder's name.
    pub async fn register_model(&self, path: &str, id: Option<&str>) -> Result<Model> {
        let options = Options::new().maybe("id", id.map(str::to_owned)).into_dict();
        let path = self.manager().await?.register_model(path, &options).await?;
        self.model(path).await
    }

    /// Forgets a model; its files stay.
    pub async fn forget_model(&self, id: &str) -> Result<()> {
        Ok(self.manager().await?.forget_model(id, &Dict::new()).await?)
    }

    /// The models that the daemon knows.
    pub async fn models(&self) -> Result<Vec<Model>> {
        let mut models = Vec::new();
        for path in self.objects("org.blocklora.Daemon1.Model").await? {
            models.push(self.model(path).await?);
        }
        Ok(models)
    }

    /// The plugins that the daemon knows.
    pub async fn plugins(&self) -> Result<Vec<Plugin>> {
        let connection = self.connection().await?;
        let mut plugins = Vec::new();
        for path in self.objects("org.blocklora.Daemon1.Plugin").await? {
            plugins.push(Plugin::new(&connection, path).await?);
        }
        Ok(plugins)
    }

    /// The objects that have `interface`, in the order of their paths.
    pub async fn objects(&self, interface: &str) -> Result<Vec<OwnedObjectPath>> {
        let connection = self.connection().await?;
        let manager = zbus::fdo::ObjectManagerProxy::builder(&connection).destination(BUS_NAME).path(PATH);
        let all = manager.build().await?.get_managed_objects().await?;
        let has = |interfaces: &std::collections::HashMap<_, _>| {
            interfaces.keys().any(|name: &zbus::names::OwnedInterfaceName| name.as_str() == interface)
        };
        let mut paths: Vec<OwnedObjectPath> =
            all.into_iter().filter(|(_, interfaces)| has(interfaces)).map(|(path, _)| path).collect();
        paths.sort_by(|one, other| one.as_str().cmp(other.as_str()));
        Ok(paths)
    }

    /// Checks the adapter file and adds it to the library.
    pub async fn register_adapter(&self, path: &Path) -> Result<Adapter> {
        self.register(path, Options::new()).await
    }

    /// Checks the adapter file and makes it usable until this connection ends; the library stays as it is.
    pub async fn borrow_adapter(&self, path: &Path) -> Result<Adapter> {
        self.register(path, Options::new().with("lifetime", "connection")).await
    }

    async fn register(&self, path: &Path, options: Options) -> Result<Adapter> {
        let file = File::open(path).map_err(|source| Error::io(path, source))?;
        let options = options.with("file_name", path.display().to_string()).into_dict();
        let connection = self.connection().await?;
        let path = self.manager().await?.register_adapter((&file).into(), &options).await?;
        Adapter::new(&connection, path).await
    }

    /// The adapter of the library with this digest, the first 8 or more digits of one, or this unambiguous name.
    pub async fn open_adapter(&self, digest_or_name: &str) -> Result<Adapter> {
        let connection = self.connection().await?;
        let path = self.manager().await?.open_adapter(digest_or_name, &Dict::new()).await?;
        Adapter::new(&connection, path).await
    }

    /// All entries of the library that `filter` lets through; the interface lists its keys.
    pub async fn library(&self, filter: Options) -> Result<Vec<LibraryEntry>> {
        let (manager, filter) = (self.manager().await?, filter.into_dict());
        all_pages(async |offset| Ok(manager.query_library(&filter, offset, PAGE).await?)).await
    }

    /// At most `limit` jobs that `filter` lets through, newest first, after the first `offset`.
    pub async fn jobs(&self, filter: Options, offset: u32, limit: u32) -> Result<Vec<JobEntry>> {
        let (manager, filter) = (self.manager().await?, filter.into_dict());
        let page = async |done: u32| {
            let left = limit.saturating_sub(done).min(PAGE);
            match left {
                0 => Ok(Vec::new()),
                left => Ok(manager.list_jobs(&filter, offset.saturating_add(done), left).await?),
            }
        };
        all_pages(page).await
    }

    /// Who owns which slots; all bases and partitions where none is given.
    pub async fn slots(&self, base_digest: Option<&str>, partition: Option<&Partition>) -> Result<Vec<Slot>> {
        let filter = Options::new()
            .maybe("base_digest", base_digest.map(str::to_owned))
            .maybe("partition", partition.map(|p| crate::value::nested(p.dict())));
        let (manager, filter) = (self.manager().await?, filter.into_dict());
        all_pages(async |offset| Ok(manager.list_slots(&filter, offset, PAGE).await?)).await
    }

    /// Gives a lease of a slot back.
    pub async fn release_slot(&self, lease: &str) -> Result<()> {
        Ok(self.manager().await?.release_slot(lease, &Dict::new()).await?)
    }

    /// A job that does nothing, to measure what a job costs.
    pub async fn empty_job(&self) -> Result<Job<Map<String, Value>>> {
        let path = self.manager().await?.empty_job(&Dict::new()).await?;
        self.job(path).await
    }

    /// The job at `path`, for example of a list of jobs; `R` is what it gives.
    pub async fn job<R: serde::de::DeserializeOwned>(&self, path: OwnedObjectPath) -> Result<Job<R>> {
        Job::new(&self.connection().await?, path).await
    }

    /// The model at `path`.
    pub async fn model(&self, path: OwnedObjectPath) -> Result<Model> {
        Model::new(&self.connection().await?, path).await
    }

    /// The composition at `path`, for example of [`Merged`].
    pub async fn composition(&self, path: OwnedObjectPath) -> Result<Composition> {
        Composition::new(&self.connection().await?, path).await
    }
}

/// Every entry of a list that `page` gives at most [`PAGE`] entries of, from an offset on. A page may end early, where its
/// entries are long.
async fn all_pages<T>(page: impl AsyncFn(u32) -> Result<Vec<Dict>>) -> Result<Vec<T>>
where
    T: serde::de::DeserializeOwned,
{
    let mut entries = Vec::new();
    loop {
        let page = page(entries.len() as u32).await?;
        if page.is_empty() {
            return Ok(entries);
        }
        entries.extend(read_all::<T>(&page)?);
    }
}

/// "/", which stands for "no object".
pub(crate) fn no_object() -> OwnedObjectPath {
    ObjectPath::from_static_str_unchecked("/").into()
}

async fn open(place: &Place) -> Result<Connection> {
    let not_running = |reason: String| Error::NotRunning { place: place.to_string(), reason };
    let builder = match place {
        Place::SessionBus => Builder::session(),
        Place::SystemBus => Builder::system(),
        Place::Bus(address) => Builder::address(address.as_str()),
        Place::Socket(path) => {
            let stream = UnixStream::connect(path).map_err(|e| match e.kind() {
                io::ErrorKind::PermissionDenied => {
                    Error::Daemon { kind: ErrorKind::NotAuthorized, message: format!("{place}: {e}") }
                }
                io::ErrorKind::ConnectionRefused => not_running(
                    "nobody listens on it: a daemon that was killed left it, the next one replaces it".into(),
                ),
                _ => not_running(e.to_string()),
            })?;
            Builder::unix_stream(stream).p2p()
        }
    };
    match tokio::time::timeout(ANSWER_TIMEOUT, builder.build()).await {
        Ok(connection) => connection.map_err(|e| not_running(e.to_string())),
        Err(_) => Err(not_running("the other side does not answer".into())),
    }
}

/// More pictures than a message on a system bus carries as files, as one memory file and the length of each.
fn join(pictures: &[File]) -> Result<Option<(OwnedFd, Vec<u64>)>> {
    if pictures.len() <= FILES_PER_CALL {
        return Ok(None);
    }
    let (mut bytes, mut lengths) = (Vec::new(), Vec::with_capacity(pictures.len()));
    for (index, mut picture) in pictures.iter().enumerate() {
        let unreadable = |e: std::io::Error| Error::io(format!("pictures[{index}]"), e);
        picture.seek(SeekFrom::Start(0)).map_err(unreadable)?;
        lengths.push(picture.read_to_end(&mut bytes).map_err(unreadable)? as u64);
    }
    let file = memfd::sealed("pictures", &bytes).map_err(|e| Error::io("memory file of pictures", e))?;
    Ok(Some((file, lengths)))
}
