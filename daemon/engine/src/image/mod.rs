//! Pictures: 8-bit RGB, to and from the model's scaling, to and from files, and laid out on contact sheets.

mod file;
mod font;
mod parameters;
mod resample;
mod sheet;

pub use file::{MAX_PIXELS, MAX_SIDE, read_parameters};
pub use parameters::{AdapterUse, GenerationParameters, MergeUse};
pub use resample::Filter;
pub use sheet::ContactSheet;

use crate::error::{Error, Result};

/// An 8-bit RGB picture, rows from the top, three bytes a pixel.
#[derive(Clone, PartialEq, Eq)]
pub struct Picture {
    width: usize,
    height: usize,
    pixels: Vec<u8>,
}

impl Picture {
    /// A picture of `pixels`, [height, width, 3]. Fails where sizes and length disagree or a side is 0.
    pub fn new(width: usize, height: usize, pixels: Vec<u8>) -> Result<Self> {
        let expected = width.checked_mul(height).and_then(|n| n.checked_mul(3));
        if width == 0 || height == 0 || expected != Some(pixels.len()) {
            let reason = format!("{} bytes of pixels do not make such a picture", pixels.len());
            return Err(Error::option("picture size", format!("{width}x{height}"), reason));
        }
        Ok(Self { width, height, pixels })
    }

    /// A picture of one colour.
    pub fn filled(width: usize, height: usize, colour: [u8; 3]) -> Result<Self> {
        let bytes = width.saturating_mul(height).min(MAX_PIXELS).saturating_mul(3);
        Self::new(width, height, colour.into_iter().cycle().take(bytes).collect())
    }

    /// From a model's output: `values` [3, height, width] in -1..1, clamped to that range. Fails on NaN and infinity.
    pub fn from_chw(values: &[f32], width: usize, height: usize) -> Result<Self> {
        if let Some(&value) = values.iter().find(|value| !value.is_finite()) {
            return Err(Error::NotFinite { what: "a decoded pixel".into(), value, step: 0 });
        }
        let plane = width.saturating_mul(height);
        if Some(values.len()) != plane.checked_mul(3) {
            let reason = format!("{} values do not make such a picture", values.len());
            return Err(Error::option("picture size", format!("{width}x{height}"), reason));
        }
        let byte = |i: usize| ((values[i] / 2.0 + 0.5).clamp(0.0, 1.0) * 255.0).round_ties_even() as u8;
        let pixels = (0..plane).flat_map(|i| [byte(i), byte(plane + i), byte(2 * plane + i)]).collect();
        Self::new(width, height, pixels)
    }

    /// The model's scaling: [3, height, width], 0..255 mapped to -1..1.
    pub fn to_chw(&self) -> Vec<f32> {
        (0..3).flat_map(|c| self.pixels.iter().skip(c).step_by(3).map(|&v| v as f32 / 127.5 - 1.0)).collect()
    }

    /// Its width in pixels.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Its height in pixels.
    pub fn height(&self) -> usize {
        self.height
    }

    /// Its bytes, [height, width, 3].
    pub fn pixels(&self) -> &[u8] {
        &self.pixels
    }

    /// The colour at column `x`, row `y`, both inside the picture.
    pub fn pixel(&self, x: usize, y: usize) -> [u8; 3] {
        let i = 3 * (y * self.width + x);
        [self.pixels[i], self.pixels[i + 1], self.pixels[i + 2]]
    }

    /// The part of `width` x `height` pixels whose top left corner is at (`x`, `y`). Fails where it leaves the picture.
    pub fn crop(&self, x: usize, y: usize, width: usize, height: usize) -> Result<Self> {
        let fits = |start: usize, length: usize, side: usize| start.checked_add(length).is_some_and(|end| end <= side);
        if !fits(x, width, self.width) || !fits(y, height, self.height) {
            let reason = format!("leaves the picture, which has {}x{} pixels", self.width, self.height);
            return Err(Error::option("crop", format!("{width}x{height}+{x}+{y}"), reason));
        }
        let row = |y: usize| &self.pixels[3 * (y * self.width + x)..][..3 * width];
        Self::new(width, height, (y..y + height).flat_map(row).copied().collect())
    }

