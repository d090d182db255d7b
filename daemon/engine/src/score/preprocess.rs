//! From a picture to what CLIP's vision encoder takes, as transformers' CLIPImageProcessor (with Pillow) does it.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::error::{Error, Result};
use crate::image::{Filter, Picture};

/// A size is a number (the short side) or names its parts.
#[derive(Deserialize)]
#[serde(untagged)]
enum Size {
    Number(usize),
    ShortestEdge { shortest_edge: usize },
    Exact { height: usize, width: usize },
}

#[derive(Deserialize)]
#[serde(default)]
struct Config {
    do_resize: bool,
    size: Size,
    resample: u64,
    do_center_crop: bool,
    crop_size: Size,
    do_rescale: bool,
    rescale_factor: f32,
    do_normalize: bool,
    image_mean: [f32; 3],
    image_std: [f32; 3],
}

impl Default for Config {
    /// CLIP's own values.
    fn default() -> Self {
        Self {
            do_resize: true,
            size: Size::ShortestEdge { shortest_edge: 224 },
            resample: 3,
            do_center_crop: true,
            crop_size: Size::Number(224),
            do_rescale: true,
            rescale_factor: 1.0 / 255.0,
            do_normalize: true,
            image_mean: [0.481_454_66, 0.457_827_5, 0.408_210_73],
            image_std: [0.268_629_54, 0.261_302_6, 0.275_777_1],
        }
    }
}

/// A `preprocessor_config.json`.
pub struct Preprocessor {
    path: PathBuf,
    config: Config,
    filter: Filter,
    side: usize,
}

impl Preprocessor {
    /// Opens `path` for a vision encoder that takes `side` x `side` pixels.
    pub fn open(path: &Path, side: usize) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
        let config: Config = serde_json::from_slice(&bytes).map_err(|e| Error::invalid_file(path, e.to_string()))?;
        let filter = Filter::from_pillow(config.resample).ok_or_else(|| Error::Unsupported {
            path: path.to_owned(),
            field: "resample".into(),
            value: config.resample.to_string(),
            supported: "1 Lanczos, 2 bilinear, 3 bicubic or 4 box".into(),
        })?;
        if config.image_std.iter().any(|&std| !(std.is_finite() && std > 0.0)) {
            return Err(Error::invalid_file(path, "image_std must be positive"));
        }
        Ok(Self { path: path.to_owned(), config, filter, side })
    }

    /// `picture` resized, cropped and normalised: [3, side, side].
    pub fn apply(&self, picture: &Picture) -> Result<Vec<f32>> {
        let config = &self.config;
        let mut picture = picture.clone();
        if config.do_resize {
            picture = match config.size {
                Size::Number(short) | Size::ShortestEdge { shortest_edge: short } => {
                    picture.resized_short_side(short, self.filter)?
                }
                Size::Exact { height, width } => picture.resized(width, height, self.filter)?,
            };
        }
        if config.do_center_crop {
            let (Size::Number(width) | Size::ShortestEdge { shortest_edge: width } | Size::Exact { width, .. }) =
                config.crop_size;
            let (Size::Number(height) | Size::ShortestEdge { shortest_edge: height } | Size::Exact { height, .. }) =
                config.crop_size;
            let (x, y) = (picture.width().checked_sub(width), picture.height().checked_sub(height));
            let (Some(x), Some(y)) = (x, y) else {
                return Err(self.invalid(format!("crop_size is larger than a picture resized to {picture:?}")));
            };
            picture = picture.crop(x / 2, y / 2, width, height)?;
        }
        if (picture.width(), picture.height()) != (self.side, self.side) {
            let reason = format!("gives a {picture:?}, but the vision encoder takes {0}x{0} pixels", self.side);
            return Err(self.invalid(reason));
        }
        let factor = if config.do_rescale { config.rescale_factor } else { 1.0 };
        let channel = |c: usize| {
            let (mean, std) =
                if config.do_normalize { (config.image_mean[c], config.image_std[c]) } else { (0.0, 1.0) };
            picture.pixels().iter().skip(c).step_by(3).map(move |&v| (v as f32 * factor - mean) / std)
        };
        Ok((0..3).flat_map(channel).collect())
    }

    fn invalid(&self, reason: String) -> Error {
        Error::invalid_file(&self.path, reason)
    }
}
