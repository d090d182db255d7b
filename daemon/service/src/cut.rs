//! Texts that clients chose, cut where they are kept or shown: what one of them sends must not fill the messages of all.

use std::borrow::Cow;

/// Bytes of a text that is kept or shown: a job's description, a message.
pub const TEXT_BYTES_MAX: usize = 1024;
/// Bytes of a name.
pub const NAME_BYTES_MAX: usize = 64;

/// `text`, or its beginning and "..." where it has more than `most` bytes.
pub fn cut(text: &str, most: usize) -> Cow<'_, str> {
    const MARK: &str = "...";
    if text.len() <= most {
        return Cow::Borrowed(text);
    }
    let mut end = most.saturating_sub(MARK.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    Cow::Owned(format!("{}{MARK}", &text[..end]))
}

/// The beginning of a column of text in SQL: one character more than is shown, so that [`cut`] sees whether there are
/// more.
pub fn beginning_of(column: &str, most: usize) -> String {
    format!("substr({column}, 1, {})", most + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_texts_are_cut_between_characters() {
        assert_eq!(cut("a dog", 5), "a dog");
        assert_eq!(cut("a doggy", 6), "a d...");
        assert_eq!(cut("ünïcödé", 9), "ünïc...");
        assert_eq!(cut("ünïcödé", 10), "ünïc...");
        assert_eq!(cut("éé", 1), "...");
    }
}
