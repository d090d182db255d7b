//! Bulk data by file descriptor: sealed memory files out of the daemon, files and bytes into it.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, memfd_create};

use crate::error::{Error, Result};

/// The most bytes that one file from the daemon may have.
pub const BYTES_MAX: u64 = 1 << 32;

/// Reads all of a sealed memory file that has, as the daemon said, `size` bytes.
///
/// The file is copied, not mapped, and must be sealed against writing and shrinking: what is returned cannot change
/// any more, and no lie about its size makes the reader crash or allocate. Errors: [`Error::Protocol`].
pub fn read_sealed(fd: OwnedFd, size: u64) -> Result<Vec<u8>> {
    let seals = fcntl_get_seals(&fd).map_err(|_| Error::protocol("a file in a reply is not a memory file"))?;
    if !seals.contains(SealFlags::WRITE | SealFlags::SHRINK) {
        return Err(Error::protocol("a memory file in a reply is not sealed"));
    }
    let actual = fstat(&fd).map_err(Error::protocol)?.st_size;
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
            assert_eq!(read_sealed(fd, content.len() as u64).unwrap(), content);
        }
    }

    #[test]
    fn files_that_could_change_or_lie_about_their_size_are_refused() {
        let reason = |fd: OwnedFd, size: u64| read_sealed(fd, size).unwrap_err().to_string();
        assert!(reason(sealed("test", b"four").unwrap(), 5).contains("has 4 bytes, not 5"));
        assert!(reason(sealed("test", b"four").unwrap(), u64::MAX).contains("not 18446744073709551615"));
        let open = memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        assert!(reason(open, 0).contains("not sealed"));
        let file: OwnedFd = tempfile::tempfile().unwrap().into();
        assert!(reason(file, 0).contains("not a memory file"));
        let (pipe, _writer) = std::io::pipe().unwrap();
        assert!(reason(pipe.into(), 0).contains("not a memory file"));
    }
}
