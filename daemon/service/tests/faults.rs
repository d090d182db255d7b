//! What goes wrong around the daemon, on the real process: each has a named error or a defined end, and the daemon lives.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

use common::raw::raw_connection;
use common::{Client, Daemon, Dict, NAME, ROOT, adapter_file, alive, dict, long, small, step_of, train, until};
use rustix::process::Signal;
use zbus::OwnedObjectPath;

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_dies_takes_its_jobs_with_it() {
    let mut daemon = Daemon::start();
    let client = daemon.client().await;
    let other = daemon.client().await;
    let running = other.generate("/", long(900), Dict::new()).await.unwrap();
    let waiting = other.generate("/", long(900), Dict::new()).await.unwrap();
    let kept = other.generate("/", small("a dog", 1), dict([("lifetime", "daemon".into())])).await.unwrap();
    until("the start", || async { client.get::<String>(&running, "Job", "State").await == "running" }).await;
    drop(other);
    for job in [&running, &waiting] {
        let error = client.wait(job).await.unwrap_err();
        assert!(error.starts_with("Cancelled: "), "{error}");
    }
    client.wait(&kept).await.unwrap();
    alive(&mut daemon, &client).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_files_are_refused_by_name() {
    let mut daemon = Daemon::start();
    let client = daemon.client().await;
    let register = async |fd: &std::os::fd::OwnedFd| {
        let body = (zbus::Fd::from(fd.as_fd()), Dict::new());
        client.call::<_, OwnedObjectPath>(ROOT, "Manager", "RegisterAdapter", &body).await.unwrap_err()
    };
    let folder = File::open("/").unwrap().into();
    let error = register(&folder).await;
    assert!(error.starts_with("InvalidOption: ") && error.contains("a directory"), "{error}");
    let (socket, _other) = UnixStream::pair().unwrap();
    assert!(register(&socket.into()).await.contains("a socket"));
    let (reader, _writer) = std::io::pipe().unwrap();
    assert!(register(&reader.into()).await.contains("a pipe"));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    std::fs::write(&path, b"not an adapter").unwrap();
    let error = register(&File::open(&path).unwrap().into()).await;
    assert!(error.starts_with("InvalidAdapter: "), "{error}");
    let write_only = File::options().write(true).open(&path).unwrap();
    assert!(register(&write_only.into()).await.starts_with("InvalidOption: "));
    // Cut short.
    let mut bytes = std::fs::read(adapter_file("poodle")).unwrap();
    bytes.truncate(bytes.len() / 2);
    std::fs::write(&path, &bytes).unwrap();
    let error = register(&File::open(&path).unwrap().into()).await;
    assert!(error.starts_with("InvalidAdapter: ") && error.contains("truncated"), "{error}");
    // A file that somebody cuts and restores all the while: an error or the whole file, never a dead daemon.
    let whole = std::fs::read(adapter_file("poodle")).unwrap();
    std::fs::write(&path, &whole).unwrap();
    let changing = path.clone();
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let stopped = stop.clone();
    let changer = std::thread::spawn(move || {
        while !stopped.load(std::sync::atomic::Ordering::Relaxed) {
            File::options().write(true).open(&changing).unwrap().set_len(1000).unwrap();
            std::fs::write(&changing, &whole).unwrap();
        }
    });
    for _ in 0..30 {
        let file = File::open(&path).unwrap();
        let body = (zbus::Fd::from(file.as_fd()), Dict::new());
        if let Err(error) = client.call::<_, OwnedObjectPath>(ROOT, "Manager", "RegisterAdapter", &body).await {
            assert!(error.starts_with("InvalidAdapter: ") || error.starts_with("InvalidOption: "), "{error}");
        }
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    changer.join().unwrap();
    // Pictures that are none.
    std::fs::write(&path, b"no picture").unwrap();
    let file = File::open(&path).unwrap();
    let options = dict([("name", "x".into()), ("class_word", "dog".into())]);
    let body = ("blocklora", Dict::new(), vec![zbus::Fd::from(file.as_fd())], options);
    let error = client.call::<_, OwnedObjectPath>(ROOT, "Manager", "Train", &body).await.unwrap_err();
    assert!(error.starts_with("InvalidOption: data[0]: "), "{error}");
    alive(&mut daemon, &client).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_library_is_reported() {
    let mut daemon = Daemon::start();
    let client = daemon.client().await;
    let (poodle, teddy) = (client.register("poodle").await, client.register("teddy").await);
    let file =
        |path: &str| daemon.state().join("adapters").join(format!("{}.safetensors", path.rsplit('/').next().unwrap()));
    std::fs::remove_file(file(&poodle)).unwrap();
    let mut bytes = std::fs::read(file(&teddy)).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    // In a new file, as a bad copy would be: the old one may be mapped.
    std::fs::remove_file(file(&teddy)).unwrap();
    std::fs::write(file(&teddy), bytes).unwrap();
    for (adapter, expected) in [(&poodle, "AdapterNotFound: "), (&teddy, "InvalidAdapter: ")] {
        let error = client.compose(&[(adapter, 1.0)], Dict::new()).await.unwrap_err();
        assert!(error.starts_with(expected), "{error}");
    }
    for state in ["missing", "corrupt"] {
        let filter = dict([("state", state.into())]);
        let count: u64 = client.call(ROOT, "Manager", "CountLibrary", &(filter,)).await.unwrap();
        assert_eq!(count, 1, "{state}");
    }
    // Registering it again mends it.
    client.register("poodle").await;
    client.compose(&[(&poodle, 1.0)], Dict::new()).await.unwrap();
    alive(&mut daemon, &client).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_says_so() {
    let config = "[jobs]\nqueue_limit = 4\nqueue_limit_per_client = 3\n";
    let mut daemon = Daemon::start_with(None, config, &[]);
    let client = daemon.client().await;
    let other = daemon.client().await;
    let running = client.generate("/", long(900), Dict::new()).await.unwrap();
    until("the start", || async { client.get::<String>(&running, "Job", "State").await == "running" }).await;
    let mut jobs = Vec::new();
    for _ in 0..3 {
        jobs.push(client.generate("/", small("x", 1), Dict::new()).await.unwrap());
    }
    let error = client.generate("/", small("x", 1), Dict::new()).await.unwrap_err();
    assert!(error.starts_with("QueueFull: 3 jobs of this client"), "{error}");
    jobs.push(other.generate("/", small("x", 1), Dict::new()).await.unwrap());
    let error = other.generate("/", small("x", 1), Dict::new()).await.unwrap_err();
    assert!(error.starts_with("QueueFull: 4 jobs are waiting"), "{error}");
    assert!(client.get::<u32>(&jobs[3], "Job", "QueuePosition").await > 0);
    client.call::<_, ()>(&running, "Job", "Cancel", &("", Dict::new())).await.unwrap();
    for job in &jobs {
        client.wait(job).await.unwrap();
    }
    alive(&mut daemon, &client).await;
}

/// Numbers that look random and are the same in every run.
struct Noise(u32);

impl Noise {
    fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        self.0 >> 8
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_and_giants_end_one_connection_only() {
    let mut daemon = Daemon::start();
    let client = daemon.client().await;
    // Not D-Bus at all.
    let mut noise = Noise(1);
    for _ in 0..20 {
        let mut stream = UnixStream::connect(daemon.socket()).unwrap();
        let bytes: Vec<u8> = (0..4096).map(|_| noise.next() as u8).collect();
        // The daemon may be faster in closing it.
        let _ = stream.write_all(&bytes);
    }
    // D-Bus at first: then a message that claims 1 GB, and one that is noise.
    for tail in [&[b'l', 1, 0, 1, 0, 0, 0, 0x40, 1, 0, 0, 0, 0, 0, 0, 0][..], &[0xff; 64][..]] {
        let mut stream = raw_connection(&daemon);
        stream.write_all(tail).unwrap();
        // The end of the connection, not silence.
        assert!(matches!(stream.read(&mut [0; 256]), Ok(0) | Err(_)));
    }
    // Files that claim to be large cost their claim nothing.
    let dir = tempfile::tempdir().unwrap();
    let file = File::options().read(true).write(true).create_new(true).open(dir.path().join("hole")).unwrap();
    file.set_len(5 << 30).unwrap();
    let body = (zbus::Fd::from(file.as_fd()), Dict::new());
    let error = client.call::<_, OwnedObjectPath>(ROOT, "Manager", "RegisterAdapter", &body).await.unwrap_err();
    assert!(error.starts_with("InvalidOption: ") && error.contains("5368709120 bytes, at most"), "{error}");
    let options = dict([("name", "x".into()), ("class_word", "dog".into())]);
    let body = ("blocklora", Dict::new(), vec![zbus::Fd::from(file.as_fd())], options);
    let error = client.call::<_, OwnedObjectPath>(ROOT, "Manager", "Train", &body).await.unwrap_err();
    assert!(error.starts_with("InvalidOption: data[0]: "), "{error}");
    let error = client.draw("/", small(&"x ".repeat(4 << 20), 1)).await.unwrap_err();
    assert!(error.starts_with("InvalidOption: prompt: 8388608 bytes, at most 65536"), "{error}");
    let before = daemon.memory();
    assert!(before < 2 << 30, "{before}");
    alive(&mut daemon, &client).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn changed_messages_and_missing_files_end_one_connection_at_most() {
    let mut daemon = Daemon::start();
    let client = daemon.client().await;
    let call = |member: &str, built: &dyn Fn(zbus::message::Builder<'_>) -> zbus::Message| {
        let builder = zbus::Message::method_call(ROOT, member.to_owned());
        built(builder.interface(format!("{NAME}.Manager")))
    };
    let file = File::open(adapter_file("poodle")).unwrap();
    let register = call("RegisterAdapter", &|b| b.build(&(zbus::Fd::from(file.as_fd()), Dict::new())).unwrap());
    let query = call("QueryLibrary", &|b| b.build(&(dict([("text", "dog".into())]), 0u32, 10u32)).unwrap());
    // The message says that a file comes with it, and none comes: as with one that was closed.
    let mut stream = raw_connection(&daemon);
    stream.write_all(register.data().bytes()).unwrap();
    let mut answer = [0; 4096];
    let n = stream.read(&mut answer).unwrap_or(0);
    assert!(n == 0 || answer[1] == 3, "neither an error nor the end: {:?}", &answer[..n]);
    // Two messages of which a hundred times one byte is another.
    let mut noise = Noise(2);
    for round in 0..100 {
        let mut bytes = if round % 2 == 0 { register.data().bytes().to_vec() } else { query.data().bytes().to_vec() };
        let at = noise.next() as usize % bytes.len();
        bytes[at] ^= 1 << (noise.next() % 8);
        let mut stream = raw_connection(&daemon);
        // The daemon may be faster in closing it.
        let _ = stream.write_all(&bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        // An answer, an error or the end: all that counts is that it does not take the others with it.
        let _ = stream.read(&mut answer);
    }
    assert_eq!(client.call::<_, u64>(ROOT, "Manager", "CountLibrary", &(Dict::new(),)).await, Ok(0));
    alive(&mut daemon, &client).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_malformed_calls_are_refused() {
    let mut daemon = Daemon::start();
    let client = daemon.client().await;
    let paths = [ROOT, "/", "/org", "/nothing/here", "/org/blocklora/Daemon1/job/none"];
    let interfaces = ["Manager", "Job", "org.freedesktop.DBus.Properties", "org.example.Nothing"];
    let members = ["Generate", "Wait", "Get", "Nothing", "Introspect"];
    let mut refused = 0;
    for path in paths {
        for interface in interfaces {
            for member in members {
                let result = client.call::<_, ()>(path, interface, member, &(1u8, "x", vec![1.5f64])).await;
                let error = result.unwrap_err();
                assert!(error.starts_with("org.freedesktop.DBus.Error."), "{path} {interface}.{member}: {error}");
                refused += 1;
            }
        }
    }
    assert_eq!(refused, 100);
    alive(&mut daemon, &client).await;
}

#[test]
fn a_second_daemon_is_refused() {
    let daemon = Daemon::start();
    let start = |state: &std::path::Path, run: &std::path::Path, socket: Option<&str>| {
        let mut command = Command::new(common::blocklorad());
        command.args(["--bus", "none", "--state"]).arg(state).env("XDG_RUNTIME_DIR", run);
        command.args(socket.map(|socket| format!("--socket={socket}")));
        let output = command.stdin(Stdio::null()).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stderr).unwrap()
    };
    let other = tempfile::tempdir().unwrap();
    let text = start(&daemon.state(), other.path(), None);
    assert!(text.contains("another blocklorad uses this state folder"), "{text}");
    let text = start(other.path(), &daemon.dir.path().join("run"), None);
    assert!(text.contains("another blocklorad uses this device"), "{text}");
    // A socket of somebody else, and something that is no socket.
    let path = other.path().join("taken");
    let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let text = start(other.path(), other.path(), path.to_str());
    assert!(text.contains("somebody listens on this socket already"), "{text}");
    let path = other.path().join("file");
    std::fs::write(&path, "mine").unwrap();
    let text = start(other.path(), other.path(), path.to_str());
    assert!(text.contains("something that is not a socket is there"), "{text}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "mine");
}

#[test]
fn a_wrong_configuration_is_an_error_with_its_line() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.toml");
    std::fs::write(&path, "[jobs]\nqueue_limit = 5\nqueue_lmit = 6\n").unwrap();
    let output = Command::new(common::blocklorad()).arg("--config").arg(&path).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains(&format!("{}: line 3: unknown field `queue_lmit`", path.display())), "{text}");
    assert_eq!(text.lines().count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_is_named_with_its_reason_and_one_that_is_missing_ends_the_daemon() {
    let mut daemon = Daemon::start_with(None, "[models]\ndevice = \"cpu\"\n", &[]);
    let client = daemon.client().await;
    let devices: Vec<Dict> = client.get(ROOT, "Manager", "Devices").await;
    let text = |key: &str| String::try_from(devices[0][key].try_clone().unwrap()).unwrap();
    assert_eq!((text("id").as_str(), text("state").as_str()), ("cpu", "ready"));
    assert_eq!(text("reason"), "it was asked for");
    assert!(daemon.log().contains("device cpu: it was asked for"), "{}", daemon.log());
    alive(&mut daemon, &client).await;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.toml");
    std::fs::write(&path, "[models]\ndevice = \"cuda:77\"\n").unwrap();
    let mut command = Command::new(common::blocklorad());
    command.args(["--bus", "none", "--config"]).arg(&path).arg("--state").arg(dir.path());
    let output = command.env("XDG_RUNTIME_DIR", dir.path()).stdin(Stdio::null()).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("models.device: ") && text.contains("cuda:77"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn sighup_reads_the_configuration_again() {
    let mut daemon = Daemon::start_with(None, "[jobs]\nqueue_limit = 5\n", &[]);
    let client = daemon.client().await;
    let path = daemon.dir.path().join("blocklora.toml");
    std::fs::write(&path, "[jobs]\nqueue_limit = 9\n").unwrap();
    daemon.signal(Signal::HUP);
    until("the new limit", || async { client.get::<u32>(ROOT, "Manager", "QueueLimit").await == 9 }).await;
    std::fs::write(&path, "[jobs]\nqueue_limit = \"x\"\n").unwrap();
    let error = client.call::<_, ()>(ROOT, "Manager", "Reload", &(Dict::new(),)).await.unwrap_err();
    assert!(error.starts_with("InvalidOption: ") && error.contains("line 2"), "{error}");
    assert_eq!(client.get::<u32>(ROOT, "Manager", "QueueLimit").await, 9);
    alive(&mut daemon, &client).await;
}

/// A process of another user that cancels a job: run by root only, who alone may become somebody else.
#[tokio::test(flavor = "multi_thread")]
async fn another_user_may_not_cancel_a_job() {
    if !rustix::process::geteuid().is_root() {
        common::not_run("only root can become another user");
        return;
    }
    let mut daemon = Daemon::start();
    let client = daemon.client().await;
    let job = client.generate("/", long(900), Dict::new()).await.unwrap();
    // The owner opens the socket to others.
    use std::os::unix::fs::PermissionsExt;
    for path in [daemon.dir.path().to_owned(), daemon.dir.path().join("run"), daemon.dir.path().join("run/blocklora")] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    std::fs::set_permissions(daemon.socket(), std::fs::Permissions::from_mode(0o666)).unwrap();
    use std::os::unix::process::CommandExt;
    let output = Command::new("busctl")
        .arg(format!("--address=unix:path={}", daemon.socket().display()))
        .args(["call", NAME, &job, &format!("{NAME}.Job"), "Cancel", "sa{sv}", "", "0"])
        .uid(65534)
        .gid(65534)
        .output()
        .unwrap();
    assert!(!output.status.success());
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("user 65534 may not do org.blocklora.Daemon1.manage-other-jobs"), "{text}");
    assert_ne!(client.get::<String>(&job, "Job", "State").await, "cancelled");
    client.call::<_, ()>(&job, "Job", "Cancel", &("", Dict::new())).await.unwrap();
    alive(&mut daemon, &client).await;
}

/// A file system of its own.
struct Mounted(std::path::PathBuf);

impl Mounted {
    /// In memory, on `folder`; None where this user may not.
    fn new(folder: &std::path::Path, size: &str) -> Option<Self> {
        let options = format!("size={size}");
        mount(folder, &["-t", "tmpfs", "-o", &options, "tmpfs"]).then(|| Self(folder.to_owned()))
    }

    /// Writes until nothing more fits; the file to remove.
    fn fill(&self) -> std::path::PathBuf {
        let filler = self.0.join("filler");
        let mut file = File::create(&filler).unwrap();
        while file.write_all(&[0; 4096]).is_ok() {}
        while file.write_all(&[0]).is_ok() {}
        filler
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

fn mount(folder: &std::path::Path, args: &[&str]) -> bool {
    Command::new("mount").args(args).arg(folder).status().is_ok_and(|s| s.success())
}

/// A daemon whose state is on a file system of its own; None where that cannot be mounted, for which root is needed.
fn on_a_small_disk(size: &str) -> Option<(Daemon, Mounted)> {
    let mut daemon = Daemon::start();
    daemon.kill();
    let state = daemon.state();
    std::fs::remove_dir_all(&state).unwrap();
    std::fs::create_dir(&state).unwrap();
    let Some(mounted) = Mounted::new(&state, size) else {
        common::not_run("a file system of its own cannot be mounted");
        return None;
    };
    daemon.restart();
    Some((daemon, mounted))
}

async fn register_error(client: &Client) -> String {
    let file = File::open(adapter_file("poodle")).unwrap();
    let body = (zbus::Fd::from(file.as_fd()), Dict::new());
    client.call::<_, OwnedObjectPath>(ROOT, "Manager", "RegisterAdapter", &body).await.unwrap_err()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_and_a_read_only_disk_are_named() {
    let Some((mut daemon, mounted)) = on_a_small_disk("1m") else { return };
    let (client, state) = (daemon.client().await, daemon.state());
    let filler = mounted.fill();
    let error = register_error(&client).await;
    assert!(error.starts_with("StorageFull: "), "{error}");
    let error = train(&client, "rex", 2, Dict::new()).await.unwrap_err();
    assert!(error.starts_with("StorageFull: "), "{error}");
    // What is only in memory still works.
    assert!(!client.draw("/", small("a dog", 5)).await.unwrap().is_empty());
    std::fs::remove_file(&filler).unwrap();
    assert_eq!(std::fs::read_dir(state.join("adapters")).unwrap().count(), 0);
    // A daemon that starts on a read-only one serves, and says what it cannot do.
    daemon.kill();
    assert!(mount(&state, &["-o", "remount,ro"]));
    daemon.restart();
    let client = daemon.client().await;
    let error = register_error(&client).await;
    assert!(error.starts_with("StorageReadOnly: "), "{error}");
    let error = train(&client, "rex", 2, Dict::new()).await.unwrap_err();
    assert!(error.starts_with("StorageReadOnly: "), "{error}");
    assert!(!client.draw("/", small("a dog", 5)).await.unwrap().is_empty());
    assert!(daemon.log().contains("nothing will be remembered"), "{}", daemon.log());
    alive(&mut daemon, &client).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_starts_on_a_full_disk_promises_nothing_and_goes_on_when_there_is_room() {
    let Some((mut daemon, mounted)) = on_a_small_disk("8m") else { return };
    let client = daemon.client().await;
    let job = train(&client, "rex", 100_000, Dict::new()).await.unwrap();
    until("a step", || async { step_of(&client, &job).await.0 >= 1 }).await;
    daemon.kill();
    let filler = mounted.fill();
    daemon.restart();
    let client = daemon.client().await;
    let error = register_error(&client).await;
    assert!(error.starts_with("StorageFull: ") && error.contains("nothing is remembered"), "{error}");
    let error = train(&client, "max", 2, Dict::new()).await.unwrap_err();
    assert!(error.starts_with("StorageFull: "), "{error}");
    let lease =
        async || client.call::<_, (String, u32)>(ROOT, "Manager", "LeaseSlot", &(Dict::new(), Dict::new())).await;
    assert!(lease().await.unwrap_err().starts_with("StorageFull: "));
    let model = common::starter().join("model").display().to_string();
    let body = (model.as_str(), dict([("id", "other".into())]));
    let error = client.call::<_, OwnedObjectPath>(ROOT, "Manager", "RegisterModel", &body).await.unwrap_err();
    assert!(error.starts_with("StorageFull: "), "{error}");
    assert!(!client.draw("/", small("a dog", 5)).await.unwrap().is_empty());
    // With room again nothing has to be restarted, and what waited there goes on.
    std::fs::remove_file(&filler).unwrap();
    until("a lease", || async { lease().await.is_ok() }).await;
    until("the training", || async { step_of(&client, &job).await.0 >= 1 }).await;
    daemon.restart();
    let client = daemon.client().await;
    let slots: Vec<Dict> = client.call(ROOT, "Manager", "ListSlots", &(Dict::new(), 0u32, 9u32)).await.unwrap();
    assert_eq!(slots.len(), 2, "the training's, and the one that was leased");
    alive(&mut daemon, &client).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_fills_up_in_the_middle_ends_what_writes_and_nothing_else() {
    let Some((mut daemon, mounted)) = on_a_small_disk("8m") else { return };
    let (client, state) = (daemon.client().await, daemon.state());
    let poodle = client.register("poodle").await;
    let set = client.compose(&[(&poodle, 1.0)], Dict::new()).await.unwrap();
    let job = train(&client, "rex", 100_000, Dict::new()).await.unwrap();
    until("a step", || async { step_of(&client, &job).await.0 >= 1 }).await;
    let filler = mounted.fill();
    // The next checkpoint finds no room.
    let error = client.wait(&job).await.unwrap_err();
    assert!(error.starts_with("StorageFull: "), "{error}");
    // A model is written beside the library before it goes to the client.
    let (_reader, writer) = std::io::pipe().unwrap();
    let body = (zbus::Fd::from(writer.as_fd()), Dict::new());
    let job: OwnedObjectPath = client.call(&set, "Composition", "Bake", &body).await.unwrap();
    let error = client.wait(job.as_str()).await.unwrap_err();
    assert!(error.starts_with("StorageFull: "), "{error}");
    let error = client.call::<_, (String, u32)>(ROOT, "Manager", "LeaseSlot", &(Dict::new(), Dict::new())).await;
    assert!(error.as_ref().is_err_and(|error| error.starts_with("StorageFull: ")), "{error:?}");
    assert!(!client.draw(&set, small("a <poodle>", 5)).await.unwrap().is_empty());
    // With room again everything works again, at once, and nothing of the failed work is left.
    std::fs::remove_file(&filler).unwrap();
    client.register("teddy").await;
    let job = train(&client, "rex", 2, Dict::new()).await.unwrap();
    client.wait(&job).await.unwrap();
    assert_eq!(std::fs::read_dir(state.join("jobs")).unwrap().count(), 0);
    assert_eq!(std::fs::read_dir(state.join("tmp")).into_iter().flatten().count(), 0);
    assert_eq!(std::fs::read_dir(state.join("adapters")).unwrap().count(), 3);
    alive(&mut daemon, &client).await;
}
