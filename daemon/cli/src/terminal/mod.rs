//! Pictures on terminals that can show them.

mod protocol;
mod sixel;

use std::io::{IsTerminal, Write};

use clap::ValueEnum;

pub use protocol::Protocol;

/// How to show pictures.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Preview {
    /// As the terminal is known to want it; not at all if it is not known
    #[default]
    Auto,
    /// By kitty's graphics protocol
    Kitty,
    /// By iTerm2's inline pictures
    Iterm2,
    /// By DEC's sixels
    Sixel,
    /// Not at all
    None,
}

/// Lines of text that a picture takes.
const LINES: usize = 10;
/// The largest side that is asked for, pixels.
const SIDE: u32 = 256;

/// A place of some lines on standard error in which pictures replace each other.
pub struct Screen {
    protocol: Protocol,
    begun: bool,
}

impl Screen {
    /// A place for pictures; none where standard error is not a terminal or cannot show them.
    pub fn open(preview: Preview) -> Option<Self> {
        let protocol = match preview {
            Preview::None => None,
            Preview::Auto => protocol::detect(&|name| std::env::var(name).ok()),
            Preview::Kitty => Some(Protocol::Kitty),
            Preview::Iterm2 => Some(Protocol::Iterm2),
            Preview::Sixel => Some(Protocol::Sixel),
        };
        let protocol = protocol.filter(|_| std::io::stderr().is_terminal())?;
        Some(Self { protocol, begun: false })
    }

    /// The largest side that pictures should have, pixels.
    pub fn side(&self) -> u32 {
        SIDE
    }

    /// Shows a PNG file in place of the one before. A picture that cannot be shown is left out: it is an extra.
    pub fn show(&mut self, png: &[u8]) {
        let Ok(picture) = protocol::encode(self.protocol, png, LINES) else { return };
        let mut out = std::io::stderr().lock();
        let lines = if self.begun { String::new() } else { "\n".repeat(LINES) };
        self.begun = true;
        // Up to the first line of the place, the picture, and back to where the cursor was.
        let _ = write!(out, "{lines}\x1b7\x1b[{LINES}A\r{picture}\x1b8");
        let _ = out.flush();
    }
}
