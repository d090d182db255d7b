//! Files that live in memory and can no longer change: how pictures leave the daemon.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;

use rustix::fs::{FileType, MemfdFlags, SealFlags, fcntl_add_seals, fstat, memfd_create};

use crate::error::{Error, Result};

/// A sealed memfd with `bytes` in it, its offset at the start.
pub fn sealed(name: &str, bytes: &[u8]) -> Result<OwnedFd> {
    sealed_with(name, |file| file.write_all(bytes))
}

/// A sealed memfd with what `write` writes, its offset at the start. Pages of zeros take no memory.
pub fn sealed_with(name: &str, write: impl FnOnce(&mut Sparse) -> io::Result<()>) -> Result<OwnedFd> {
    let made = || -> io::Result<OwnedFd> {
        let fd = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        let mut sparse = Sparse { file: fd.into(), size: 0 };
        write(&mut sparse)?;
        let Sparse { file, size } = sparse;
        file.set_len(size)?;
        let seals = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE;
        fcntl_add_seals(&file, seals)?;
        Ok(file.into())
    };
    made().map_err(|e| Error::io(format!("memory file {name:?}"), &e))
}

/// Writes to a new file, and leaves whole pages of zeros out.
pub struct Sparse {
    file: File,
    size: u64,
}

const PAGE: usize = 4096;
const ZEROS: [u8; PAGE] = [0; PAGE];

impl Write for Sparse {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // Pieces end where pages do: as many as are all to be written, or all to be left out.
        let piece_at = |start: usize| {
            let left_of_page = PAGE - (self.size as usize + start) % PAGE;
            &bytes[start..bytes.len().min(start + left_of_page)]
        };
        let is_zero = |piece: &[u8]| *piece == ZEROS[..piece.len()];
        let leave_out = is_zero(piece_at(0));
        let mut end = 0;
        while end < bytes.len() && is_zero(piece_at(end)) == leave_out {
            end += piece_at(end).len();
        }
        if !leave_out {
            self.file.write_all_at(&bytes[..end], self.size)?;
        }
        self.size += end as u64;
        Ok(end)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The bytes of a file.
pub fn size(fd: impl AsFd) -> io::Result<u64> {
    Ok(u64::try_from(fstat(&fd)?.st_size).unwrap_or(0))
}

/// Reads all of `fd`, which a client sent: a regular file or a memfd of at most `bytes_max`. `what` names it in errors.
/// The size is that of the beginning; a file that gets shorter while it is read is an error, not a crash, because
/// nothing maps it.
pub fn read_client_file(fd: impl AsFd, bytes_max: u64, what: &str) -> Result<Vec<u8>> {
    let io = |e: io::Error| Error::option(format!("{what}: cannot be read: {e}"));
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
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read_at(buffer, self.offset)?;
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
    fn pages_of_zeros_take_no_memory() {
        // Pieces that begin and end anywhere, zeros before, between and behind them.
        let zeros = vec![0; 100_000];
        let pieces: [&[u8]; 9] = [&zeros, b"a", &zeros, &[7; 10_000], b"", &zeros[..5000], b"b", &zeros, &zeros];
        let fd = sealed_with("test", |out| pieces.iter().try_for_each(|piece| out.write_all(piece))).unwrap();
        assert!(read_client_file(&fd, 1 << 20, "it").unwrap() == pieces.concat());
        assert_eq!(read_client_file(sealed("test", b"").unwrap(), 0, "it").unwrap(), b"");
        let large = vec![0; 1 << 20];
        let fd = sealed_with("test", |out| (0..1024).try_for_each(|_| out.write_all(&large))).unwrap();
        let stat = fstat(&fd).unwrap();
        assert_eq!(stat.st_size, 1 << 30);
        assert!(stat.st_blocks * 512 < 1 << 20, "{} blocks of 512 bytes", stat.st_blocks);
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
