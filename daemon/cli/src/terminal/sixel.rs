//! Sixels: six rows of pixels at a time, each colour drawn over the band by itself.

use std::fmt::Write;

use blocklora_engine::Result;
use blocklora_engine::image::Picture;

/// Levels of each of red, green and blue: 216 colours, fewer than the 256 that terminals have at least.
const LEVELS: usize = 6;
/// Small pictures are enlarged to at least this many pixels.
const SIDE_MIN: usize = 128;

/// The escape that draws the PNG file `png` at the cursor.
pub fn encode(png: &[u8]) -> Result<String> {
    let picture = Picture::decode("preview", png)?;
    let factor = SIDE_MIN.div_ceil(picture.width().max(picture.height())).max(1);
    let picture = picture.upscaled(factor)?;
    let (width, height) = (picture.width(), picture.height());
    // Aspect 1:1, size in pixels.
    let mut text = format!("\x1bPq\"1;1;{width};{height}");
    let percent = |level: usize| 100 * level / (LEVELS - 1);
    for colour in 0..LEVELS.pow(3) {
        let [r, g, b] = [colour / (LEVELS * LEVELS), colour / LEVELS % LEVELS, colour % LEVELS].map(percent);
        let _ = write!(text, "#{colour};2;{r};{g};{b}");
    }
    for top in (0..height).step_by(6) {
        let rows = 6.min(height - top);
        let mut used: Vec<usize> =
            (0..rows * width).map(|i| nearest(picture.pixel(i % width, top + i / width))).collect();
        let band = used.clone();
        used.sort_unstable();
        used.dedup();
        for colour in used {
            let _ = write!(text, "#{colour}");
            let column =
                |x: usize| (0..rows).filter(|y| band[y * width + x] == colour).fold(0u8, |bits, y| bits | 1 << y);
            run_lengths(&mut text, (0..width).map(column));
            text.push('$');
        }
        text.push('-');
    }
    text.push_str("\x1b\\");
    Ok(text)
}

/// The index of the colour nearest to `pixel`.
fn nearest(pixel: [u8; 3]) -> usize {
    let level = |value: u8| (usize::from(value) * (LEVELS - 1) + 127) / 255;
    let [r, g, b] = pixel.map(level);
    (r * LEVELS + g) * LEVELS + b
}

/// Columns as characters, runs of four and more as `!COUNT CHARACTER`.
fn run_lengths(text: &mut String, columns: impl Iterator<Item = u8>) {
    let mut run: Option<(u8, usize)> = None;
    let mut put = |run: Option<(u8, usize)>| {
        if let Some((bits, count)) = run {
            let character = char::from(63 + bits);
            if count > 3 {
                let _ = write!(text, "!{count}{character}");
            } else {
                (0..count).for_each(|_| text.push(character));
            }
        }
    };
    for bits in columns {
        run = match run {
            Some((last, count)) if last == bits => Some((last, count + 1)),
            before => {
                put(before);
                Some((bits, 1))
            }
        };
    }
    put(run);
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn colours_and_rows_are_where_a_terminal_looks_for_them() {
        let png = Picture::filled(128, 7, [255, 0, 0]).unwrap().to_png(None).unwrap();
        let text = encode(&png).unwrap();
        let red = 5 * LEVELS * LEVELS;
        assert!(text.starts_with("\x1bPq\"1;1;128;7#0;2;0;0;0") && text.ends_with("\x1b\\"));
        assert!(text.contains(&format!("#{red};2;100;0;0")));
        // A full band of six rows, then one with its first row alone.
        assert!(text.ends_with(&format!("#{red}!128~$-#{red}!128@$-\x1b\\")), "{}", &text[text.len() - 60..]);
    }

    #[test]
    fn small_pictures_are_enlarged() {
        let png = Picture::filled(32, 32, [0, 0, 0]).unwrap().to_png(None).unwrap();
        assert!(encode(&png).unwrap().contains("\"1;1;128;128"));
    }
}
