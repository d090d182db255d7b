//! Output that appears whole or not at all: written beside its destination, flushed to the disk, renamed.
//!
//! An output is opened before the work begins, so that a missing or read-only folder is found in the first second and
//! not after an hour of training.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use blocklora_client::ResultFile;
use tempfile::{NamedTempFile, TempDir};

/// A file that will appear at its path.
pub struct OutputFile {
    path: PathBuf,
    file: NamedTempFile,
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
        let file = tempfile::Builder::new().prefix(".blocklora-").tempfile_in(&folder);
        let file = file.map_err(|e| cannot_write(&folder, e))?;
        Ok(Self { path: path.to_path_buf(), file })
    }

    /// Writes `content`, flushes it to the disk and gives it its name.
    pub fn write(mut self, content: &[u8]) -> anyhow::Result<()> {
        self.fill(content)?;
        self.publish()
    }

    /// Writes `content` and flushes it to the disk; it has no name yet.
    pub fn fill(&mut self, content: &[u8]) -> anyhow::Result<()> {
        let file = self.file.as_file_mut();
        let written = file.write_all(content).and_then(|()| file.sync_all());
        written.and_then(|()| allow_others_to_read(file)).map_err(|e| cannot_write(&self.path, e))
    }

    /// Gives what was filled in its name.
    pub fn publish(self) -> anyhow::Result<()> {
        let Self { path, file } = self;
        file.persist(&path).map_err(|e| cannot_write(&path, e.error))?;
        Ok(())
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
        let temporary = tempfile::Builder::new().prefix(".blocklora-").tempdir_in(&parent);
        Ok(Self { path: path.to_path_buf(), temporary: temporary.map_err(|e| cannot_write(&parent, e))? })
    }

    /// Where to write for now.
    pub fn path(&self) -> &Path {
        self.temporary.path()
    }

    /// Gives the folder its name.
    pub fn finish(self) -> anyhow::Result<()> {
        let Self { path, temporary } = self;
        allow_others_to_enter(temporary.path()).map_err(|e| cannot_write(&path, e))?;
        std::fs::rename(temporary.path(), &path).map_err(|e| cannot_write(&path, e))?;
        // Renamed: there is nothing left to remove.
        let _ = temporary.keep();
        Ok(())
    }
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

/// Temporary files are private; a finished one gets the permissions of any new file.
fn allow_others_to_read(file: &File) -> std::io::Result<()> {
    set_mode(file, 0o644)
}

fn allow_others_to_enter(folder: &Path) -> std::io::Result<()> {
    set_mode(&File::open(folder)?, 0o755)
}

#[cfg(unix)]
fn set_mode(file: &File, mode: u32) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    file.set_permissions(std::fs::Permissions::from_mode(mode))
}

#[cfg(not(unix))]
fn set_mode(_: &File, _: u32) -> std::io::Result<()> {
    Ok(())
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
