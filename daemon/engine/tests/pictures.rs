//! Pictures in files, and resizing as Pillow does it (tests/parity/make_image_golden.py).
#![allow(clippy::unwrap_used)]

use std::path::Path;

use blocklora_engine::Error;
use blocklora_engine::image::{AdapterUse, Filter, GenerationParameters, Picture, read_parameters};
use image::{DynamicImage, ImageFormat, Rgb, RgbImage, Rgba, RgbaImage};

fn gradient() -> Picture {
    Picture::new(7, 5, (0..105).map(|i| (i * 2) as u8).collect()).unwrap()
}

fn parameters(prompt: &str) -> GenerationParameters {
    GenerationParameters {
        prompt: prompt.into(),
        negative_prompt: "blurred, grey".into(),
        steps: 20,
        sampler: "dpmpp-2m".into(),
        guidance_scale: 7.5,
        seed: 3,
        width: 7,
        height: 5,
        model_digest: "0123456789abcdef".into(),
        adapters: vec![
            AdapterUse { name: "milo".into(), digest: "aa".into(), weight: 1.0 },
            AdapterUse { name: "zuko".into(), digest: "bb".into(), weight: 0.25 },
        ],
        ..GenerationParameters::default()
    }
}

#[test]
fn resizing_equals_pillow() {
    #[derive(serde::Deserialize)]
    struct Golden {
        width: usize,
        height: usize,
        pixels: Vec<u8>,
        resized: Vec<Resized>,
    }
    #[derive(serde::Deserialize)]
    struct Resized {
        filter: String,
        width: usize,
        height: usize,
        pixels: Vec<u8>,
    }
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/resample.json");
    let golden: Golden = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let picture = Picture::new(golden.width, golden.height, golden.pixels).unwrap();
    assert_eq!(golden.resized.len(), 12);
    for resized in golden.resized {
        let filter = match resized.filter.as_str() {
            "box" => Filter::Box,
            "bilinear" => Filter::Bilinear,
            "bicubic" => Filter::Bicubic,
            "lanczos" => Filter::Lanczos,
            other => panic!("{other}"),
        };
        let ours = picture.resized(resized.width, resized.height, filter).unwrap();
        assert_eq!(ours.pixels(), resized.pixels, "{filter:?} {}x{}", resized.width, resized.height);
    }
    assert_eq!(picture.resized_short_side(4, Filter::Box).unwrap().width(), 5);
    assert!(picture.resized(0, 4, Filter::Box).is_err());
    assert!(picture.resized(usize::MAX, 4, Filter::Box).is_err());
}

#[test]
fn a_png_gives_back_its_pixels_and_parameters() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("picture.png");
    // Latin-1 text goes into tEXt, other text into iTXt.
    for prompt in ["<milo> and <zuko>", "eine größere Katze", "猫 on a “beach”"] {
        gradient().save_png(&path, Some(&parameters(prompt))).unwrap();
        assert_eq!(Picture::load(&path).unwrap(), gradient());
        assert_eq!(read_parameters(&path).unwrap(), Some(parameters(prompt)));
    }
    gradient().save_png(&path, None).unwrap();
    assert_eq!(read_parameters(&path).unwrap(), None);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "no temporary file stays");
}

#[test]
fn a_failed_write_leaves_the_old_file_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("missing").join("picture.png");
    let message = gradient().save_png(&path, None).unwrap_err().to_string();
    assert!(message.contains("picture.png"), "{message}");
    let taken = folder.path().join("taken.png");
    std::fs::create_dir(&taken).unwrap();
    assert!(gradient().save_png(&taken, None).is_err());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "no temporary file stays");
}

#[cfg(unix)]
#[test]
fn others_may_read_what_the_umask_lets_them() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let (ours, plain) = (folder.path().join("ours.png"), folder.path().join("plain"));
    gradient().save_png(&ours, None).unwrap();
    std::fs::write(&plain, "").unwrap();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode();
    assert_eq!(mode(&ours), mode(&plain));
}

#[test]
fn png_jpeg_and_webp_load_by_content_whatever_their_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("picture.bin");
    let orange = DynamicImage::from(RgbImage::from_pixel(16, 8, Rgb([200, 100, 50])));
    for format in [ImageFormat::Png, ImageFormat::Jpeg, ImageFormat::WebP] {
        orange.save_with_format(&path, format).unwrap();
        let picture = Picture::load(&path).unwrap();
        assert_eq!((picture.width(), picture.height()), (16, 8), "{format:?}");
        let pixel = picture.pixel(7, 3);
        let near = pixel.iter().zip([200_u8, 100, 50]).all(|(a, b)| a.abs_diff(b) <= 3);
        assert!(near, "{format:?}: {pixel:?}");
    }
}

#[test]
fn transparent_parts_become_white_and_other_depths_eight_bits() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("picture.png");
    let mut clear = RgbaImage::from_pixel(3, 1, Rgba([10, 20, 30, 0]));
    clear.put_pixel(1, 0, Rgba([10, 20, 30, 255]));
    clear.put_pixel(2, 0, Rgba([0, 100, 200, 51]));
    clear.save(&path).unwrap();
    let picture = Picture::load(&path).unwrap();
    assert_eq!([0, 1, 2].map(|x| picture.pixel(x, 0)), [[255; 3], [10, 20, 30], [204, 224, 244]]);
    DynamicImage::from(clear).to_luma16().save(&path).unwrap();
    assert_eq!(Picture::load(&path).unwrap().pixel(2, 0)[0], Picture::load(&path).unwrap().pixel(2, 0)[2]);
}

#[test]
fn what_is_no_picture_is_an_error_that_names_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let whole = gradient().to_png(None).unwrap();
    let mut huge = whole.clone();
    huge[16..20].copy_from_slice(&100_000_u32.to_be_bytes());
    let cases: [(&str, &[u8]); 5] = [
        ("empty.png", b""),
        ("text.jpg", b"this is a text"),
        ("cut.png", &whole[..whole.len() / 2]),
        ("head.png", &whole[..20]),
        ("huge.png", &huge),
    ];
    for (name, bytes) in cases {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        let error = Picture::load(&path).unwrap_err();
        assert!(matches!(error, Error::InvalidFile { .. }), "{name}: {error:?}");
        assert!(error.to_string().contains(name), "{error}");
        if name == "text.jpg" {
            assert!(read_parameters(&path).unwrap_err().to_string().contains(name));
        }
    }
    let missing = folder.path().join("missing.png");
    assert!(matches!(Picture::load(&missing), Err(Error::Io { .. })));
    assert!(Picture::load(folder.path()).is_err());
}

/// A small file may claim any number of pixels; it is refused before room is made for them.
#[test]
fn a_picture_of_too_many_pixels_is_refused_by_its_header() {
    for (width, height, says) in [(16_384, 16_384, "all together"), (16_385, 8, "16384 pixels")] {
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, width, height);
        encoder.set_color(png::ColorType::Rgb);
        encoder.write_header().unwrap().write_chunk(png::chunk::IDAT, &[0; 16]).unwrap();
        let error = Picture::decode("large.png", &bytes).unwrap_err().to_string();
        assert!(error.starts_with("large.png: the picture is too large") && error.contains(says), "{error}");
    }
}
