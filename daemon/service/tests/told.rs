//! What changes is told, on either transport: also of the root, and where one object's change is another's.

#![allow(clippy::unwrap_used)]

mod common;

use common::hostile::Hostile;
use common::{Bus, Client, Daemon, Dict, NAME, ROOT, alive, dict, long, until};
use futures_util::StreamExt;
use zbus::{OwnedObjectPath, OwnedVariant, Variant};

const PROPERTIES: &str = "org.freedesktop.DBus.Properties";

/// Changes of properties, as they come.
struct Changes(zbus::MessageStream);

impl Changes {
    async fn of(client: &Client) -> Self {
        let rule = format!("type='signal',interface='{PROPERTIES}',member='PropertiesChanged'");
        let rule = if client.bus { format!("{rule},sender='{NAME}'") } else { rule };
        let bus = "org.freedesktop.DBus";
        let body = (rule,);
        let add = client.connection.call_method(Some(bus), "/org/freedesktop/DBus", Some(bus), "AddMatch", &body);
        add.await.unwrap();
        Self(zbus::MessageStream::from(&client.connection))
    }

    /// Waits for a change of `property` of the object at `path`; its value.
    async fn next(&mut self, path: &str, property: &str) -> OwnedVariant {
        let next = async {
            loop {
                let message = self.0.next().await.unwrap().unwrap();
                let header = message.header();
                let is_it = header.member().is_some_and(|member| member == "PropertiesChanged")
                    && header.path().is_some_and(|from| from.as_str() == path);
                if is_it {
                    let (_, mut changed, _): (String, Dict, Vec<String>) = message.body().deserialize().unwrap();
                    if let Some(value) = changed.remove(property) {
                        return value;
                    }
                }
            }
        };
        let waited = tokio::time::timeout(std::time::Duration::from_secs(60), next).await;
        waited.unwrap_or_else(|_| panic!("{property} of {path} is not told"))
    }
}

/// What changes is told: also of the root, and where one object's change is another's.
async fn told(daemon: &Daemon, client: &Client) {
    let mut changes = Changes::of(client).await;
    let set = (format!("{NAME}.Manager"), "IdleUnloadUSec", Variant::from(9_000_000u64));
    client.call::<_, ()>(ROOT, PROPERTIES, "Set", &set).await.unwrap();
    assert_eq!(u64::try_from(changes.next(ROOT, "IdleUnloadUSec").await), Ok(9_000_000));
    // Two that wait behind one that runs.
    let mut jobs = Vec::new();
    for _ in 0..3 {
        jobs.push(client.generate("/", long(900), Dict::new()).await.unwrap());
    }
    assert!(client.get::<u32>(&jobs[2], "Job", "QueuePosition").await >= 2, "one that waits has its place at once");
    while u32::try_from(changes.next(ROOT, "QueueLength").await) != Ok(2) {}
    for job in &jobs {
        client.call::<_, ()>(job, "Job", "Cancel", &("", Dict::new())).await.unwrap();
    }
    while u32::try_from(changes.next(ROOT, "QueueLength").await) != Ok(0) {}
    // The adapter of a set is no object for a while, and one again.
    let teddy = client.register("teddy").await;
    let set = client.compose(&[(&teddy, 1.0)], Dict::new()).await.unwrap();
    let shown = |entries: OwnedVariant| {
        let entries: Vec<(OwnedObjectPath, Dict)> = entries.try_into().unwrap();
        entries[0].0.as_str().to_owned()
    };
    client.call::<_, ()>(&teddy, "Adapter", "Unregister", &(Dict::new(),)).await.unwrap();
    assert_eq!(shown(changes.next(&set, "Entries").await), "/");
    client.register("teddy").await;
    assert_eq!(shown(changes.next(&set, "Entries").await), teddy);
    client.call::<_, ()>(&set, "Composition", "Close", &()).await.unwrap();
    // The library's file is gone, which whoever reads it finds out; and it is there again.
    let problems = |value: OwnedVariant| Vec::<(String, String)>::try_from(value).unwrap();
    let file = daemon.state().join("adapters").join(format!("{}.safetensors", teddy.rsplit('/').next().unwrap()));
    std::fs::rename(&file, file.with_extension("away")).unwrap();
    client.call::<_, OwnedObjectPath>(ROOT, "Manager", "ValidateLibrary", &(Dict::new(),)).await.unwrap();
    let found = problems(changes.next(&teddy, "Problems").await);
    assert!(found.len() == 1 && found[0].0.ends_with("AdapterNotFound"), "{found:?}");
    std::fs::rename(file.with_extension("away"), &file).unwrap();
    client.call::<_, Dict>(&teddy, "Adapter", "Inspect", &(Dict::new(),)).await.unwrap();
    assert_eq!(problems(changes.next(&teddy, "Problems").await), []);
    // A plugin that is disabled is usable no more, and the error says what to do.
    let plugin = format!("{ROOT}/plugin/merge_2dties");
    let names = |value: OwnedVariant| Vec::<String>::try_from(value).unwrap();
    client.call::<_, ()>(&plugin, "Plugin", "SetState", &("disabled", Dict::new())).await.unwrap();
    assert!(!names(changes.next(ROOT, "Strategies").await).contains(&"ties".to_owned()));
    let error = client.compose(&[(&teddy, 1.0)], dict([("strategy", "ties".into())])).await.unwrap_err();
    let expected = "PluginQuarantined: plugin merge-ties is disabled: enable it with \
                    `blocklora plugin quarantine merge-ties --lift`";
    assert!(error.starts_with(expected), "{error}");
    client.call::<_, ()>(&plugin, "Plugin", "SetState", &("enabled", Dict::new())).await.unwrap();
    assert!(names(changes.next(ROOT, "Strategies").await).contains(&"ties".to_owned()));
}

