//! Contact sheets: labelled pictures in a grid, under headings.

use super::font::{ADVANCE, LINE};
use super::{MAX_PIXELS, MAX_SIDE, Picture};
use crate::error::{Error, Result};

const MARGIN: usize = 6;
const GAP: usize = 6;
const PAPER: [u8; 3] = [255; 3];
const INK: [u8; 3] = [24; 3];
/// Lines of a label; a longer one ends in dots.
const LABEL_LINES: usize = 2;

enum Item {
    Heading(String),
    Cell(Picture, String),
}

/// A contact sheet under construction.
pub struct ContactSheet {
    columns: usize,
    factor: usize,
    items: Vec<Item>,
}

impl ContactSheet {
    /// A sheet of `columns` pictures a row, each pixel drawn as a square of `factor` pixels.
    pub fn new(columns: usize, factor: usize) -> Self {
        Self { columns: columns.max(1), factor: factor.max(1), items: Vec::new() }
    }

    /// Starts a new row under the line `text`.
    pub fn heading(&mut self, text: impl Into<String>) -> &mut Self {
        self.items.push(Item::Heading(text.into()));
        self
    }

    /// Adds a picture with a label below it, empty for none.
    pub fn cell(&mut self, picture: Picture, label: impl Into<String>) -> &mut Self {
        self.items.push(Item::Cell(picture, label.into()));
        self
    }

    /// Draws the sheet. Fails if there is no picture on it or it would be larger than a picture may be.
    pub fn compose(&self) -> Result<Picture> {
        let cells = || {
            self.items.iter().filter_map(|item| match item {
                Item::Cell(picture, label) => Some((picture, label)),
                Item::Heading(_) => None,
            })
        };
        let largest = |side: fn(&Picture) -> usize| cells().map(|(picture, _)| side(picture)).max().unwrap_or(0);
        let (cell_width, cell_height) = (largest(Picture::width) * self.factor, largest(Picture::height) * self.factor);
        let label_width = cell_width / ADVANCE;
        let lines = cells().map(|(_, label)| wrapped(label, label_width).len()).max().unwrap_or(0);
        let row_height = cell_height + if lines > 0 { 3 + lines * LINE } else { 0 } + GAP;

        let mut places = Vec::with_capacity(self.items.len());
        let (mut column, mut y) = (0, MARGIN);
        for item in &self.items {
            let starts_row = matches!(item, Item::Heading(_)) && column > 0;
            if starts_row || column == self.columns {
                (column, y) = (0, y + row_height);
            }
            places.push((MARGIN + column * (cell_width + GAP), y));
            match item {
                Item::Heading(_) => y += LINE + 4,
                Item::Cell(..) => column += 1,
            }
        }
        let most = cells().count().min(self.columns);
        let width = 2 * MARGIN + most * (cell_width + GAP) - if most > 0 { GAP } else { 0 };
        let height = y + if column > 0 { row_height - GAP } else { 0 } + MARGIN;
        if most == 0 || width > MAX_SIDE || height > MAX_SIDE || width * height > MAX_PIXELS {
            let reason = format!(
                "it must have a picture and at most {MAX_SIDE} pixels a side, {MAX_PIXELS} together; use fewer or \
                     smaller ones"
            );
            return Err(Error::option("contact sheet", format!("{width}x{height}"), reason));
        }

        let mut sheet = Picture::filled(width, height, PAPER)?;
        for (item, (x, y)) in self.items.iter().zip(places) {
            match item {
                Item::Heading(text) => sheet.draw_text(text, x, y, INK),
                Item::Cell(picture, label) => {
                    sheet.paste(&picture.upscaled(self.factor)?, x, y);
                    for (line, text) in wrapped(label, label_width).iter().enumerate() {
                        sheet.draw_text(text, x, y + cell_height + 3 + line * LINE, INK);
                    }
                }
            }
        }
        Ok(sheet)
    }
}

/// `text` in lines of at most `width` characters, broken between words where possible.
fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    let length = |text: &str| text.chars().count();
    for word in text.split_whitespace() {
        let mut word: Vec<char> = word.chars().collect();
        if let Some(line) = lines.last_mut()
            && length(line) + 1 + word.len() <= width
        {
            line.push(' ');
            line.extend(&word);
            continue;
        }
        while word.len() > width.max(1) {
            lines.push(word.drain(..width.max(1)).collect());
        }
        lines.push(word.into_iter().collect());
    }
    if lines.len() > LABEL_LINES {
        let rest = lines.split_off(LABEL_LINES - 1).join(" ");
        let kept = width.saturating_sub(2);
        lines.push(rest.chars().take(kept).chain("..".chars().take(width - kept)).collect());
    }
    lines
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::tests::gradient;
    use super::*;

    #[test]
    fn labels_wrap_between_words_and_end_in_dots() {
        assert_eq!(wrapped("a red cat", 16), ["a red cat"]);
        assert_eq!(wrapped("a red cat on the sunny beach", 10), ["a red cat", "on the s.."]);
        assert_eq!(wrapped("a cat on a sunny beach", 10), ["a cat on a", "sunny be.."]);
        assert_eq!(wrapped("incomprehensible", 10), ["incomprehe", "nsible"]);
        assert!(wrapped("", 10).is_empty());
        assert_eq!(wrapped("abc", 0).len(), LABEL_LINES);
    }

    #[test]
    fn every_picture_is_on_the_sheet_upscaled() {
        let mut sheet = ContactSheet::new(2, 3);
        sheet.heading("Solo");
        for i in 0..3 {
            sheet.cell(gradient(8, 8 + i), format!("picture {i}"));
        }
        sheet.heading("Merged").cell(gradient(8, 8), "");
        let drawn = sheet.compose().unwrap();
        let found = (0..drawn.height() - 24)
            .flat_map(|y| (0..drawn.width() - 24).map(move |x| (x, y)))
            .filter(|&(x, y)| drawn.crop(x, y, 24, 24).unwrap() == gradient(8, 8).upscaled(3).unwrap())
            .count();
        assert_eq!(found, 4, "three taller ones start with the same rows");
        assert!(drawn.pixels().chunks(3).any(|p| p == INK), "labels are drawn");
    }

    #[test]
    fn empty_and_huge_sheets_are_refused() {
        assert!(ContactSheet::new(3, 2).compose().is_err());
        assert!(ContactSheet::new(3, 2).heading("nothing").compose().is_err());
        assert!(ContactSheet::new(3, 4000).cell(gradient(8, 8), "").compose().is_err());
    }
}
