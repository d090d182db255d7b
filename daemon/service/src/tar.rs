//! A folder as a POSIX tar archive, written to whatever a client gave: a file, a pipe, a socket.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

use crate::error::{Error, Kind, Result};

/// Writes the files of `folder` with their paths relative to it, in the order of their names; bytes and files written.
/// `goes_on` is asked again and again, also while nobody reads.
pub fn write(folder: &Path, out: &File, goes_on: &dyn Fn() -> bool) -> Result<(u64, u32)> {
    let fail = |e: &io::Error| match e.kind() {
        io::ErrorKind::Interrupted => Error::cancelled(),
        io::ErrorKind::StorageFull => Error::new(Kind::StorageFull, format!("out: {e}")),
        _ => Error::failed(format!("out: {e}")),
    };
    // A client that does not read must not hold this thread for ever.
    let _unblocked = Unblocked::new(out).map_err(|e| fail(&e))?;
    let mut out = Out { file: out, goes_on, bytes: 0 };
    let paths = files(folder)?;
    for path in &paths {
        let name = path.strip_prefix(folder).unwrap_or(path).to_string_lossy().into_owned();
        let mut file = File::open(path).map_err(|e| Error::io(path.display(), &e))?;
        let size = file.metadata().map_err(|e| Error::io(path.display(), &e))?.len();
        if size >= 1 << 33 || name.len() > 100 {
            // What the plain header cannot hold stands in an extended one before it.
            let records = [pax("path", &name), pax("size", &size.to_string())].concat();
            out.write_all(&header("pax", records.len() as u64, b'x')).map_err(|e| fail(&e))?;
            out.padded(records.as_bytes()).map_err(|e| fail(&e))?;
        }
        out.write_all(&header(&name, size, b'0')).map_err(|e| fail(&e))?;
        let mut left = size;
        let mut buffer = vec![0; 1 << 18];
        while left > 0 {
            let n = file.read(&mut buffer).map_err(|e| Error::io(path.display(), &e))?;
            if n == 0 {
                return Err(Error::failed(format!("{}: it got shorter while it was read", path.display())));
            }
            out.write_all(&buffer[..n]).map_err(|e| fail(&e))?;
            left -= n as u64;
        }
        let rest = (512 - size % 512) % 512;
        out.write_all(&vec![0; rest as usize]).map_err(|e| fail(&e))?;
    }
    out.write_all(&[0; 1024]).map_err(|e| fail(&e))?;
    Ok((out.bytes, paths.len() as u32))
}

/// The files in `folder` and in the folders below it, by name.
pub fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    list(folder, &mut paths)?;
    paths.sort();
    Ok(paths)
}

fn list(folder: &Path, paths: &mut Vec<PathBuf>) -> Result<()> {
    for entry in std::fs::read_dir(folder).map_err(|e| Error::io(folder.display(), &e))? {
        let path = entry.map_err(|e| Error::io(folder.display(), &e))?.path();
        if path.is_dir() {
            list(&path, paths)?;
        } else {
            paths.push(path);
        }
    }
    Ok(())
}

/// One record of an extended header: its own length counts itself.
fn pax(key: &str, value: &str) -> String {
    let rest = format!(" {key}={value}\n");
    let mut length = rest.len() + 1;
    while length != rest.len() + length.to_string().len() {
        length = rest.len() + length.to_string().len();
    }
    format!("{length}{rest}")
}

/// A ustar header. Times are 0 and owners unnamed, so that equal folders give equal archives.
fn header(name: &str, size: u64, kind: u8) -> [u8; 512] {
    let mut block = [0; 512];
    let mut put = |at: usize, text: &str| block[at..at + text.len()].copy_from_slice(text.as_bytes());
    let mut end = name.len().min(100);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    put(0, &name[..end]);
    put(100, "0000644\0");
    put(108, "0000000\0");
    put(116, "0000000\0");
    put(124, &format!("{:011o}\0", size.min((1 << 33) - 1)));
    put(136, "00000000000\0");
    put(148, "        ");
    put(156, char::from(kind).encode_utf8(&mut [0; 4]));
    put(257, "ustar\0");
    put(263, "00");
    let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    block
}

