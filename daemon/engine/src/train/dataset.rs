//! The pictures of a concept and how they are laid on the training canvas.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::host::Placement;
use crate::error::{Error, Result};
use crate::image::{Filter, Picture};
use crate::weights::hex;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct MetadataLine {
    file_name: String,
    text: String,
}

/// Captions by file name, each with its line's number; empty if there is no such file.
fn read_metadata(path: &Path) -> Result<BTreeMap<String, (usize, String)>> {
    let mut captions = BTreeMap::new();
    for (number, line) in (1..).zip(read_optional(path)?.unwrap_or_default().lines()) {
        if line.trim().is_empty() {
            continue;
        }
        let invalid = |reason: String| Error::invalid_file(path, format!("line {number}: {reason}"));
        let MetadataLine { file_name, text } = serde_json::from_str(line).map_err(|e| invalid(e.to_string()))?;
        if let Some((before, _)) = captions.get(&file_name) {
            return Err(invalid(format!("{file_name:?} has a caption in line {before} already; keep one of them")));
        }
        captions.insert(file_name, (number, text));
    }
    Ok(captions)
}

fn read_optional(path: &Path) -> Result<Option<String>> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io(path, e)),
    }
}

/// Pictures with their captions, in a fixed order.
#[derive(Debug)]
pub struct Dataset {
    pictures: Vec<Picture>,
    captions: Vec<Option<String>>,
    digest: String,
}

impl Dataset {
    /// Loads every picture of `folder`, as [`Self::list_folder`] finds them.
    pub fn from_folder(folder: &Path) -> Result<Self> {
        Self::from_files(&Self::list_folder(folder)?)
    }

    /// Every PNG, JPEG or WebP file of `folder`, by name, with its caption. Captions come from `metadata.jsonl` (lines
    /// of `{"file_name": "x.png", "text": "..."}`, one for a picture), else from `x.txt` beside `x.png`, else there is
    /// none; in a caption `{c}` stands for the concept. Fails if there is no picture, or none of a line's name.
    pub fn list_folder(folder: &Path) -> Result<Vec<(PathBuf, Option<String>)>> {
        let entries = std::fs::read_dir(folder).map_err(|e| Error::io(folder, e))?;
        let mut files = Vec::new();
        for entry in entries {
            let path = entry.map_err(|e| Error::io(folder, e))?.path();
            let extension = path.extension().and_then(|e| e.to_str()).unwrap_or("").to_ascii_lowercase();
            if ["png", "jpg", "jpeg", "webp"].contains(&extension.as_str()) {
                files.push(path);
            }
        }
        files.sort();
        if files.is_empty() {
            return Err(Error::invalid_file(folder, "there is no picture (.png, .jpg, .jpeg or .webp) in this folder"));
        }
        let metadata = folder.join("metadata.jsonl");
        let mut listed = read_metadata(&metadata)?;
        let mut items = Vec::new();
        for path in files {
            let name = path.file_name().and_then(|n| n.to_str()).unwrap_or("");
            let caption = match listed.remove(name) {
                Some((_, caption)) => Some(caption),
                None => read_optional(&path.with_extension("txt"))?.map(|c| c.trim().to_owned()),
            };
            items.push((path, caption));
        }
        match listed.into_iter().min_by_key(|(_, (line, _))| *line) {
            None => Ok(items),
            Some((name, (line, _))) => {
                let reason = format!(
                    "line {line}: there is no picture {name:?} in this folder; correct file_name, or remove the line"
                );
                Err(Error::invalid_file(metadata, reason))
            }
        }
    }

    /// Loads these files with these captions.
    pub fn from_files(items: &[(PathBuf, Option<String>)]) -> Result<Self> {
        let mut pictures = Vec::with_capacity(items.len());
        for (path, caption) in items {
            let caption = caption.as_ref().map(|c| c.replace("{c}", "{}"));
            if caption.as_ref().is_some_and(|c| !c.contains("{}")) {
                return Err(Error::invalid_file(path, "its caption has no {c} to stand for the concept"));
            }
            pictures.push((Picture::load(path)?, caption));
        }
        Self::from_pictures(pictures)
    }

