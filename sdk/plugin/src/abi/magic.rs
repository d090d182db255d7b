//! The magic block: what a library says about itself before anything of it is used.

use crate::ABI_VERSION;

/// Name of the C function `const Magic *blocklora_plugin_magic(void)` that every plugin exports.
pub const MAGIC_SYMBOL: &str = "blocklora_plugin_magic";

/// What the magic block begins with.
pub const MAGIC_WORD: [u8; 8] = *b"BLKLORA\0";

/// The version of abi_stable that the layout check comes from.
pub const ABI_STABLE_VERSION: &str = "0.11.3";

/// A block of plain bytes, readable whatever built it. It grows by appending; `length` says up to where it is there.
/// Texts are UTF-8, padded with zeros.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Magic {
    /// `MAGIC_WORD`.
    pub word: [u8; 8],
    /// Bytes of this block.
    pub length: u32,
    /// Layout version.
    pub abi_major: u32,
    /// Additions to it.
    pub abi_minor: u32,
    /// `ABI_STABLE_VERSION` of the SDK that built it.
    pub abi_stable: [u8; 20],
    /// Target triple, such as `x86_64-unknown-linux-gnu`.
    pub target: [u8; 64],
    /// `<kind>-<id>`.
    pub name: [u8; 80],
}

const _: () = assert!(size_of::<Magic>() == 184 && align_of::<Magic>() == 4, "the magic block never changes");

impl Magic {
    /// The block of a plugin built with this SDK.
    pub const fn new(name: &str) -> Self {
        Self {
            word: MAGIC_WORD,
            length: size_of::<Self>() as u32,
            abi_major: ABI_VERSION.0,
            abi_minor: ABI_VERSION.1,
            abi_stable: padded(ABI_STABLE_VERSION),
            target: padded(env!("BLOCKLORA_TARGET")),
            name: padded(name),
        }
    }
}

/// `text` in N bytes; too long a text does not compile where this is evaluated at compile time.
const fn padded<const N: usize>(text: &str) -> [u8; N] {
    let bytes = text.as_bytes();
    assert!(bytes.len() < N, "a text of the magic block is too long");
    let mut out = [0; N];
    let mut i = 0;
    while i < bytes.len() {
        out[i] = bytes[i];
        i += 1;
    }
    out
}

/// The text in zero-padded bytes; what is no UTF-8 is replaced.
pub fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}
