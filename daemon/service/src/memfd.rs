//! Files that live in memory and can no longer change: how pictures leave the daemon.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{FileType, MemfdFlags, SealFlags, fcntl_add_seals, fstat, memfd_create};

use crate::error::{Error, Result};

/// A sealed memfd with `bytes` in it, its offset at the start.
pub fn sealed(name: &str, bytes: &[u8]) -> Result<OwnedFd> {
    let fail = |e: std::io::Error| Error::io(format!("memory file {name:?}"), &e);
    let fd = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).map_err(|e| fail(e.into()))?;
    let mut file = File::from(fd);
    file.write_all(bytes).map_err(fail)?;
    file.seek(SeekFrom::Start(0)).map_err(fail)?;
    let seals = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE;
    fcntl_add_seals(&file, seals).map_err(|e| fail(e.into()))?;
    Ok(file.into())
}

/// Reads all of `fd`, which a client sent: a regular file or a memfd of at most `bytes_max`. `what` names it in errors.
/// The size is that of the beginning; a file that gets shorter while it is read is an error, not a crash, because
/// nothing maps it.
pub fn read_client_file(fd: impl AsFd, bytes_max: u64, what: &str) -> Result<Vec<u8>> {
    let io = |e: std::io::Error| Error::option(format!("{what}: cannot be read: {e}"));
    let stat = fstat(&fd).map_err(|e| io(e.into()))?;
    let kind = FileType::from_raw_mode(stat.st_mode);
    if kind != FileType::RegularFile {
        let kind = match kind {
            FileType::Directory => "a directory",
            FileType::Socket => "a socket",
            FileType::Fifo => "a pipe",
            FileType::CharacterDevice | FileType::BlockDevice => "a device",
            _ => "something else",
        };
        return Err(Error::option(format!("{what}: the file descriptor is {kind}, not a regular file")));
    }
    let size = u64::try_from(stat.st_size).unwrap_or(0);
    if size > bytes_max {
        return Err(Error::option(format!("{what}: {size} bytes, at most {bytes_max} are allowed")));
    }
    // An own file description would share the offset with the client's: read by position.
    let file = File::from(fd.as_fd().try_clone_to_owned().map_err(io)?);
    let mut bytes = Vec::new();
    bytes.try_reserve_exact(size as usize).map_err(|_| Error::failed(format!("{what}: not enough memory")))?;
    let mut reader = At { file: &file, offset: 0 }.take(size);
    reader.read_to_end(&mut bytes).map_err(io)?;
    if bytes.len() as u64 != size {
        let read = bytes.len();
        return Err(Error::option(format!("{what}: it shrank from {size} to {read} bytes while it was read")));
    }
    Ok(bytes)
}

/// Reads by position.
struct At<'a> {
    file: &'a File,
    offset: u64,
}

impl Read for At<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let read = std::os::unix::fs::FileExt::read_at(self.file, buffer, self.offset)?;
        self.offset += read as u64;
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn sealed_files_cannot_change() {
        let fd = sealed("test", b"picture").unwrap();
        assert_eq!(read_client_file(&fd, 100, "it").unwrap(), b"picture");
        let mut file = File::from(fd);
        assert!(file.write_all(b"x").is_err() && file.set_len(0).is_err());
    }

    #[test]
    fn only_regular_files_of_a_bounded_size_are_read() {
        let fd = sealed("test", &[0; 11]).unwrap();
        assert_eq!(read_client_file(&fd, 10, "it").unwrap_err().message, "it: 11 bytes, at most 10 are allowed");
        let message = read_client_file(File::open("/").unwrap(), 10, "it").unwrap_err().message;
        assert_eq!(message, "it: the file descriptor is a directory, not a regular file");
        let message = read_client_file(File::open("/dev/null").unwrap(), 10, "it").unwrap_err().message;
        assert_eq!(message, "it: the file descriptor is a device, not a regular file");
        let (one, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let message = read_client_file(&one, 10, "it").unwrap_err().message;
        assert_eq!(message, "it: the file descriptor is a socket, not a regular file");
    }
}
