//! What plugins say to people, made fit to be shown.

/// Characters of a message.
const CHARS_MAX: usize = 1000;

/// `text` on one line, without characters that a terminal obeys, and not longer than people read.
pub fn said(text: &str) -> String {
    if text.trim().is_empty() {
        return "no message".to_owned();
    }
    let mut shown: String = text.chars().take(CHARS_MAX).flat_map(shown).collect();
    if text.chars().nth(CHARS_MAX).is_some() {
        shown.push_str("...");
    }
    shown
}

/// A control character or one that changes the direction of what stands behind it by its code, others as they are.
fn shown(c: char) -> impl Iterator<Item = char> {
    let turns = matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    let code = (c.is_control() || turns).then(|| c.escape_default());
    let plain = code.is_none().then_some(c);
    code.into_iter().flatten().chain(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_a_terminal_obeys_gets_through() {
        assert_eq!(said("a dog's \u{e9}"), "a dog's \u{e9}");
        assert_eq!(said("a\0b\r\n\x1b[31m\u{202e}"), "a\\u{0}b\\r\\n\\u{1b}[31m\\u{202e}");
        assert_eq!(said(" \n"), "no message");
        assert_eq!(said(&"x".repeat(5 << 20)).len(), CHARS_MAX + 3);
    }
}
