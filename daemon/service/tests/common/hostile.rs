//! The plugins of sdk/check/examples in a real daemon: what they do, a file says.

use std::path::{Path, PathBuf};

use super::{Daemon, blocklorad, stub};

/// Their folder and the file.
pub struct Hostile {
    folder: tempfile::TempDir,
}

impl Hostile {
    /// Installs one of each kind.
    pub fn install() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let manifests = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../sdk/check/examples/hostile");
        for kind in ["merge", "sample", "train"] {
            let library = format!("libhostile_{kind}.so");
            let built = blocklorad().with_file_name("examples").join(&library);
            let copied = std::fs::copy(&built, folder.path().join(&library));
            copied.unwrap_or_else(|e| panic!("{}: {e}: cargo build --workspace --examples", built.display()));
            let manifest = format!("{kind}-hostile.toml");
            std::fs::copy(manifests.join(&manifest), folder.path().join(&manifest)).unwrap();
        }
        let hostile = Self { folder };
        hostile.set_mode("");
        hostile
    }

    fn mode_file(&self) -> PathBuf {
        self.folder.path().join("mode")
    }

    /// What they do from now on.
    pub fn set_mode(&self, mode: &str) {
        std::fs::write(self.mode_file(), mode).unwrap();
    }

    /// Makes the library of this kind another file that does the same: what is behind an ELF file's end means nothing.
    pub fn change(&self, kind: &str) {
        let library = self.folder.path().join(format!("libhostile_{kind}.so"));
        let new = library.with_extension("new");
        let bytes = [std::fs::read(&library).unwrap(), vec![0]].concat();
        std::fs::write(&new, bytes).unwrap();
        std::fs::rename(&new, &library).unwrap();
    }

    /// Takes the plugin of this kind away.
    pub fn remove(&self, kind: &str) {
        std::fs::remove_file(self.folder.path().join(format!("{kind}-hostile.toml"))).unwrap();
    }

    /// A daemon that knows them, with the stub-sized model; their code runs as `isolation` says.
    pub fn daemon(&self, isolation: &str) -> Daemon {
        let built = blocklorad().with_file_name("");
        let path = format!("{}:{}", self.folder.path().display(), built.display());
        let mode = format!("@{}", self.mode_file().display());
        // What is found out about them must not stay with whoever runs the tests.
        let records = self.folder.path().display().to_string();
        let env = [
            ("BLOCKLORA_PLUGIN_PATH", path.as_str()),
            ("BLOCKLORA_HOSTILE", mode.as_str()),
            ("XDG_STATE_HOME", records.as_str()),
        ];
        stub::daemon_in(&format!("[plugins]\nisolation = {isolation:?}\n"), &env)
    }
}