/// A daemon whose records of plugins are its own: one of them is disabled for a while.
fn daemon(bus: Option<&Bus>, records: &tempfile::TempDir) -> Daemon {
    Daemon::start_in(bus, "", &[], &[("XDG_STATE_HOME", records.path().to_str().unwrap())])
}

#[tokio::test(flavor = "multi_thread")]
async fn what_changes_is_told_on_the_socket() {
    let records = tempfile::tempdir().unwrap();
    let daemon = daemon(None, &records);
    told(&daemon, &daemon.client().await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_changes_is_told_on_a_message_bus() {
    let (bus, records) = (Bus::start(), tempfile::tempdir().unwrap());
    let daemon = daemon(Some(&bus), &records);
    told(&daemon, &Client::on_bus(&bus).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn plugins_come_and_go_and_one_that_hangs_holds_nobody_up() {
    let hostile = Hostile::install();
    let mut daemon = hostile.daemon("in-process");
    let client = daemon.client().await;
    let plugin = format!("{ROOT}/plugin/merge_2dhostile");
    let names = |value: OwnedVariant| Vec::<String>::try_from(value).unwrap();
    // A new library under the old name, whose initialiser does not end.
    hostile.set_mode("hang-load");
    let since = std::time::Instant::now();
    hostile.change("merge");
    while since.elapsed() < std::time::Duration::from_secs(6) {
        let asked = std::time::Instant::now();
        alive(&mut daemon, &client).await;
        client.get::<Vec<String>>(ROOT, "Manager", "Strategies").await;
        assert!(asked.elapsed() < std::time::Duration::from_secs(5), "{:?}", asked.elapsed());
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    // The scan goes on for a while.
    let mut changes = Changes::of(&client).await;
    assert!(!names(changes.next(ROOT, "Strategies").await).contains(&"hostile".to_owned()));
    // Unread, it would hold up the connection.
    drop(changes);
    until("the quarantine", || async { client.get::<String>(&plugin, "Plugin", "State").await == "quarantined" }).await;
    hostile.set_mode("");
    hostile.remove("merge");
    let gone = || async { client.message(&plugin, PROPERTIES, "GetAll", &(format!("{NAME}.Plugin"),)).await.is_err() };
    until("the end of the object", gone).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_folder_of_a_configured_model_counts_from_the_reload_on() {
    let records = tempfile::tempdir().unwrap();
    let daemon = daemon(None, &records);
    let client = daemon.client().await;
    let model = format!("{ROOT}/model/one");
    for folder in ["/nowhere", "/elsewhere"] {
        let text = format!("[models]\nfolders = {{ one = {folder:?} }}\n");
        std::fs::write(daemon.dir.path().join("blocklora.toml"), text).unwrap();
        client.call::<_, ()>(ROOT, "Manager", "Reload", &(Dict::new(),)).await.unwrap();
        assert_eq!(client.get::<String>(&model, "Model", "Path").await, folder);
    }
}
