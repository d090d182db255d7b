//! Output that appears whole or not at all: written beside its destination, flushed to the disk, renamed.
//!
//! An output is opened before the work begins, so that a missing or read-only folder is found in the first second and
//! not after an hour of training.

use std::fs::{File, Permissions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use blocklora_client::ResultFile;
use tempfile::{NamedTempFile, TempDir};

use crate::held::{self, Held};

/// A file that will appear at its path.
pub struct OutputFile {
    path: PathBuf,
    file: NamedTempFile,
    /// Goes after the file.
    _held: Held,
}

impl OutputFile {
    /// Makes sure that `path` can be written, and holds a temporary file beside it.
    pub fn create(path: &Path) -> anyhow::Result<Self> {
        let folder = parent(path)?;
        if path.is_dir() {
            bail!("{}: is a folder: give a file name", path.display());
        }
        if path.exists() && !path.is_file() {
            bail!("{}: is not a regular file: give another name", path.display());
        }
        let mut builder = tempfile::Builder::new();
        // The umask decides, as for any file that a program makes; without this, temporary files are private.
        builder.prefix(".blocklora-").permissions(Permissions::from_mode(0o666));
        let held = held::hold(|| builder.tempfile_in(&folder), NamedTempFile::path);
        let (file, held) = held.map_err(|e| cannot_write(&folder, e))?;
        Ok(Self { path: path.to_path_buf(), file, _held: held })
    }

    /// Writes `content`, flushes it to the disk and gives it its name.
    pub fn write(mut self, content: &[u8]) -> anyhow::Result<()> {
        self.fill(content)?;
        self.publish()
    }

    /// Writes `content` and flushes it to the disk; it has no name yet.
    pub fn fill(&mut self, content: &[u8]) -> anyhow::Result<()> {
        self.fill_with(|file| file.write_all(content))
    }

    /// As [`OutputFile::fill`], with what `write` writes.
    pub fn fill_with(&mut self, write: impl FnOnce(&mut File) -> std::io::Result<()>) -> anyhow::Result<()> {
        let file = self.file.as_file_mut();
        write(file).and_then(|()| file.sync_all()).map_err(|e| cannot_write(&self.path, e))
    }

    /// Gives what was filled in its name.
    pub fn publish(self) -> anyhow::Result<()> {
        let Self { path, file, _held } = self;
        file.persist(&path).map_err(|e| cannot_write(&path, e.error))?;
        flush_names(&path)
    }
}

/// Writes all or, if one cannot be written, none of `files`.
pub fn write_all(mut files: Vec<(OutputFile, Vec<u8>)>) -> anyhow::Result<()> {
    for (file, content) in &mut files {
        file.fill(content)?;
    }
    files.into_iter().try_for_each(|(file, _)| file.publish())
}

/// Takes what plugins handed over out of `files` and writes it into the folder `NAME.artefacts` beside `output`; the
/// paths.
pub fn artefacts(output: &Path, files: &mut Vec<ResultFile>) -> anyhow::Result<Vec<PathBuf>> {
    let folder = beside(output, ".artefacts");
    let mut paths = Vec::new();
    for file in files.extract_if(.., |file| file.is_artefact()) {
        // The daemon is another program: its names stay in the folder.
        let name = Path::new(&file.name).file_name().filter(|name| *name == file.name.as_str());
        let name = name.ok_or_else(|| anyhow::anyhow!("the daemon gave an artefact the name {:?}", file.name))?;
        std::fs::create_dir_all(&folder).map_err(|e| cannot_write(&folder, e))?;
        let path = folder.join(name);
        OutputFile::create(&path)?.write(&file.bytes)?;
        paths.push(path);
    }
    Ok(paths)
}

/// The path of something that goes with `output`: its name with `ending` in the place of `.safetensors`, or after it.
/// Another dot is part of the name: `milo-1.0` and `milo-1.5` are two concepts.
pub fn beside(output: &Path, ending: &str) -> PathBuf {
    let is_adapter = output.extension().is_some_and(|extension| extension == "safetensors");
    let mut name = if is_adapter { output.file_stem() } else { output.file_name() }.unwrap_or_default().to_owned();
    name.push(ending);
    output.with_file_name(name)
}

/// Checks that a file could be written at `path`, for outputs that the engine itself writes.
pub fn check_file(path: &Path) -> anyhow::Result<()> {
    OutputFile::create(path).map(drop)
}

/// Fails where `output` is the file `input`, which would be lost.
pub fn not_the_same(input: &Path, output: &Path) -> anyhow::Result<()> {
    use std::os::unix::fs::MetadataExt;
    let identity = |path: &Path| path.metadata().ok().map(|meta| (meta.dev(), meta.ino()));
    if identity(output).is_some() && identity(output) == identity(input) {
        bail!("{}: is the file that is read, which would be lost: give another name", output.display());
    }
    Ok(())
}

/// A folder that will appear at its path.
pub struct OutputFolder {
    path: PathBuf,
    temporary: TempDir,
    /// Goes after the folder.
    _held: Held,
}

impl OutputFolder {
    /// Makes sure that the folder `path` can be made, and holds a temporary one beside it. An empty folder may already
    /// be there; one with something in it is not touched.
    pub fn create(path: &Path) -> anyhow::Result<Self> {
        let parent = parent(path)?;
        if path.is_dir() {
            let mut entries = path.read_dir().with_context(|| path.display().to_string())?;
            if entries.next().is_some() {
                bail!("{}: is not empty: give the name of a new folder", path.display());
            }
        } else if path.exists() {
            bail!("{}: is a file: give the name of a new folder", path.display());
        }
        let held = held::hold(|| tempfile::Builder::new().prefix(".blocklora-").tempdir_in(&parent), TempDir::path);
        let (temporary, held) = held.map_err(|e| cannot_write(&parent, e))?;
        Ok(Self { path: path.to_path_buf(), temporary, _held: held })
    }

    /// Where to write for now.
    pub fn path(&self) -> &Path {
        self.temporary.path()
    }

    /// Flushes what is in the folder to the disk and gives it its name.
    pub fn finish(self) -> anyhow::Result<()> {
        let Self { path, temporary, _held } = self;
        flush(temporary.path()).map_err(|e| cannot_write(&path, e))?;
        std::fs::rename(temporary.path(), &path).map_err(|e| cannot_write(&path, e))?;
        // Renamed: there is nothing left to remove.
        let _ = temporary.keep();
        flush_names(&path)
    }
}

/// Flushes the file or folder `path` to the disk, a folder with all that is in it.
fn flush(path: &Path) -> std::io::Result<()> {
    if path.is_dir() {
        path.read_dir()?.try_for_each(|entry| flush(&entry?.path()))?;
    }
    File::open(path)?.sync_all()
}

/// Flushes the folder in which `path` lies: that it has this name now.
fn flush_names(path: &Path) -> anyhow::Result<()> {
    // One may write into a folder that one may not read.
    let Ok(folder) = File::open(parent(path)?) else { return Ok(()) };
    folder.sync_all().map_err(|e| cannot_write(path, e))
}

/// The folder in which `path` lies, which must be there.
fn parent(path: &Path) -> anyhow::Result<PathBuf> {
    if path.file_name().is_none() {
        bail!("{}: is not a file name", path.display());
    }
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder.to_path_buf(),
        _ => PathBuf::from("."),
    };
    if folder.is_dir() {
        return Ok(folder);
    }
    if folder.exists() {
        bail!("{}: {} is not a folder", path.display(), folder.display());
    }
    bail!("{}: the folder {} does not exist: make it first", path.display(), folder.display());
}

/// A failed write; what to do about it follows from the cause.
pub fn cannot_write(path: &Path, error: std::io::Error) -> anyhow::Error {
    anyhow::Error::new(error).context(format!("{}: cannot write", path.display()))
}

/// Prints `text` on stdout; a reader that has gone away is an error here, not a panic.
pub fn print(text: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// Prints `value` as indented JSON on stdout.
pub fn print_json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    print(&(serde_json::to_string_pretty(value)? + "\n"))?;
    Ok(())
}