    /// These pictures with these captions, in which `{}` stands for the concept.
    pub fn from_pictures(items: Vec<(Picture, Option<String>)>) -> Result<Self> {
        let mut hash = Sha256::new();
        let (mut pictures, mut captions) = (Vec::new(), Vec::new());
        for (picture, caption) in items {
            hash.update((picture.width() as u64).to_le_bytes());
            hash.update((picture.height() as u64).to_le_bytes());
            hash.update(picture.pixels());
            hash.update(caption.as_deref().unwrap_or("\0"));
            hash.update([0]);
            pictures.push(picture);
            captions.push(caption);
        }
        if pictures.is_empty() {
            return Err(Error::option("images", 0, "at least one picture is needed"));
        }
        Ok(Self { pictures, captions, digest: hex(&hash.finalize()) })
    }

    /// Pictures in it.
    pub fn len(&self) -> usize {
        self.pictures.len()
    }

    /// Never: an empty dataset cannot be made.
    pub fn is_empty(&self) -> bool {
        self.pictures.is_empty()
    }

    /// Captions, `{}` for the concept.
    pub fn captions(&self) -> &[Option<String>] {
        &self.captions
    }

    /// SHA-256 over sizes, pixels and captions, in hex.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// Whether `placement` shows picture `index` whole and unchanged in orientation, whatever its offset.
    pub(super) fn is_plain(&self, index: usize, placement: &Placement) -> bool {
        let picture = &self.pictures[index];
        placement.scale == 1.0 && !placement.flip && picture.width() == picture.height()
    }

    /// Picture `index` on a canvas of `size` x `size`: values [1, 3, size, size] in -1..=1, and which pixels it covers.
    pub(super) fn place(
        &self,
        index: usize,
        placement: &Placement,
        size: usize,
        device: &Device,
    ) -> Result<(Tensor, Vec<bool>)> {
        let picture = &self.pictures[index];
        let (width, height) = (picture.width() as f32, picture.height() as f32);
        // Scale 1 fills the canvas with the short side; less fits the long side into that fraction of it.
        let side = if placement.scale >= 1.0 { width.min(height) } else { width.max(height) / placement.scale };
        let ratio = size as f32 / side;
        let scaled = |side: f32| ((side * ratio).round() as usize).max(1);
        let resized = picture.resized(scaled(width), scaled(height), Filter::Bicubic)?;
        let resized = if placement.flip { resized.mirrored() } else { resized };
        let shift = |side: usize, at: f32| ((size as f32 - side as f32) * at).round() as isize;
        let x0 = shift(resized.width(), placement.offset[0]);
        let y0 = shift(resized.height(), placement.offset[1]);

        let mut values = vec![0f32; 3 * size * size];
        let mut covered = vec![false; size * size];
        for y in 0..size {
            for x in 0..size {
                let (from_x, from_y) = (x as isize - x0, y as isize - y0);
                let inside =
                    (0..resized.width() as isize).contains(&from_x) && (0..resized.height() as isize).contains(&from_y);
                if inside {
                    let at = y * size + x;
                    covered[at] = true;
                    for (channel, value) in resized.pixel(from_x as usize, from_y as usize).into_iter().enumerate() {
                        values[channel * size * size + at] = value as f32 / 127.5 - 1.0;
                    }
                }
            }
        }
        Ok((Tensor::from_vec(values, (1, 3, size, size), device)?, covered))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// Which pixels of a canvas of 8 a picture of 4 x 2 covers, and which of its two colours are to be seen.
    fn placed(scale: f32) -> (usize, usize, [bool; 2]) {
        let pixels = (0..8).flat_map(|i| [if i % 4 < 2 { 0 } else { 255 }; 3]).collect();
        let dataset = Dataset::from_pictures(vec![(Picture::new(4, 2, pixels).unwrap(), None)]).unwrap();
        let placement = Placement { scale, offset: [0.0; 2], flip: false };
        let (values, covered) = dataset.place(0, &placement, 8, &Device::Cpu).unwrap();
        let values: Vec<f32> = values.flatten_all().unwrap().to_vec1().unwrap();
        let rows = covered.chunks(8).filter(|row| row.iter().any(|&c| c)).count();
        let shown = |low: f32, high: f32| (0..64).any(|i| covered[i] && (low..=high).contains(&values[i]));
        (rows, covered.iter().filter(|&&c| c).count(), [shown(-1.1, -0.9), shown(0.9, 1.1)])
    }

    #[test]
    fn scale_1_crops_and_less_shows_the_whole_picture() {
        assert_eq!(placed(1.0), (8, 64, [true, false]), "the canvas is full, the right half outside");
        assert_eq!(placed(2.0), placed(1.0));
        assert_eq!(placed(1.0_f32.next_down()), (4, 32, [true, true]));
        assert_eq!(placed(0.5), (2, 8, [true, true]));
    }
}