    /// Its mirror image, left and right exchanged.
    pub fn mirrored(&self) -> Self {
        let row = |y: usize| (0..self.width).rev().flat_map(move |x| self.pixel(x, y));
        Self { pixels: (0..self.height).flat_map(row).collect(), ..*self }
    }

    /// Every pixel as a square of `factor` x `factor` pixels.
    pub fn upscaled(&self, factor: usize) -> Result<Self> {
        let (width, height) = (self.width.saturating_mul(factor), self.height.saturating_mul(factor));
        let mut picture = Self::filled(width, height, [0; 3])?;
        for (i, pixel) in picture.pixels.chunks_exact_mut(3).enumerate() {
            pixel.copy_from_slice(&self.pixel(i % width / factor, i / width / factor));
        }
        Ok(picture)
    }

    /// Copies `other` into it with its top left corner at (`x`, `y`); what would lie outside is left out.
    pub fn paste(&mut self, other: &Picture, x: usize, y: usize) {
        let columns = other.width.min(self.width.saturating_sub(x));
        for row in 0..other.height.min(self.height.saturating_sub(y)) {
            let from = 3 * row * other.width;
            let to = 3 * ((y + row) * self.width + x);
            self.pixels[to..to + 3 * columns].copy_from_slice(&other.pixels[from..from + 3 * columns]);
        }
    }

    fn set(&mut self, x: usize, y: usize, colour: [u8; 3]) {
        if x < self.width && y < self.height {
            let i = 3 * (y * self.width + x);
            self.pixels[i..i + 3].copy_from_slice(&colour);
        }
    }
}

impl std::fmt::Debug for Picture {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Picture({}x{})", self.width, self.height)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// A picture whose pixels all differ.
    pub(super) fn gradient(width: usize, height: usize) -> Picture {
        let byte = |i: usize| (i * 7 % 256) as u8;
        Picture::new(width, height, (0..3 * width * height).map(byte).collect()).unwrap()
    }

    #[test]
    fn every_byte_survives_the_models_scaling() {
        let picture = Picture::new(16, 16, (0..768).map(|i| (i % 256) as u8).collect()).unwrap();
        let values = picture.to_chw();
        assert_eq!((values[0], values[1]), (-1.0, 3.0 / 127.5 - 1.0));
        assert_eq!(Picture::from_chw(&values, 16, 16).unwrap(), picture);
    }

    #[test]
    fn values_out_of_range_are_clamped_and_nan_is_an_error() {
        let picture = Picture::from_chw(&[-7.0, 0.0, 9.0], 1, 1).unwrap();
        assert_eq!(picture.pixel(0, 0), [0, 128, 255]);
        assert!(matches!(Picture::from_chw(&[0.0, f32::NAN, 0.0], 1, 1), Err(Error::NotFinite { .. })));
        assert!(Picture::from_chw(&[0.0; 5], 1, 1).is_err());
        assert!(Picture::filled(usize::MAX, 2, [0; 3]).is_err());
    }

    #[test]
    fn crop_mirror_upscale_and_paste_move_the_right_pixels() {
        let picture = gradient(5, 4);
        let part = picture.crop(1, 2, 3, 2).unwrap();
        assert_eq!(part.pixel(2, 1), picture.pixel(3, 3));
        assert!(picture.crop(3, 0, 3, 1).is_err() && picture.crop(usize::MAX, 0, 3, 1).is_err());
        assert_eq!(picture.mirrored().pixel(0, 1), picture.pixel(4, 1));
        assert_eq!(picture.upscaled(3).unwrap().pixel(14, 2), picture.pixel(4, 0));
        let mut canvas = Picture::filled(6, 6, [9; 3]).unwrap();
        canvas.paste(&picture, 4, 1);
        assert_eq!((canvas.pixel(5, 2), canvas.pixel(0, 0)), (picture.pixel(1, 1), [9; 3]));
    }
}
