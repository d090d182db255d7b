//! Reads the repository for the tests beside it, which enforce what ARCHITECTURE.md promises.

use std::io;
use std::path::{Path, PathBuf};

/// The repository's root.
pub fn root() -> &'static Path {
    static ROOT: std::sync::LazyLock<PathBuf> =
        std::sync::LazyLock::new(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").components().collect());
    &ROOT
}

/// A file of the repository.
pub struct File {
    /// Its path from the root, with `/`.
    pub path: String,
    /// Its size in bytes.
    pub bytes: u64,
}

impl File {
    /// Its text; `None` if it is not UTF-8.
    pub fn text(&self) -> Option<String> {
        std::fs::read_to_string(root().join(&self.path)).ok()
    }
}

/// Every file of the repository, sorted; build outputs, version control and caches are left out.
pub fn files() -> io::Result<Vec<File>> {
    let mut found = Vec::new();
    let mut folders = vec![root().to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder)? {
            let entry = entry?;
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if matches!(name.as_ref(), ".git" | "target" | "__pycache__" | ".venv") || name.ends_with(".log") {
                continue;
            }
            if entry.file_type()?.is_dir() {
                folders.push(entry.path());
            } else if let Ok(path) = entry.path().strip_prefix(root()) {
                let path = path.components().map(|c| c.as_os_str().to_string_lossy()).collect::<Vec<_>>().join("/");
                found.push(File { path, bytes: entry.metadata()?.len() });
            }
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(found)
}

/// The Rust files of the repository with their text.
pub fn rust_files() -> io::Result<Vec<(String, String)>> {
    let rust = files()?.into_iter().filter(|f| f.path.ends_with(".rs"));
    Ok(rust.filter_map(|f| f.text().map(|text| (f.path, text))).collect())
}
