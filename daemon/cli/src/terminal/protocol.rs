//! The protocols by which terminals show pictures, and which terminal speaks which.

use std::fmt::Write;

use super::sixel;

/// How a terminal wants its pictures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// <https://sw.kovidgoyal.net/kitty/graphics-protocol/>
    Kitty,
    /// <https://iterm2.com/documentation-images.html>
    Iterm2,
    /// DEC's sixels.
    Sixel,
}

/// What the environment says of the terminal; none where nothing is known, and inside tmux and screen, which pass
/// pictures on only when they are told to.
pub fn detect(variable: &dyn Fn(&str) -> Option<String>) -> Option<Protocol> {
    let of = |name: &str| variable(name).filter(|value| !value.is_empty());
    let (term, program) = (of("TERM").unwrap_or_default(), of("TERM_PROGRAM").unwrap_or_default());
    if of("TMUX").is_some() || of("STY").is_some() || term.starts_with("screen") || term.starts_with("tmux") {
        return None;
    }
    if of("KITTY_WINDOW_ID").is_some() || term == "xterm-kitty" || term == "xterm-ghostty" || program == "ghostty" {
        return Some(Protocol::Kitty);
    }
    if of("KONSOLE_VERSION").is_some() {
        return Some(Protocol::Kitty);
    }
    if ["iTerm.app", "WezTerm", "mintty", "rio", "Tabby", "Hyper", "vscode"].contains(&program.as_str())
        || of("LC_TERMINAL").is_some_and(|name| name == "iTerm2")
    {
        return Some(Protocol::Iterm2);
    }
    let sixel =
        ["foot", "mlterm", "yaft", "contour"].iter().any(|name| term.starts_with(name)) || term.contains("sixel");
    sixel.then_some(Protocol::Sixel)
}

/// The bytes that show `png` at the cursor in `lines` lines of text, without moving the cursor where that can be said.
pub fn encode(protocol: Protocol, png: &[u8], lines: usize) -> blocklora_engine::Result<String> {
    Ok(match protocol {
        Protocol::Kitty => kitty(png, lines),
        Protocol::Iterm2 => {
            let (size, data) = (png.len(), base64::encode(png));
            format!("\x1b]1337;File=inline=1;size={size};height={lines};doNotMoveCursor=1:{data}\x07")
        }
        Protocol::Sixel => sixel::encode(png)?,
    })
}

/// Bytes of base64 that one kitty escape may hold.
const CHUNK: usize = 4096;

fn kitty(png: &[u8], lines: usize) -> String {
    let data = base64::encode(png);
    let mut text = String::new();
    let chunks = data.len().div_ceil(CHUNK).max(1);
    for (i, chunk) in data.as_bytes().chunks(CHUNK).enumerate() {
        // a=T: transmit and show; f=100: PNG; i, p: one picture that replaces itself; q=2: no answers; C=1: the cursor
        // stays.
        let keys = if i == 0 { format!("a=T,f=100,i=1112,p=1,q=2,C=1,r={lines},") } else { String::new() };
        let more = u8::from(i + 1 < chunks);
        let _ = write!(text, "\x1b_G{keys}m={more};{}\x1b\\", String::from_utf8_lossy(chunk));
    }
    text
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn detected(variables: &[(&str, &str)]) -> Option<Protocol> {
        detect(&|name| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned()))
    }

    #[test]
    fn terminals_are_known_by_their_environment() {
        assert_eq!(detected(&[("TERM", "xterm-kitty")]), Some(Protocol::Kitty));
        assert_eq!(detected(&[("TERM_PROGRAM", "WezTerm"), ("TERM", "xterm-256color")]), Some(Protocol::Iterm2));
        assert_eq!(detected(&[("TERM", "foot-extra")]), Some(Protocol::Sixel));
        assert_eq!(detected(&[("TERM", "xterm-kitty"), ("TMUX", "/tmp/tmux-0/default,1,0")]), None);
        assert_eq!(detected(&[("TERM", "xterm-256color")]), None);
        assert_eq!(detected(&[]), None);
    }

    /// What a terminal would decode: the base64 of all escapes together is the file.
    #[test]
    fn the_files_bytes_are_in_the_escapes() {
        let picture: Vec<u8> = (0..20_000u32).map(|i| (i % 251) as u8).collect();
        let kitty = encode(Protocol::Kitty, &picture, 10).unwrap();
        let parts = kitty.split("\x1b_G").skip(1);
        let data: String = parts.clone().map(|p| p.split(';').nth(1).unwrap().trim_end_matches("\x1b\\")).collect();
        assert!(base64::decode(data).unwrap() == picture);
        assert!(parts.clone().all(|p| p.len() < CHUNK + 100) && parts.last().unwrap().starts_with("m=0;"));
        let iterm = encode(Protocol::Iterm2, &picture, 10).unwrap();
        let data = iterm.split(':').nth(1).unwrap().trim_end_matches('\x07');
        assert!(base64::decode(data).unwrap() == picture && iterm.contains("size=20000"));
    }
}
