//! What goes wrong around the daemon, on the real process: each has a named error or a defined end, and the daemon lives.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::{Client, Daemon, Dict, NAME, PATIENCE, ROOT, adapter_file, dict, small, train, until};
use rustix::process::Signal;
use zbus::{OwnedObjectPath, OwnedVariant};

async fn alive(daemon: &mut Daemon, client: &Client) {
    let job: OwnedObjectPath = client.call(ROOT, "Manager", "EmptyJob", &(Dict::new(),)).await.unwrap();
    client.wait(job.as_str()).await.unwrap();
    assert!(daemon.lives());
}

fn long(steps: u32) -> Dict {
    let mut params = small("a dog", 1);
    params.insert("steps".to_owned(), OwnedVariant::from(steps));
    params
}

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
async fn a_training_goes_on_after_kill_9_and_gives_the_same_file() {
    let mut daemon = Daemon::start();
    let client = daemon.client().await;
    let options = || dict([("slot", 1u32.into())]);
    let job = train(&client, "rex", 8, options()).await.unwrap();
    // The checkpoint of step 2 or 4 is there, and the run is not over.
    until("step 3", || async { step_of(&client, &job).await.0 >= 3 }).await;
    daemon.kill();
    daemon.restart();
    let client = daemon.client().await;
    let details = client.wait(&job).await.unwrap();
    assert!(u32::try_from(details["resumed_at"].try_clone().unwrap()).unwrap() >= 2, "{}", daemon.log());
    let resumed = client.results(&job).await.unwrap().remove(0).0;
    // The same training without a break.
    let fresh = Daemon::start();
    let client = fresh.client().await;
    let job = train(&client, "rex", 8, options()).await.unwrap();
    client.wait(&job).await.unwrap();
    assert_eq!(client.results(&job).await.unwrap().remove(0).0, resumed);
    // Nothing but the adapter is left.
    assert_eq!(std::fs::read_dir(daemon.state().join("jobs")).unwrap().count(), 0);
}

