//! The bytes of a file: mapped, or read by the caller.

use std::fs::File;
use std::ops::Deref;

use memmap2::Mmap;

pub(crate) enum Content {
    Map(Mmap),
    Bytes(Vec<u8>),
}

impl Content {
    pub(crate) fn map(file: &File) -> std::io::Result<Self> {
        // SAFETY: a mapping is sound as long as nobody shortens the file under it. Adapters are written to a temporary
        // file and renamed into place (`write_atomically`), never rewritten.
        #[allow(unsafe_code)]
        let map = unsafe { Mmap::map(file) }?;
        Ok(Self::Map(map))
    }
}

impl Deref for Content {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match self {
            Self::Map(map) => map,
            Self::Bytes(bytes) => bytes,
        }
    }
}