/// A file that does not block, until this is dropped: whoever gave it shares its flags.
struct Unblocked<'a>(Option<&'a File>);

impl<'a> Unblocked<'a> {
    fn new(file: &'a File) -> io::Result<Self> {
        let flags = fcntl_getfl(file)?;
        if flags.contains(OFlags::NONBLOCK) {
            return Ok(Self(None));
        }
        fcntl_setfl(file, flags | OFlags::NONBLOCK)?;
        Ok(Self(Some(file)))
    }
}

impl Drop for Unblocked<'_> {
    fn drop(&mut self) {
        if let Some(file) = self.0 {
            // They may have become others meanwhile; nobody could be told of a failure.
            let _ = fcntl_getfl(file).and_then(|flags| fcntl_setfl(file, flags - OFlags::NONBLOCK));
        }
    }
}

/// Writes to a descriptor that may not take everything at once.
struct Out<'a> {
    file: &'a File,
    goes_on: &'a dyn Fn() -> bool,
    bytes: u64,
}

impl Out<'_> {
    fn padded(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.write_all(bytes)?;
        self.write_all(&vec![0; (512 - bytes.len() % 512) % 512])
    }

    fn write_all(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            if !(self.goes_on)() {
                return Err(io::ErrorKind::Interrupted.into());
            }
            match self.file.write(bytes) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => {
                    self.bytes += n as u64;
                    bytes = &bytes[n..];
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    let mut fds = [PollFd::from_borrowed_fd(self.file.as_fd(), PollFlags::OUT)];
                    poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 100_000_000 }))?;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::process::Command;

    use super::*;

    #[test]
    fn tar_reads_what_is_written() {
        let folder = tempfile::tempdir().unwrap();
        let model = folder.path().join("model");
        let deep = model.join("a".repeat(60)).join("b".repeat(60));
        std::fs::create_dir_all(&deep).unwrap();
        std::fs::write(model.join("one.json"), b"{}").unwrap();
        std::fs::write(deep.join("two"), vec![7; 1000]).unwrap();
        let path = folder.path().join("out.tar");
        let out = File::create(&path).unwrap();
        let (bytes, files) = write(&model, &out, &|| true).unwrap();
        assert_eq!((files, bytes), (2, std::fs::metadata(&path).unwrap().len()));
        let to = folder.path().join("to");
        std::fs::create_dir(&to).unwrap();
        let status = Command::new("tar").arg("xf").arg(&path).arg("-C").arg(&to).status().unwrap();
        assert!(status.success());
        assert_eq!(std::fs::read(to.join("one.json")).unwrap(), b"{}");
        let two = to.join("a".repeat(60)).join("b".repeat(60)).join("two");
        assert_eq!(std::fs::read(two).unwrap(), vec![7; 1000]);
    }

    #[test]
    fn a_pipe_that_nobody_reads_can_be_given_up() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("big"), vec![0; 1 << 20]).unwrap();
        let (_reader, writer) = std::io::pipe().unwrap();
        let since = std::time::Instant::now();
        let out = File::from(std::os::fd::OwnedFd::from(writer));
        let error = write(folder.path(), &out, &|| since.elapsed().as_millis() < 300).unwrap_err();
        assert_eq!(error.kind, Kind::Cancelled);
        // Whoever gave it finds it as it was.
        assert!(!fcntl_getfl(&out).unwrap().contains(OFlags::NONBLOCK));
        fcntl_setfl(&out, OFlags::NONBLOCK).unwrap();
        write(folder.path(), &out, &|| false).unwrap_err();
        assert!(fcntl_getfl(&out).unwrap().contains(OFlags::NONBLOCK));
    }
}
