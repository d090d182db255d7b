//! The interface on the real process: one body, over a message bus and over the socket.

#![allow(clippy::unwrap_used)]

mod common;

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::os::fd::AsFd;
use std::process::{Child, Command};

use common::{Bus, Client, Daemon, Dict, NAME, ROOT, dict, entries_of, small, stub, train, until};
use zbus::{OwnedObjectPath, OwnedVariant, Variant};

const PROPERTIES: &str = "org.freedesktop.DBus.Properties";

#[tokio::test(flavor = "multi_thread")]
async fn everything_works_on_the_socket() {
    let daemon = Daemon::start();
    body(&daemon.client().await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_works_on_a_message_bus() {
    let bus = Bus::start();
    let daemon = Daemon::start_with(Some(&bus), "", &[]);
    body(&Client::on_bus(&bus).await).await;
    // A client of the bus that goes takes its jobs and compositions with it.
    let other = Client::on_bus(&bus).await;
    let composition = other.compose(&[], Dict::new()).await.unwrap();
    drop(other);
    let client = daemon.client().await;
    until("the end of the composition", || async {
        client.message(&composition, PROPERTIES, "GetAll", &("",)).await.is_err()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_file_of_a_job_with_hundreds_arrives_on_any_transport() {
    // More than the kernel passes in one message (253), and far more than a system bus does (16).
    const PICTURES: u32 = 300;
    let bus = Bus::start_with_system_limits();
    let daemon = stub::daemon_on(Some(&bus), "", &[]);
    for client in [daemon.client().await, Client::on_bus(&bus).await] {
        let mut params = stub::picture("a dog", 5, 1);
        params.extend(dict([("count", PICTURES.into())]));
        let job = client.generate("/", params, Dict::new()).await.unwrap();
        client.wait(&job).await.unwrap();
        let keep = dict([("keep", true.into()), ("offset", (2 * PICTURES - 3).into())]);
        let last: Vec<(zbus::OwnedFd, Dict)> = client.call(&job, "Job", "TakeResults", &(keep,)).await.unwrap();
        assert_eq!(last.len(), 3);
        let files = client.results(&job).await.unwrap();
        let index = |info: &Dict| u32::try_from(info["index"].try_clone().unwrap()).unwrap();
        let found: Vec<u32> = files.iter().map(|(_, info)| index(info)).collect();
        assert_eq!(found, (0..2 * PICTURES).map(|file| file / 2).collect::<Vec<u32>>());
        assert_eq!(common::read_fd(&last[2].0), files.last().unwrap().0);
        let alone = stub::picture("a dog", 5 + u64::from(PICTURES) - 1, 1);
        assert_eq!(client.draw("/", alone).await.unwrap(), files[files.len() - 2].0);
        assert_eq!(client.results(&job).await.unwrap().len(), 0);
    }
}

async fn body(client: &Client) {
    manager(client).await;
    let pixels = drawing(client).await;
    library_and_sets(client, &pixels).await;
    previews_and_cancelling(client).await;
    training_and_slots(client).await;
    baking(client).await;
}

async fn manager(client: &Client) {
    assert_eq!(client.get::<String>(ROOT, "Manager", "DefaultModel").await, "starter");
    assert_eq!(client.get::<String>(ROOT, "Manager", "Version").await, env!("CARGO_PKG_VERSION"));
    // Setting a property, and its signal's value.
    let set = (format!("{NAME}.Manager"), "IdleUnloadUSec", Variant::from(7_000_000u64));
    client.call::<_, ()>(ROOT, PROPERTIES, "Set", &set).await.unwrap();
    assert_eq!(client.get::<u64>(ROOT, "Manager", "IdleUnloadUSec").await, 7_000_000);
    let set = (format!("{NAME}.Manager"), "Version", Variant::from("2"));
    let error = client.call::<_, ()>(ROOT, PROPERTIES, "Set", &set).await.unwrap_err();
    assert!(error.starts_with("org.freedesktop.DBus.Error.PropertyReadOnly"), "{error}");
    // Wrong calls have names.
    for (params, expected) in [
        (dict([]), "InvalidOption: option \"prompt\" is required"),
        (dict([("prompt", "x".into()), ("stepz", 3u32.into())]), "InvalidOption: unknown option \"stepz\""),
        (
            dict([("prompt", "x".into()), ("steps", "3".into())]),
            "InvalidOption: option \"steps\" must be of type u, not s",
        ),
        (dict([("prompt", "x".into()), ("steps", 0u32.into())]), "InvalidOption: steps = 0: must be 1 to 1000"),
        (dict([("prompt", "x".into()), ("sampler", "no".into())]), "PluginNotFound: there is no sampler \"no\""),
    ] {
        let error = client.generate("/", params, Dict::new()).await.unwrap_err();
        assert!(error.starts_with(expected), "{error}");
    }
    let job: OwnedObjectPath = client.call(ROOT, "Manager", "EmptyJob", &(Dict::new(),)).await.unwrap();
    assert_eq!(client.wait(job.as_str()).await.unwrap(), Dict::new());
    assert_eq!(client.get::<String>(job.as_str(), "Job", "State").await, "done");
    let objects: HashMap<OwnedObjectPath, HashMap<String, Dict>> =
        client.call(ROOT, "org.freedesktop.DBus.ObjectManager", "GetManagedObjects", &()).await.unwrap();
    assert!(objects.contains_key(&job));
}

/// Draws; gives the pixels of "a dog" with seed 5.
async fn drawing(client: &Client) -> Vec<u8> {
    let options = dict([("token", "mine".into())]);
    let job = client.generate("/", small("a dog", 5), options).await.unwrap();
    assert!(job.ends_with("_mine"), "{job}");
    let details = client.wait(&job).await.unwrap();
    assert_eq!(u32::try_from(details["images"].try_clone().unwrap()), Ok(1));
    assert!(client.get::<bool>(&job, "Job", "ProgressValid").await);
    assert_eq!(client.get::<f64>(&job, "Job", "Progress").await, 1.0);
    let unknown = (dict([("formats", vec!["jpg".to_owned()].into())]),);
    let error = client.message(&job, "Job", "TakeResults", &unknown).await.unwrap_err().to_string();
    assert!(error.contains("option \"formats\": \"jpg\" is not raw, png or artefact"), "{error}");
    let files = client.results(&job).await.unwrap();
    let (raw, png) = (&files[0], &files[1]);
    let number = |info: &Dict, key: &str| u32::try_from(info[key].try_clone().unwrap()).unwrap();
    let (width, height) = (number(&raw.1, "width"), number(&raw.1, "height"));
    assert_eq!(number(&raw.1, "stride"), 3 * width);
    assert_eq!(raw.0.len() as u32, 3 * width * height);
    assert!(png.0.starts_with(b"\x89PNG"));
    let text = String::try_from(png.1["parameters"].try_clone().unwrap()).unwrap();
    assert!(text.starts_with("a dog\nSteps: 2, Sampler: dpmpp-2m"), "{text}");
    // Taken once, unless they are kept.
    assert_eq!(client.results(&job).await.unwrap().len(), 0);
    // The same request gives the same bytes, alone or as the second of two.
    assert_eq!(client.draw("/", small("a dog", 5)).await.unwrap(), raw.0);
    let two = dict([("prompt", "a dog".into()), ("steps", 2u32.into()), ("seed", 4u64.into()), ("count", 2u32.into())]);
    let options = dict([("formats", vec!["raw".to_owned()].into())]);
    let job = client.generate("/", two, options).await.unwrap();
    client.wait(&job).await.unwrap();
    assert_eq!(client.results(&job).await.unwrap()[1].0, raw.0);
    let wrong = dict([("prompt", "x".into()), ("width", 33u32.into())]);
    let error = client.generate("/", wrong, Dict::new()).await.unwrap_err();
    assert!(error.contains("width = 33: must be a multiple of"), "{error}");
    let huge = dict([("prompt", "x".into()), ("width", 16384u32.into()), ("height", 16384u32.into())]);
    let error = client.generate("/", huge, Dict::new()).await.unwrap_err();
    assert!(error.starts_with("NotSupported: "), "{error}");
    raw.0.clone()
}

async fn library_and_sets(client: &Client, plain: &[u8]) {
    let poodle = client.register("poodle").await;
    assert_eq!(client.register("poodle").await, poodle);
    let teddy = client.register("teddy").await;
    let count: u64 = client.call(ROOT, "Manager", "CountLibrary", &(Dict::new(),)).await.unwrap();
    assert_eq!(count, 2);
    let sorted = (dict([("sort", "name".into())]),);
    let error = client.call::<_, u64>(ROOT, "Manager", "CountLibrary", &sorted).await.unwrap_err();
    assert!(error.starts_with("InvalidOption: unknown option \"sort\""), "{error}");
    let page: Vec<Dict> =
        client.call(ROOT, "Manager", "QueryLibrary", &(dict([("text", "POOD".into())]), 0u32, 10u32)).await.unwrap();
    assert_eq!(page.len(), 1);
    assert_eq!(String::try_from(page[0]["name"].try_clone().unwrap()).unwrap(), "poodle");
    let digest: String = client.get(&poodle, "Adapter", "Digest").await;
    let opened: OwnedObjectPath =
        client.call(ROOT, "Manager", "OpenAdapter", &(&digest[..10], Dict::new())).await.unwrap();
    assert_eq!(opened.as_str(), poodle);
    let info: Dict = client.call(&poodle, "Adapter", "Inspect", &(Dict::new(),)).await.unwrap();
    assert!(String::try_from(info["manifest"].try_clone().unwrap()).unwrap().contains("\"poodle\""));
    for format in ["blocklora", "kohya", "diffusers", "peft"] {
        let files: Vec<(zbus::OwnedFd, Dict)> =
            client.call(&poodle, "Adapter", "Export", &(format, Dict::new())).await.unwrap();
        assert!(!common::read_fd(&files[0].0).is_empty(), "{format}");
    }
    let words = ("textual-inversion", Dict::new());
    let error = client.call::<_, Vec<(zbus::OwnedFd, Dict)>>(&poodle, "Adapter", "Export", &words).await.unwrap_err();
    assert!(error.contains("adapter \"poodle\"") && !error.contains(".safetensors"), "{error}");

    let set = client.compose(&[(&poodle, 1.0), (&teddy, 0.8)], Dict::new()).await.unwrap();
    let with = client.draw(&set, small("a <poodle> and a <teddy>", 5)).await.unwrap();
    assert_eq!(with.len(), plain.len());
    // Another set in between changes nothing, and neither does the one before it.
    assert_eq!(client.draw("/", small("a dog", 5)).await.unwrap(), plain);
    assert_eq!(client.draw(&set, small("a <poodle> and a <teddy>", 5)).await.unwrap(), with);
    // A request sees its own concepts only.
    let job = client.generate("/", small("a <poodle>", 5), Dict::new()).await.unwrap();
    let error = client.wait(&job).await.unwrap_err();
    assert!(error.starts_with("InvalidOption: ") && error.contains("no concept <poodle> is loaded"), "{error}");
    // The set as parameters of one job is the same set.
    let mut params = small("a <poodle> and a <teddy>", 5);
    params.extend(dict([("adapters", Variant::from(entries_of(&[(&teddy, 0.8), (&poodle, 1.0)])))]));
    assert_eq!(client.draw("/", params).await.unwrap(), with);

    let report: Dict = client.call(&set, "Composition", "Explain", &(Dict::new(),)).await.unwrap();
    assert_eq!(Vec::<String>::try_from(report["adapters"].try_clone().unwrap()).unwrap(), ["poodle", "teddy"]);
    // As the description says.
    for (key, signature) in [("pairs", "a(uuddt)"), ("norms", "ad"), ("sign_conflicts", "d"), ("clashes", "a(uus)")] {
        assert_eq!(Variant::value_signature(&report[key]).to_string(), signature, "{key}");
    }
    let swap = |generation: u64| (entries_of(&[(&poodle, 1.0)]), generation, Dict::new());
    let generation: u64 = client.call(&set, "Composition", "Swap", &swap(1)).await.unwrap();
    assert_eq!(generation, 2);
    let error = client.call::<_, u64>(&set, "Composition", "Swap", &swap(1)).await.unwrap_err();
    assert!(error.starts_with("GenerationConflict: "), "{error}");
    let weights = vec![(zbus::ObjectPath::try_from(poodle.clone()).unwrap(), 0.5f64)];
    let twice = ([weights.clone(), weights.clone()].concat(), Dict::new());
    let error = client.call::<_, u64>(&set, "Composition", "SetWeights", &twice).await.unwrap_err();
    assert!(error.starts_with("InvalidOption: ") && error.contains("is given twice"), "{error}");
    let generation: u64 = client.call(&set, "Composition", "SetWeights", &(weights, Dict::new())).await.unwrap();
    assert_eq!(generation, 3);
    strategies(client, &set, &poodle).await;
    client.call::<_, ()>(&set, "Composition", "Close", &()).await.unwrap();
    assert!(client.generate(&set, small("x", 1), Dict::new()).await.unwrap_err().starts_with("InvalidOption: target"));
    let parts = ("blocklora", entries_of(&[(&poodle, 1.0)]), Dict::new());
    let job: OwnedObjectPath = client.call(ROOT, "Manager", "Merge", &parts).await.unwrap();
    let details = client.wait(job.as_str()).await.unwrap();
    assert!(u64::try_from(details["rows_rewritten"].try_clone().unwrap()).unwrap() > 0);
    let job: OwnedObjectPath = client.call(ROOT, "Manager", "ValidateLibrary", &(Dict::new(),)).await.unwrap();
    let details = client.wait(job.as_str()).await.unwrap();
    assert_eq!(u64::try_from(details["checked"].try_clone().unwrap()), Ok(2));
}

/// What of a strategy a swap keeps: all of it, the strategy alone, or nothing.
async fn strategies(client: &Client, set: &str, adapter: &str) {
    let swap = async |options: Dict| {
        let body = (entries_of(&[(adapter, 1.0)]), client.get::<u64>(set, "Composition", "Generation").await, options);
        client.call::<_, u64>(set, "Composition", "Swap", &body).await
    };
    let config = |key: &str, value: f64| Variant::from(dict([(key, value.into())]));
    let strategy = async || client.get::<String>(set, "Composition", "Strategy").await;
    swap(dict([("strategy", "task-arithmetic".into()), ("strategy_config", config("lambda", 0.5))])).await.unwrap();
    assert_eq!(strategy().await, "task-arithmetic");
    let half = client.draw(set, small("a <poodle>", 5)).await.unwrap();
    swap(Dict::new()).await.unwrap();
    assert!(client.draw(set, small("a <poodle>", 5)).await.unwrap() == half, "the settings went");
    // Settings alone are the strategy's that is there.
    swap(dict([("strategy_config", config("lambda", 0.25))])).await.unwrap();
    assert_eq!(strategy().await, "task-arithmetic");
    let quarter = client.draw(set, small("a <poodle>", 5)).await.unwrap();
    assert!(quarter != half);
    let error = swap(dict([("strategy_config", config("clash", 1.0))])).await.unwrap_err();
    assert!(error.starts_with("InvalidOption: ") && error.contains("clash"), "{error}");
    // A strategy alone has its own defaults.
    swap(dict([("strategy", "task-arithmetic".into())])).await.unwrap();
    assert!(client.draw(set, small("a <poodle>", 5)).await.unwrap() != quarter);
    swap(dict([("strategy", "blocklora".into())])).await.unwrap();
}

async fn previews_and_cancelling(client: &Client) {
    let mut long = small("a dog", 1);
    long.insert("steps".to_owned(), OwnedVariant::from(500u32));
    let job = client.generate("/", long, Dict::new()).await.unwrap();
    let options = dict([("interval_usec", 0u64.into())]);
    let fd: zbus::OwnedFd = client.call(&job, "Job", "OpenPreviews", &(options,)).await.unwrap();
    let frame = tokio::task::spawn_blocking(move || {
        let mut buffer = vec![0; 1 << 18];
        let (n, _) = rustix::net::recv(&fd, &mut buffer[..], rustix::net::RecvFlags::empty()).unwrap();
        buffer.truncate(n);
        (buffer, fd)
    });
    let (frame, fd) = frame.await.unwrap();
    assert_eq!(&frame[..4], b"BLPV");
    assert!(frame[32..].starts_with(b"\x89PNG"));
    let error = client.results(&job).await.unwrap_err();
    assert!(error.starts_with("JobNotFinished: "), "{error}");
    client.call::<_, ()>(&job, "Job", "Cancel", &("", Dict::new())).await.unwrap();
    assert!(client.wait(&job).await.unwrap_err().starts_with("Cancelled: "));
    assert_eq!(client.get::<String>(&job, "Job", "State").await, "cancelled");
    let (done, steps) = <(u32, u32)>::try_from(
        zbus::Structure::try_from(client.get::<OwnedVariant>(&job, "Job", "Step").await).unwrap(),
    )
    .unwrap();
    assert!(done < steps && steps == 500, "{done} of {steps}");
    drop(fd);
}

async fn training_and_slots(client: &Client) {
    let partition = dict([("capacity", 16u32.into())]);
    let (lease, slot): (String, u32) =
        client.call(ROOT, "Manager", "LeaseSlot", &(partition, dict([("name", "rex".into())]))).await.unwrap();
    let job = train(client, "rex", 3, dict([("lease", lease.into())])).await.unwrap();
    let details = client.wait(&job).await.unwrap();
    assert_eq!(u32::try_from(details["slot"].try_clone().unwrap()), Ok(slot));
    let files = client.results(&job).await.unwrap();
    assert_eq!(files.len(), 1);
    let adapter = blocklora_spec::Adapter::from_bytes("rex", files[0].0.clone()).unwrap();
    assert_eq!(adapter.manifest().name, "rex");
    assert_eq!(adapter.manifest().partition.unwrap().slot, slot);
    let slots: Vec<Dict> = client.call(ROOT, "Manager", "ListSlots", &(Dict::new(), 0u32, 1000u32)).await.unwrap();
    let text = |d: &Dict, key: &str| String::try_from(d[key].try_clone().unwrap()).unwrap();
    let held: Vec<_> = slots.iter().filter(|s| text(s, "name") == "rex").collect();
    assert_eq!(held.len(), 1);
    assert_eq!(text(held[0], "holder"), "adapter");
    let error = train(client, "rex", 3, dict([("slot", slot.into())])).await.unwrap_err();
    assert!(error.starts_with("SlotConflict: ") && error.contains("the adapter \"rex\""), "{error}");
    let jobs: Vec<Dict> =
        client.call(ROOT, "Manager", "ListJobs", &(dict([("kind", "train".into())]), 0u32, 10u32)).await.unwrap();
    assert_eq!(text(&jobs[0], "state"), "done");
}

async fn baking(client: &Client) {
    let poodle = client.register("poodle").await;
    let set = client.compose(&[(&poodle, 1.0)], Dict::new()).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.tar");
    let out = std::fs::File::create(&path).unwrap();
    let body = (zbus::Fd::from(out.as_fd()), Dict::new());
    let job: OwnedObjectPath = client.call(&set, "Composition", "Bake", &body).await.unwrap();
    client.wait(job.as_str()).await.unwrap();
    assert!(Command::new("tar").arg("xf").arg(&path).arg("-C").arg(folder.path()).status().unwrap().success());
    let options = dict([("id", "baked".into())]);
    let model: OwnedObjectPath =
        client.call(ROOT, "Manager", "RegisterModel", &(folder.path().to_str().unwrap(), options)).await.unwrap();
    assert!(!client.draw(model.as_str(), small("a <poodle>", 5)).await.unwrap().is_empty());
    client.call::<_, ()>(model.as_str(), "Model", "Unload", &(Dict::new(),)).await.unwrap();
    client.call::<_, ()>(ROOT, "Manager", "ForgetModel", &("baked", Dict::new())).await.unwrap();
}

/// The structure of a description: everything but comments and white space.
fn structure(xml: &str) -> Vec<String> {
    let mut rest = xml;
    let mut plain = String::new();
    while let Some(start) = rest.find("<!--") {
        plain.push_str(&rest[..start]);
        rest = rest[start..].split_once("-->").unwrap().1;
    }
    plain.push_str(rest);
    let body = plain.split_once("<interface").unwrap().1.split("</interface>").next().unwrap().to_owned();
    body.lines().map(|line| line.trim().to_owned()).filter(|line| !line.is_empty()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_daemon_shows_the_committed_interfaces_and_keeps_them() {
    let daemon = Daemon::start();
    let client = daemon.client().await;
    let poodle = client.register("poodle").await;
    let set = client.compose(&[(&poodle, 1.0)], Dict::new()).await.unwrap();
    let job: OwnedObjectPath = client.call(ROOT, "Manager", "EmptyJob", &(Dict::new(),)).await.unwrap();
    client.wait(job.as_str()).await.unwrap();
    let plugin = format!("{ROOT}/plugin/{}", {
        let samplers: Vec<String> = client.get(ROOT, "Manager", "Samplers").await;
        format!("sample-{}", samplers[0])
            .bytes()
            .map(|b| if b.is_ascii_alphanumeric() { char::from(b).to_string() } else { format!("_{b:02x}") })
            .collect::<String>()
    });
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../sdk/client/interfaces");
    let model = format!("{ROOT}/model/starter");
    for (name, path) in [
        ("Manager", ROOT),
        ("Model", model.as_str()),
        ("Adapter", poodle.as_str()),
        ("Composition", set.as_str()),
        ("Job", job.as_str()),
        ("Plugin", plugin.as_str()),
    ] {
        let committed = std::fs::read_to_string(folder.join(format!("{NAME}.{name}.xml"))).unwrap();
        let live: String = client.call(path, "org.freedesktop.DBus.Introspectable", "Introspect", &()).await.unwrap();
        let shown = live.split(&format!("<interface name=\"{NAME}.{name}\"")).nth(1).unwrap();
        let shown = format!("<interface name=\"{NAME}.{name}\"{}", shown.split("</interface>").next().unwrap());
        assert_eq!(structure(&committed), structure(&shown), "{name}");
        // Every property is there, with the type that the description gives.
        let all: Dict = client.call(path, PROPERTIES, "GetAll", &(format!("{NAME}.{name}"),)).await.unwrap();
        let mut declared = BTreeMap::new();
        for line in structure(&committed).iter().filter(|line| line.starts_with("<property")) {
            let attribute =
                |key: &str| line.split_once(&format!("{key}=\"")).unwrap().1.split('"').next().unwrap().to_owned();
            declared.insert(attribute("name"), attribute("type"));
        }
        let shown: BTreeMap<String, String> =
            all.iter().map(|(key, value)| (key.clone(), Variant::value_signature(value).to_string())).collect();
        assert_eq!(declared, shown, "{name}");
        // Every method is known: called with nothing it fails by its arguments, or works.
        for line in structure(&committed).iter().filter(|line| line.starts_with("<method")) {
            let method = line.split_once("name=\"").unwrap().1.split('"').next().unwrap();
            if let Err(zbus::Error::MethodError(error, ..)) = client.message(path, name, method, &()).await {
                assert!(!error.as_str().contains("Unknown"), "{name}.{method}: {error}");
            }
        }
    }
}

#[test]
fn busctl_and_gdbus_work_on_the_socket() {
    let daemon = Daemon::start();
    let address = format!("unix:path={}", daemon.socket().display());
    let run = |program: &str, args: &[&str]| {
        let output = Command::new(program).args(args).output();
        let output = output.unwrap_or_else(|e| panic!("{program} is not installed: {e}"));
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
        text
    };
    let busctl = |args: &[&str]| run("busctl", &[&[format!("--address={address}").as_str()], args].concat());
    assert!(busctl(&["tree", NAME]).contains("/org/blocklora/Daemon1/model/starter"));
    assert!(busctl(&["introspect", NAME, ROOT]).contains(".Generate"));
    assert_eq!(busctl(&["get-property", NAME, ROOT, &format!("{NAME}.Manager"), "DefaultModel"]), "s \"starter\"\n");
    assert!(
        busctl(&["call", NAME, ROOT, &format!("{NAME}.Manager"), "EmptyJob", "a{sv}", "0"]).starts_with("o \"/org/")
    );
    let gdbus = |args: &[&str]| run("gdbus", args);
    let text = gdbus(&["introspect", "--address", &address, "--dest", NAME, "--object-path", ROOT]);
    assert!(text.contains("interface org.blocklora.Daemon1.Manager"), "{text}");
    let method = format!("{NAME}.Manager.CountLibrary");
    let text =
        gdbus(&["call", "--address", &address, "--dest", NAME, "--object-path", ROOT, "--method", &method, "{}"]);
    assert_eq!(text, "(uint64 0,)\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_private_daemon_lives_with_its_connection() {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let state = tempfile::tempdir().unwrap();
    let mut child = Command::new(common::blocklorad())
        .arg("--private")
        .env("STATE_DIRECTORY", state.path())
        .stdin(std::process::Stdio::from(std::os::fd::OwnedFd::from(theirs)))
        .spawn()
        .unwrap();
    ours.set_nonblocking(true).unwrap();
    let connection = zbus::connection::Builder::unix_stream(ours).p2p().build().await.unwrap();
    let client = Client { connection, bus: false };
    let pixels = client.draw("/", small("a dog", 5)).await.unwrap();
    assert!(!pixels.is_empty());
    client.connection.close().await.unwrap();
    let ended = tokio::task::spawn_blocking(move || child.wait().unwrap());
    assert!(tokio::time::timeout(common::PATIENCE, ended).await.unwrap().unwrap().success());
}

/// A process that is killed when dropped.
struct Process(RefCell<Child>);

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.borrow_mut().kill();
        let _ = self.0.borrow_mut().wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_of_the_configuration_is_named_whole() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("here.toml"), "[jobs]\nqueue_limit = 9\n").unwrap();
    let child = Command::new(common::blocklorad())
        .args(["--bus", "none", "--config", "here.toml", "--socket", "bus", "--state", "state"])
        .current_dir(dir.path())
        .spawn();
    let _daemon = Process(RefCell::new(child.unwrap()));
    let socket = dir.path().join("bus");
    until("the socket", || async { std::os::unix::net::UnixStream::connect(&socket).is_ok() }).await;
    let address = format!("unix:path={}", socket.display());
    let connection = zbus::connection::Builder::address(address.as_str()).p2p().build().await.unwrap();
    let client = Client { connection, bus: false };
    let files: Vec<String> = client.get(ROOT, "Manager", "ConfigFiles").await;
    assert_eq!(files, [dir.path().join("here.toml").display().to_string()]);
    client.call::<_, ()>(ROOT, "Manager", "Reload", &(Dict::new(),)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_finds_new_files_and_keeps_what_the_command_line_says() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("bus");
    let child = Command::new(common::blocklorad())
        .args(["--bus", "none", "--exit-when-idle", "2", "--socket"])
        .arg(&socket)
        .arg("--state")
        .arg(dir.path().join("state"))
        .env("XDG_CONFIG_HOME", dir.path())
        .spawn();
    let daemon = Process(RefCell::new(child.unwrap()));
    until("the socket", || async { std::os::unix::net::UnixStream::connect(&socket).is_ok() }).await;
    let address = format!("unix:path={}", socket.display());
    let connection = zbus::connection::Builder::address(address.as_str()).p2p().build().await.unwrap();
    let client = Client { connection, bus: false };
    // There was no file of the user's when it started.
    let file = dir.path().join("blocklora/blocklora.toml");
    std::fs::create_dir(file.parent().unwrap()).unwrap();
    std::fs::write(&file, "[jobs]\nqueue_limit = 9\n").unwrap();
    client.call::<_, ()>(ROOT, "Manager", "Reload", &(Dict::new(),)).await.unwrap();
    assert_eq!(client.get::<u32>(ROOT, "Manager", "QueueLimit").await, 9);
    let files: Vec<String> = client.get(ROOT, "Manager", "ConfigFiles").await;
    assert_eq!(files.last().map(String::as_str), file.to_str());
    // The file says nothing of when to end.
    client.connection.close().await.unwrap();
    until("the end", || async { daemon.0.borrow_mut().try_wait().unwrap().is_some() }).await;
}