async fn step_of(client: &Client, job: &str) -> (u32, u32) {
    let value = client.get::<OwnedVariant>(job, "Job", "Step").await;
    zbus::Structure::try_from(value).unwrap().try_into().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_saves_a_training_and_the_next_daemon_goes_on() {
    let mut daemon = Daemon::start();
    let client = daemon.client().await;
    let job = train(&client, "rex", 200, Dict::new()).await.unwrap();
    until("a step", || async { step_of(&client, &job).await.0 >= 1 }).await;
    let since = Instant::now();
    daemon.signal(Signal::TERM);
    // Pending calls are answered.
    let error = client.wait(&job).await.unwrap_err();
    assert!(error.starts_with("ShuttingDown: ") || error.contains("I/O error"), "{error}");
    assert!(daemon.child.wait().unwrap().success());
    assert!(since.elapsed() < Duration::from_secs(30), "{:?}", since.elapsed());
    daemon.restart();
    let client = daemon.client().await;
    until("the training", || async { step_of(&client, &job).await.0 >= 1 }).await;
    client.call::<_, ()>(&job, "Job", "Cancel", &("discard", Dict::new())).await.unwrap();
    assert!(client.wait(&job).await.unwrap_err().starts_with("Cancelled: "));
    alive(&mut daemon, &client).await;
    // Cancelled for good: the next daemon does not begin it again, and its slot is free.
    daemon.restart();
    let client = daemon.client().await;
    let slots: Vec<Dict> = client.call(ROOT, "Manager", "ListSlots", &(Dict::new(),)).await.unwrap();
    assert!(slots.is_empty());
    let active: Vec<Dict> =
        client.call(ROOT, "Manager", "ListJobs", &(dict([("active", true.into())]), 0u32, 9u32)).await.unwrap();
    assert!(active.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn kill_9_while_importing_and_merging_leaves_nothing_half_done() {
    let mut daemon = Daemon::start();
    let names = ["poodle", "teddy", "zombie", "black_cat"];
    for round in 0..3u64 {
        let client = daemon.client().await;
        let working = client.clone();
        let work = tokio::spawn(async move {
            loop {
                for name in names {
                    let file = File::open(adapter_file(name)).unwrap();
                    let body = (zbus::Fd::from(file.as_fd()), Dict::new());
                    let Ok(path) = working.call::<_, OwnedObjectPath>(ROOT, "Manager", "RegisterAdapter", &body).await
                    else {
                        return;
                    };
                    let parts = ("blocklora", common::entries_of(&[(path.as_str(), 1.0)]), Dict::new());
                    let Ok(job) = working.call::<_, OwnedObjectPath>(ROOT, "Manager", "Merge", &parts).await else {
                        return;
                    };
                    if working.wait(job.as_str()).await.is_err() {
                        return;
                    }
                    let options = Dict::new();
                    let removed = dict([("remove", true.into())]);
                    if working.call::<_, ()>(path.as_str(), "Adapter", "Unregister", &(removed,)).await.is_err() {
                        return;
                    }
                    drop(options);
                }
            }
        });
        tokio::time::sleep(Duration::from_millis(400 + 137 * round)).await;
        daemon.kill();
        work.await.unwrap();
        daemon.restart();
        let client = daemon.client().await;
        let job: OwnedObjectPath = client.call(ROOT, "Manager", "ValidateLibrary", &(Dict::new(),)).await.unwrap();
        let details = client.wait(job.as_str()).await.unwrap();
        let checked = u64::try_from(details["checked"].try_clone().unwrap()).unwrap();
        let problems = <&zbus::Array>::try_from(&details["problems"]).unwrap();
        assert!(problems.is_empty(), "{problems:?}");
        let files: Vec<String> = std::fs::read_dir(daemon.state().join("adapters"))
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        assert_eq!(files.len() as u64, checked, "{files:?}");
    }
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
    until("the positions", || async { client.get::<u32>(&jobs[3], "Job", "QueuePosition").await > 0 }).await;
    client.call::<_, ()>(&running, "Job", "Cancel", &("", Dict::new())).await.unwrap();
    for job in &jobs {
        client.wait(job).await.unwrap();
    }
    alive(&mut daemon, &client).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_and_giants_end_one_connection_only() {
    let mut daemon = Daemon::start();
    let client = daemon.client().await;
    // Not D-Bus at all.
    let mut noise: u32 = 1;
    for _ in 0..20 {
        let mut stream = UnixStream::connect(daemon.socket()).unwrap();
        let bytes: Vec<u8> = (0..4096)
            .map(|_| {
                noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (noise >> 24) as u8
            })
            .collect();
        // The daemon may be faster in closing it.
        let _ = stream.write_all(&bytes);
    }
    // D-Bus at first: then a message that claims 1 GB, and one that is noise.
    for tail in [&[b'l', 1, 0, 1, 0, 0, 0, 0x40, 1, 0, 0, 0, 0, 0, 0, 0][..], &[0xff; 64][..]] {
        let mut stream = UnixStream::connect(daemon.socket()).unwrap();
        let uid: String = rustix::process::getuid().as_raw().to_string().bytes().map(|b| format!("{b:02x}")).collect();
        stream.write_all(format!("\0AUTH EXTERNAL {uid}\r\n").as_bytes()).unwrap();
        let mut line = [0; 256];
        let n = stream.read(&mut line).unwrap();
        assert!(line[..n].starts_with(b"OK "));
        stream.write_all(b"BEGIN\r\n").unwrap();
        stream.write_all(tail).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        // The end of the connection, not silence.
        assert!(matches!(stream.read(&mut line), Ok(0) | Err(_)));
    }
    let before = daemon.memory();
    assert!(before < 2 << 30, "{before}");
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
        println!("only root can become another user: not run");
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

/// A state folder on a file system that is full, then read-only: a tmpfs of its own, for which root is needed.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_and_a_read_only_disk_are_named() {
    let mut daemon = Daemon::start();
    daemon.kill();
    let state = daemon.state();
    std::fs::remove_dir_all(&state).unwrap();
    std::fs::create_dir(&state).unwrap();
    let mount = |args: &[&str]| Command::new("mount").args(args).arg(&state).status().is_ok_and(|s| s.success());
    if !mount(&["-t", "tmpfs", "-o", "size=1m", "tmpfs"]) {
        println!("a file system of its own cannot be mounted here: not run");
        return;
    }
    struct Mounted(std::path::PathBuf);
    impl Drop for Mounted {
        fn drop(&mut self) {
            let _ = Command::new("umount").arg("-l").arg(&self.0).status();
        }
    }
    let _mounted = Mounted(state.clone());
    daemon.restart();
    let client = daemon.client().await;
    let filler = state.join("filler");
    let mut file = File::create(&filler).unwrap();
    while file.write_all(&[0; 4096]).is_ok() {}
    drop(file);
    let register = async |client: &Client| {
        let file = File::open(adapter_file("poodle")).unwrap();
        let body = (zbus::Fd::from(file.as_fd()), Dict::new());
        client.call::<_, OwnedObjectPath>(ROOT, "Manager", "RegisterAdapter", &body).await.unwrap_err()
    };
    let error = register(&client).await;
    assert!(error.starts_with("StorageFull: "), "{error}");
    let error = train(&client, "rex", 2, Dict::new()).await.unwrap_err();
    assert!(error.starts_with("StorageFull: "), "{error}");
    // What is only in memory still works.
    assert!(!client.draw("/", small("a dog", 5)).await.unwrap().is_empty());
    std::fs::remove_file(&filler).unwrap();
    assert_eq!(std::fs::read_dir(state.join("adapters")).unwrap().count(), 0);
    // A daemon that starts on a read-only one serves, and says what it cannot do.
    daemon.kill();
    assert!(mount(&["-o", "remount,ro"]));
    daemon.restart();
    let client = daemon.client().await;
    let error = register(&client).await;
    assert!(error.starts_with("StorageReadOnly: "), "{error}");
    let error = train(&client, "rex", 2, Dict::new()).await.unwrap_err();
    assert!(error.starts_with("StorageReadOnly: "), "{error}");
    assert!(!client.draw("/", small("a dog", 5)).await.unwrap().is_empty());
    assert!(daemon.log().contains("nothing will be remembered"), "{}", daemon.log());
    alive(&mut daemon, &client).await;
}
