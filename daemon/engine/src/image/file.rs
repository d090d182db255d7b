//! Pictures in files.

use std::borrow::Cow;
use std::fs::File;
use std::io::{BufRead, BufReader, Cursor, Seek};
use std::path::Path;

use ::image::error::{LimitError, LimitErrorKind};
use ::image::{DynamicImage, ImageDecoder, ImageError, ImageReader, Limits};

use super::{GenerationParameters, Picture};
use crate::error::{Error, Result};

/// The most pixels that a side of a picture may have.
pub const MAX_SIDE: usize = 16_384;
/// The most pixels that a picture may have.
pub const MAX_PIXELS: usize = 1 << 27;

const KEYWORD: &str = "parameters";

impl Picture {
    /// Loads a PNG, JPEG or WebP file, told apart by content. Transparent parts become white; 16-bit, grey and palette
    /// pictures become 8-bit RGB; EXIF orientation and colour profiles are ignored. Errors name the file.
    pub fn load(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|e| Error::io(path, e))?;
        Self::read(path, BufReader::new(file))
    }

    /// The same from the bytes of a file, which errors call `name`.
    pub fn decode(name: &str, bytes: &[u8]) -> Result<Self> {
        Self::read(Path::new(name), Cursor::new(bytes))
    }

    fn read<R: BufRead + Seek>(path: &Path, reader: R) -> Result<Self> {
        let mut reader = ImageReader::new(reader).with_guessed_format().map_err(|e| Error::io(path, e))?;
        if reader.format().is_none() {
            return Err(Error::invalid_file(path, "not a picture that can be read; use PNG, JPEG or WebP"));
        }
        let mut limits = Limits::default();
        limits.max_image_width = Some(MAX_SIDE as u32);
        limits.max_image_height = Some(MAX_SIDE as u32);
        limits.max_alloc = Some(8 * MAX_PIXELS as u64);
        reader.limits(limits);
        let invalid = |e| match e {
            ImageError::IoError(e) if e.kind() != std::io::ErrorKind::UnexpectedEof => Error::io(path, e),
            ImageError::Limits(_) => {
                let most = format!("a side may have {MAX_SIDE} pixels, all together {MAX_PIXELS}");
                Error::invalid_file(path, format!("the picture is too large; {most}"))
            }
            ImageError::Unsupported(_) => {
                Error::invalid_file(path, format!("this kind of picture cannot be read ({e}); use PNG, JPEG or WebP"))
            }
            e => Error::invalid_file(path, format!("the picture is damaged: {e}")),
        };
        let decoder = reader.into_decoder().map_err(invalid)?;
        let (width, height) = decoder.dimensions();
        if u64::from(width) * u64::from(height) > MAX_PIXELS as u64 {
            return Err(invalid(ImageError::Limits(LimitError::from_kind(LimitErrorKind::DimensionError))));
        }
        let picture = DynamicImage::from_decoder(decoder).map_err(invalid)?;
        let (width, height) = (picture.width() as usize, picture.height() as usize);
        if !picture.color().has_alpha() {
            return Self::new(width, height, picture.into_rgb8().into_raw());
        }
        let over_white = |v: u8, alpha: u8| ((v as u32 * alpha as u32 + 255 * (255 - alpha as u32) + 127) / 255) as u8;
        let pixels = picture.into_rgba8();
        let pixels = pixels.pixels().flat_map(|p| [0, 1, 2].map(|c| over_white(p.0[c], p.0[3]))).collect();
        Self::new(width, height, pixels)
    }

    /// The bytes of a PNG file, with how the picture was made in its `parameters` text if given.
    pub fn to_png(&self, parameters: Option<&GenerationParameters>) -> Result<Vec<u8>> {
        let failed = |e: png::EncodingError| Error::option("picture", "PNG", e.to_string());
        let (width, height) = (self.width as u32, self.height as u32);
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, width, height);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        if let Some(parameters) = parameters {
            let text = parameters.to_text();
            // tEXt is Latin-1 by definition; iTXt holds any text.
            if text.chars().all(|c| (c as u32) < 256) {
                encoder.add_text_chunk(KEYWORD.into(), text).map_err(failed)?;
            } else {
                encoder.add_itxt_chunk(KEYWORD.into(), text).map_err(failed)?;
            }
        }
        let mut writer = encoder.write_header().map_err(failed)?;
        writer.write_image_data(&self.pixels).map_err(failed)?;
        writer.finish().map_err(failed)?;
        Ok(bytes)
    }

    /// Writes a PNG file, whole or not at all: a reader sees the old file or the new one.
    pub fn save_png(&self, path: &Path, parameters: Option<&GenerationParameters>) -> Result<()> {
        Ok(blocklora_spec::write_atomically(path, &self.to_png(parameters)?)?)
    }
}

/// How the PNG file at `path` was made; none if it does not say.
pub fn read_parameters(path: &Path) -> Result<Option<GenerationParameters>> {
    let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
    let invalid = |e: png::DecodingError| Error::invalid_file(path, format!("not a PNG file that can be read: {e}"));
    let reader = png::Decoder::new(Cursor::new(bytes)).read_info().map_err(invalid)?;
    let info = reader.info();
    let latin = info.uncompressed_latin1_text.iter().find(|c| c.keyword == KEYWORD).map(|c| Cow::from(&c.text));
    let text = match latin {
        Some(text) => Some(text),
        None => match info.utf8_text.iter().find(|c| c.keyword == KEYWORD) {
            Some(chunk) => Some(Cow::from(chunk.get_text().map_err(invalid)?)),
            None => None,
        },
    };
    let parse = |text: Cow<str>| {
        GenerationParameters::from_text(&text)
            .map_err(|reason| Error::invalid_file(path, format!("its text {KEYWORD:?} cannot be read: {reason}")))
    };
    text.map(parse).transpose()
}
