//! Resizing, bit for bit as Pillow's `Image.resize`, which the training and scoring of every model here assume.

use super::{MAX_SIDE, Picture};
use crate::error::{Error, Result};

/// The kernel of a resize.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filter {
    /// The mean of the covered pixels.
    Box,
    /// A triangle.
    Bilinear,
    /// Keys' cubic with a = -1/2 (1981), as CLIP's preprocessing.
    Bicubic,
    /// Lanczos' windowed sinc of three lobes.
    Lanczos,
}

impl Filter {
    /// The filter of Pillow's number, as `resample` in a `preprocessor_config.json`; nearest (0) is not offered.
    pub fn from_pillow(number: u64) -> Option<Self> {
        [None, Some(Self::Lanczos), Some(Self::Bilinear), Some(Self::Bicubic), Some(Self::Box)]
            .get(usize::try_from(number).ok()?)
            .copied()
            .flatten()
    }

    fn support(self) -> f64 {
        match self {
            Self::Box => 0.5,
            Self::Bilinear => 1.0,
            Self::Bicubic => 2.0,
            Self::Lanczos => 3.0,
        }
    }

    fn value(self, x: f64) -> f64 {
        let sinc = |x: f64| if x == 0.0 { 1.0 } else { (x * std::f64::consts::PI).sin() / (x * std::f64::consts::PI) };
        match (self, x.abs()) {
            (Self::Box, _) => (x > -0.5 && x <= 0.5) as u8 as f64,
            (Self::Bilinear, d) => (1.0 - d).max(0.0),
            (Self::Bicubic, d) if d < 1.0 => (1.5 * d - 2.5) * d * d + 1.0,
            (Self::Bicubic, d) if d < 2.0 => ((-0.5 * d + 2.5) * d - 4.0) * d + 2.0,
            (Self::Lanczos, d) if d < 3.0 => sinc(x) * sinc(x / 3.0),
            _ => 0.0,
        }
    }
}

/// Fraction bits of a kernel weight: 8 of 32 hold the pixel, 2 the overshoot.
const FRACTION: u32 = 22;

/// For each output position, the first input position and the weights of those from there on.
fn kernels(from: usize, to: usize, filter: Filter) -> Vec<(usize, Vec<i32>)> {
    let scale = from as f64 / to as f64;
    let stretch = scale.max(1.0); // widens the kernel when shrinking, against aliasing
    let reach = filter.support() * stretch;
    let kernel = |i: usize| {
        let centre = (i as f64 + 0.5) * scale;
        let first = (centre - reach + 0.5).max(0.0) as usize;
        let end = ((centre + reach + 0.5) as usize).min(from);
        let weights: Vec<f64> =
            (first..end).map(|j| filter.value((j as f64 - centre + 0.5) * (1.0 / stretch))).collect();
        let sum: f64 = weights.iter().sum();
        let fixed = |w: &f64| {
            let w = w / sum * (1 << FRACTION) as f64;
            (if w < 0.0 { w - 0.5 } else { w + 0.5 }) as i32
        };
        (first, weights.iter().map(fixed).collect())
    };
    (0..to).map(kernel).collect()
}

impl Picture {
    /// Resizes to `width` x `height`, each 1 to [`MAX_SIDE`].
    pub fn resized(&self, width: usize, height: usize, filter: Filter) -> Result<Self> {
        if !(1..=MAX_SIDE).contains(&width) || !(1..=MAX_SIDE).contains(&height) {
            let size = format!("{width}x{height}");
            return Err(Error::option("picture size", size, format!("each side must be 1 to {MAX_SIDE}")));
        }
        let across = if width == self.width { self.clone() } else { self.resized_across(width, filter)? };
        if height == self.height { Ok(across) } else { across.resized_down(height, filter) }
    }

    /// Resizes so that the short side has `short` pixels and the proportions stay.
    pub fn resized_short_side(&self, short: usize, filter: Filter) -> Result<Self> {
        let (width, height) = (self.width, self.height);
        let long = |long: usize, side: usize| short.saturating_mul(long) / side;
        if width <= height {
            self.resized(short, long(height, width), filter)
        } else {
            self.resized(long(width, height), short, filter)
        }
    }

    fn resized_across(&self, width: usize, filter: Filter) -> Result<Self> {
        let kernels = kernels(self.width, width, filter);
        let mut pixels = Vec::with_capacity(3 * width * self.height);
        for y in 0..self.height {
            let row = &self.pixels[3 * y * self.width..][..3 * self.width];
            for (first, weights) in &kernels {
                pixels.extend(weighted_sum(&row[3 * first..], 3, weights));
            }
        }
        Self::new(width, self.height, pixels)
    }

    fn resized_down(&self, height: usize, filter: Filter) -> Result<Self> {
        let mut pixels = Vec::with_capacity(3 * self.width * height);
        for (first, weights) in &kernels(self.height, height, filter) {
            for x in 0..self.width {
                pixels.extend(weighted_sum(&self.pixels[3 * (first * self.width + x)..], 3 * self.width, weights));
            }
        }
        Self::new(self.width, height, pixels)
    }
}

/// The weighted sum of pixels that lie `stride` bytes apart.
fn weighted_sum(bytes: &[u8], stride: usize, weights: &[i32]) -> [u8; 3] {
    let mut sum = [1 << (FRACTION - 1); 3];
    for (k, weight) in weights.iter().enumerate() {
        for c in 0..3 {
            sum[c] += bytes[k * stride + c] as i32 * weight;
        }
    }
    sum.map(|v| (v >> FRACTION).clamp(0, 255) as u8)
}
