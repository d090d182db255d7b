//! What changes is told, on either transport: also of the root, and where one object's change is another's.

#![allow(clippy::unwrap_used)]

mod common;

use common::{Bus, Client, Daemon, Dict, NAME, ROOT, dict, long};
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
async fn told(client: &Client) {
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
    told(&daemon.client().await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_changes_is_told_on_a_message_bus() {
    let (bus, records) = (Bus::start(), tempfile::tempdir().unwrap());
    let _daemon = daemon(Some(&bus), &records);
    told(&Client::on_bus(&bus).await).await;
}
