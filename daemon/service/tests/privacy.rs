//! What other users can see and do. Run by root only, who alone may become somebody else.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use common::{Bus, Client, Daemon, Dict, NAME, ROOT, dict, small, until};

/// Somebody who is neither root nor the daemon's user.
const OTHER: u32 = 65534;

/// Whether this user may become another.
fn is_root() -> bool {
    let is_root = rustix::process::geteuid().is_root();
    if !is_root {
        common::not_run("only root can become another user");
    }
    is_root
}

/// What busctl says as another user.
fn busctl(address: &str, args: &[&str]) -> Result<String, String> {
    let mut command = Command::new("busctl");
    let output = command.arg(format!("--address={address}")).args(args).uid(OTHER).gid(OTHER).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}

fn refused(result: Result<String, String>, action: &str) {
    let error = result.unwrap_err();
    assert!(error.contains(&format!("user {OTHER} may not do org.blocklora.Daemon1.{action}")), "{error}");
}

/// Another user who listens to all signals; what it hears is in the file.
struct Listener(Child);

impl Listener {
    fn start(bus: &Bus, file: &std::path::Path) -> Self {
        let mut command = Command::new("gdbus");
        command.args(["monitor", "--system", "--dest", NAME]).env("DBUS_SYSTEM_BUS_ADDRESS", &bus.address);
        command.stdout(File::create(file).unwrap()).stdin(Stdio::null()).uid(OTHER).gid(OTHER);
        Self(command.spawn().unwrap())
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn others_on_the_system_bus_get_no_adapters_and_no_texts() {
    if !is_root() {
        return;
    }
    let bus = Bus::start_with_system_limits();
    let daemon = Daemon::start_with(Some(&bus), "", &["--bus", "system"]);
    let client = Client::on_bus(&bus).await;
    let poodle = client.register("poodle").await;
    let heard = daemon.dir.path().join("heard");
    let _listener = Listener::start(&bus, &heard);
    let hears = |what: &str| std::fs::read_to_string(&heard).unwrap().contains(what);
    until("the listener", || async { hears("is owned by") }).await;
    let job = client.generate("/", small("a secret dog", 1), Dict::new()).await.unwrap();
    client.wait(&job).await.unwrap();
    let failed = client.generate("/", small("a <secret>", 1), Dict::new()).await.unwrap();
    assert!(client.wait(&failed).await.unwrap_err().contains("<secret>"));

    let (manager, adapter, of_job) = (format!("{NAME}.Manager"), format!("{NAME}.Adapter"), format!("{NAME}.Job"));
    let other = |args: &[&str]| busctl(&bus.address, args);
    refused(other(&["call", NAME, ROOT, &manager, "OpenAdapter", "sa{sv}", "poodle", "0"]), "generate");
    refused(other(&["call", NAME, ROOT, &manager, "EmptyJob", "a{sv}", "0"]), "generate");
    let set = client.compose(&[(&poodle, 1.0)], Dict::new()).await.unwrap();
    let of_set = format!("{NAME}.Composition");
    refused(other(&["call", NAME, &set, &of_set, "Explain", "a{sv}", "0"]), "generate");
    refused(other(&["call", NAME, &poodle, &adapter, "Inspect", "a{sv}", "0"]), "generate");
    refused(other(&["call", NAME, &poodle, &adapter, "Export", "sa{sv}", "blocklora", "0"]), "generate");
    refused(other(&["call", NAME, &poodle, &adapter, "Unregister", "a{sv}", "0"]), "manage-models");
    assert_eq!(other(&["get-property", NAME, &job, &of_job, "Description"]).unwrap(), "s \"\"\n");
    let error = other(&["get-property", NAME, &failed, &of_job, "Error"]).unwrap();
    assert!(error.contains("Error.InvalidOption\" \"\""), "{error}");
    let error = other(&["call", NAME, &failed, &of_job, "Wait"]).unwrap_err();
    assert!(error.contains("told to the job's user only"), "{error}");
    assert_eq!(other(&["call", NAME, &job, &of_job, "Wait"]).unwrap(), "sa{sv} \"done\" 0\n");
    let jobs = other(&["call", NAME, ROOT, &manager, "ListJobs", "a{sv}uu", "0", "0", "9"]).unwrap();
    let objects = other(&["call", NAME, ROOT, "org.freedesktop.DBus.ObjectManager", "GetManagedObjects"]).unwrap();
    for text in [jobs, objects] {
        assert!(text.contains(&job) && !text.contains("secret"), "{text}");
    }
    until("the end of the failed job", || async { hears(&format!("{failed}: org.blocklora.Daemon1.Job.Finished")) })
        .await;
    assert!(hears(&job) && !hears("secret"), "{}", std::fs::read_to_string(&heard).unwrap());

    // Its user is told.
    assert_eq!(client.get::<String>(&job, "Job", "Description").await, "a secret dog");
    let jobs: Vec<Dict> = client.call(ROOT, "Manager", "ListJobs", &(Dict::new(), 0u32, 9u32)).await.unwrap();
    let text = |info: &Dict, key: &str| String::try_from(info[key].try_clone().unwrap()).unwrap();
    assert_eq!(text(&jobs[1], "description"), "a secret dog");
    assert!(text(&jobs[0], "message").contains("<secret>"));
}

#[tokio::test(flavor = "multi_thread")]
async fn who_may_draw_may_not_say_how_long_a_model_stays() {
    if !is_root() {
        return;
    }
    let daemon = Daemon::start();
    // The owner opens the socket to others.
    for folder in ["", "run", "run/blocklora"] {
        let folder = daemon.dir.path().join(folder);
        std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    std::fs::set_permissions(daemon.socket(), std::fs::Permissions::from_mode(0o666)).unwrap();
    let address = format!("unix:path={}", daemon.socket().display());
    let load = ["call", NAME, ROOT, "org.blocklora.Daemon1.Manager", "LoadModel", "sa{sv}", "starter"];
    refused(busctl(&address, &[&load[..], &["1", "keep_alive_usec", "t", "5"]].concat()), "manage-models");
    assert!(busctl(&address, &[&load[..], &["1", "precision", "s", "f16"]].concat()).is_ok());
    // What it loaded is nothing to others.
    let client = daemon.client().await;
    let options = (dict([("prompt", "a dog".into()), ("steps", 1u32.into())]), Dict::new());
    let job = client.generate("/", options.0, options.1).await.unwrap();
    client.wait(&job).await.unwrap();
    assert_eq!(client.get::<String>(&format!("{ROOT}/model/starter"), "Model", "Precision").await, "f32");
}
