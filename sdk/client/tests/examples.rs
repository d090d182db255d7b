//! The examples in sdk/client/examples, run against the real daemon on bus and socket.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::{Home, program, root};

fn example(name: &str) -> PathBuf {
    root().join("sdk/client/examples").join(name)
}

/// Runs a command, which must succeed; its stdout.
#[track_caller]
fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {stderr}");
    String::from_utf8(output.stdout).unwrap()
}

fn is_png(path: &Path) -> bool {
    std::fs::read(path).is_ok_and(|bytes| bytes.starts_with(b"\x89PNG"))
}

/// Runs `test` with each way to the daemon, as a D-Bus address.
async fn on_both(test: impl Fn(&Home, &str) + Send + Sync + 'static) {
    let home = Home::new().await;
    let socket = format!("unix:path={}", home.socket.display());
    let bus = home.bus.clone();
    tokio::task::spawn_blocking(move || {
        test(&home, &bus);
        test(&home, &socket);
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn rust() {
    on_both(|home, address| {
        let file = home.dir.path().join("rust.png");
        let _ = std::fs::remove_file(&file);
        // The daemon's own socket is named by its path.
        let place = address.strip_prefix("unix:path=").filter(|path| Path::new(path) == home.socket).unwrap_or(address);
        let said = run(Command::new(program("examples/generate")).args(["a cat"]).arg(&file).arg(place));
        assert!(is_png(&file) && said.contains("seed 0"), "{said}");
    })
    .await;
}

#[tokio::test]
async fn python_with_dbus_fast() {
    // A virtual environment of its own, kept between runs beside the built programs.
    let venv = program("blocklorad").with_file_name("dbus-fast-venv");
    let python = venv.join("bin/python");
    if !python.is_file() {
        run(Command::new("python3").args(["-m", "venv"]).arg(&venv));
    }
    let has = Command::new(&python).args(["-c", "import dbus_fast"]).output().unwrap();
    if !has.status.success() {
        run(Command::new(&python).args(["-m", "pip", "install", "--quiet", "dbus-fast"]));
    }
    on_both(move |home, address| {
        let file = home.dir.path().join("python.png");
        let _ = std::fs::remove_file(&file);
        let said = run(Command::new(&python).arg(example("generate.py")).arg("a cat").arg(&file).arg(address));
        assert!(is_png(&file) && said.contains("done") && said.contains("seed 7"), "{said}");
    })
    .await;
}

#[tokio::test]
async fn shell_with_busctl() {
    on_both(|_, address| {
        let said = run(Command::new("sh").arg(example("generate.sh")).args(["a cat", address]));
        assert!(said.contains(env!("CARGO_PKG_VERSION")) && said.contains("dpmpp-2m"), "{said}");
        assert!(said.lines().last().unwrap().contains("s \"done\""), "{said}");
    })
    .await;
}
