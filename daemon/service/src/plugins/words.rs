//! Text from plugins, files and other programs, made fit to be shown.

use blocklora_spec::shortened_to;

/// Characters of a plugin's message.
const CHARS_MAX: usize = 1000;

/// What a plugin says, on one line and not longer than people read.
pub fn said(text: &str) -> String {
    if text.trim().is_empty() {
        return "no message".to_owned();
    }
    shown(&shortened_to(text, CHARS_MAX))
}

/// `text` with escapes for every character that a terminal might obey or not show: control characters, and those that
/// turn the order of others around or have no width. Letters of all scripts, marks and quotes stay.
pub fn shown(text: &str) -> String {
    let is_kept = |c| matches!(c, '"' | '\'' | '\\');
    let mut out = String::with_capacity(text.len());
    for part in text.split_inclusive(is_kept) {
        let kept = part.chars().last().filter(|&c| is_kept(c));
        out.extend(part.strip_suffix(is_kept).unwrap_or(part).escape_debug());
        out.extend(kept);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plugin_says_one_line() {
        assert_eq!(said("a dog's \u{e9}"), "a dog's \u{e9}");
        assert_eq!(said("a\r\n\x1b[31m"), "a\\r\\n\\u{1b}[31m");
        assert_eq!(said(" \n"), "no message");
        assert_eq!(said(&"\u{e9}".repeat(5 << 20)).chars().count(), CHARS_MAX + 3);
    }

    #[test]
    fn only_what_cannot_be_seen_is_escaped() {
        for text in ["", "dog", "\"a\" 'b' \\", "e\u{301}te\u{301}", "किताब", "木 ☃", "a \"\u{301}"] {
            assert_eq!(shown(text).replace("\\u{301}", "\u{301}"), text);
        }
        assert_eq!(shown("e\u{301}"), "e\u{301}");
        assert_eq!(shown("\u{1b}[31m"), "\\u{1b}[31m");
        assert_eq!(shown("a\u{202e}b\u{200b}\u{9b}\u{2028}"), "a\\u{202e}b\\u{200b}\\u{9b}\\u{2028}");
        assert_eq!(shown("a\tb\n"), "a\\tb\\n");
    }
}
