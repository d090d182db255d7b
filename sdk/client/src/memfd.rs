//! Bulk data by file descriptor: files out of the daemon, files and bytes into it.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use rustix::fs::{FileType, MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, memfd_create};

use crate::error::{Error, Result};

/// The most bytes that one file from the daemon may have.
pub const BYTES_MAX: u64 = 1 << 32;

/// Reads all of a file that has, as the daemon said, `size` bytes: a sealed memory file, or a regular file of the
/// daemon's that never changes, such as an adapter.
///
/// The file is copied, not mapped, so that nothing another process does to it makes the reader crash, and no lie about
/// its size makes it allocate; a memory file must be sealed against writing and shrinking. Errors: [`Error::Protocol`].
pub fn read_file(fd: OwnedFd, size: u64) -> Result<Vec<u8>> {
    let stat = fstat(&fd).map_err(Error::protocol)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(Error::protocol("a file in a reply is neither a memory file nor a regular one"));
    }
    // Memory files have no name. Named files in memory can be asked for seals, too, but can have none.
    let sealed = |seals: SealFlags| seals.contains(SealFlags::WRITE | SealFlags::SHRINK);
    if stat.st_nlink == 0 && fcntl_get_seals(&fd).is_ok_and(|seals| !sealed(seals)) {
        return Err(Error::protocol("a memory file in a reply is not sealed"));
    }
    let actual = stat.st_size;
    if u64::try_from(actual) != Ok(size) || size > BYTES_MAX {
        return Err(Error::protocol(format!("a file in a reply has {actual} bytes, not {size}")));
    }
    let mut bytes = vec![0; usize::try_from(size).map_err(Error::protocol)?];
    // Whoever else holds the descriptor shares its offset: read at offsets of our own.
    File::from(fd).read_exact_at(&mut bytes, 0).map_err(Error::protocol)?;
    Ok(bytes)
}

/// A sealed memory file with `content`, for what the daemon takes as a file descriptor. `name` is for debuggers.
pub fn sealed(name: &str, content: &[u8]) -> std::io::Result<OwnedFd> {
    let fd = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let mut file = File::from(fd);
    file.write_all(content)?;
    fcntl_add_seals(&file, SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file.into())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_was_sealed_is_read_back() {
        for content in [&b""[..], b"x", &[7; 100_000]] {
            let fd = sealed("test", content).unwrap();
            assert_eq!(read_file(fd, content.len() as u64).unwrap(), content);
        }
    }

    #[test]
    fn regular_files_are_read_from_their_start() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"adapter").unwrap();
        let fd = file.as_file().try_clone().unwrap().into();
        assert_eq!(read_file(fd, 7).unwrap(), b"adapter");
    }

    #[test]
    fn files_that_could_change_or_lie_about_their_size_are_refused() {
        let reason = |fd: OwnedFd, size: u64| read_file(fd, size).unwrap_err().to_string();
        assert!(reason(sealed("test", b"four").unwrap(), 5).contains("has 4 bytes, not 5"));
        assert!(reason(sealed("test", b"four").unwrap(), u64::MAX).contains("not 18446744073709551615"));
        let open = memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        assert!(reason(open, 0).contains("not sealed"));
        let (pipe, _writer) = std::io::pipe().unwrap();
        assert!(reason(pipe.into(), 0).contains("neither a memory file"));
        let folder: OwnedFd = File::open("/").unwrap().into();
        assert!(reason(folder, 0).contains("neither a memory file"));
    }
}
