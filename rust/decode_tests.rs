//! Tests of `decode`: files made here, decoded whole and by regions.

use std::io::Cursor;

use turbojpeg::{Compressor, Image, PixelFormat, Subsamp};

use super::*;
use crate::formats::read_header;
use crate::header::Limits;
use crate::orient::Orientation;

const LIMITS: Limits = Limits { max_pixels: 1 << 24, max_bytes: 1 << 24 };
const SUBSAMPLINGS: [Subsamp; 7] = [
    Subsamp::None,
    Subsamp::Sub2x1,
    Subsamp::Sub2x2,
    Subsamp::Gray,
    Subsamp::Sub1x2,
    Subsamp::Sub4x1,
    Subsamp::Sub1x4,
];

/// Numbers without a pattern, the same in each run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: u32) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) % u64::from(below)) as u32
    }

    fn roll_region(&mut self, (width, height): (u32, u32)) -> Region {
        let (left, top) = (self.roll(width), self.roll(height));
        let (width, height) = (1 + self.roll(width - left), 1 + self.roll(height - top));
        Region { left, top, width, height }
    }
}

/// A picture with sharp edges everywhere, so that a wrong neighbour is seen.
fn draw(width: u32, height: u32, samples: u32) -> Vec<u8> {
    let mut dice = Dice(7);
    let pixel = |x: u32, y: u32, sample: u32| (x * (3 + sample) + y * (5 - sample)) ^ (x * y / 7);
    (0..height)
        .flat_map(|y| (0..width).flat_map(move |x| (0..samples).map(move |sample| pixel(x, y, sample))))
        .map(|value| (value + dice.roll(60)) as u8)
        .collect()
}

fn encode_jpeg(width: u32, height: u32, subsampling: Subsamp, progressive: bool, format: PixelFormat) -> Vec<u8> {
    let pixels = draw(width, height, format.size() as u32);
    let (width, height) = (width as usize, height as usize);
    let image = Image { pixels: &pixels[..], width, pitch: width * format.size(), height, format };
    let mut encoder = Compressor::new().unwrap();
    encoder.set_subsamp(subsampling).unwrap();
    encoder.set_progressive(progressive).unwrap();
    encoder.set_quality(85).unwrap();
    encoder.compress_to_vec(image).unwrap()
}

fn encode_png(width: u32, height: u32, colour: ::png::ColorType, pixels: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut encoder = ::png::Encoder::new(&mut bytes, width, height);
    encoder.set_color(colour);
    encoder.write_header().unwrap().write_image_data(pixels).unwrap();
    bytes
}

/// A GIF whose frame of `size` lies at (2, 1) of a canvas of 9x7, with a colour that is transparent.
fn encode_gif((width, height): (u16, u16)) -> Vec<u8> {
    let mut bytes = Vec::new();
    let palette: Vec<u8> = (0..16 * 3).map(|v| v * 5).collect();
    let mut encoder = ::gif::Encoder::new(&mut bytes, 9, 7, &palette).unwrap();
    let indices: Vec<u8> = (0..width * height).map(|v| (v % 16) as u8).collect();
    let mut frame = ::gif::Frame::from_indexed_pixels(width, height, indices, Some(3));
    (frame.left, frame.top) = (2, 1);
    encoder.write_frame(&frame).unwrap();
    drop(encoder);
    bytes
}

fn header_of(bytes: &[u8]) -> Header {
    read_header(Cursor::new(bytes), LIMITS).unwrap()
}

fn decode_region(bytes: &[u8], header: &Header, policy: Policy, wanted: Wanted) -> Result<Vec<u8>, ImageFault> {
    let mut found = Vec::new();
    decode_rows(bytes, header, policy, wanted, &mut |rows| {
        assert_eq!(rows.width(), wanted.region.width as usize);
        rows.iter().for_each(|row| found.extend_from_slice(row));
        Ok(())
    })?;
    Ok(found)
}

/// Decodes random regions, which must equal the same part of the whole picture.
fn check_regions(bytes: &[u8], header: &Header, policy: Policy, denominator: u32, name: &str) {
    let size = scaled_size(header, denominator);
    let whole = Wanted { region: Region::whole(size.0, size.1), denominator };
    let pixels = decode_region(bytes, header, policy, whole).unwrap();
    let picture = Rgb { width: size.0, height: size.1, pixels };
    let mut dice = Dice(1);
    for _ in 0..12 {
        let region = dice.roll_region(size);
        let found = decode_region(bytes, header, policy, Wanted { region, denominator }).unwrap();
        let expected: Vec<u8> = picture.rows().window(0, region).unwrap().iter().flatten().copied().collect();
        assert!(found == expected, "{name}, 1/{denominator}, {region:?}");
    }
}

#[test]
fn region_of_a_jpeg_equals_the_whole_at_every_subsampling() {
    for (width, height) in [(203, 151), (64, 48), (9, 70)] {
        for subsampling in SUBSAMPLINGS {
            for progressive in [false, true] {
                let bytes = encode_jpeg(width, height, subsampling, progressive, PixelFormat::RGB);
                let name = format!("{width}x{height} {subsampling:?}, progressive {progressive}");
                for denominator in [1, 2, 4, 8] {
                    check_regions(&bytes, &header_of(&bytes), Policy::default(), denominator, &name);
                }
            }
        }
        let bytes = encode_jpeg(width, height, Subsamp::Sub2x2, false, PixelFormat::CMYK);
        check_regions(&bytes, &header_of(&bytes), Policy::default(), 1, "CMYK");
    }
}

#[test]
fn region_of_a_turned_picture_is_told_in_the_upright_one() {
    let bytes = encode_jpeg(133, 90, Subsamp::Sub2x2, false, PixelFormat::RGB);
    let upright = header_of(&bytes);
    for value in 2..=8 {
        let header = Header { orientation: Orientation::from_value(value), ..upright };
        check_regions(&bytes, &header, Policy::default(), 1, &format!("orientation {value}"));
        check_regions(&bytes, &header, Policy::default(), 2, &format!("orientation {value}"));
        let ignored = decode(&bytes, &header, Policy { exif: false, ..Policy::default() }).unwrap();
        assert_eq!(ignored, decode(&bytes, &upright, Policy::default()).unwrap());
    }
}

#[test]
fn region_of_a_png_and_a_gif_equals_the_whole() {
    let png = encode_png(61, 45, ::png::ColorType::Rgba, &draw(61, 45, 4));
    let gif = encode_gif((6, 5));
    for alpha_white in [false, true] {
        let policy = Policy { alpha_white, exif: true };
        check_regions(&png, &header_of(&png), policy, 1, "PNG");
        check_regions(&gif, &header_of(&gif), policy, 1, "GIF");
    }
}

#[test]
fn jpeg_is_what_libjpeg_turbo_decodes_at_once() {
    for subsampling in SUBSAMPLINGS {
        let bytes = encode_jpeg(203, 151, subsampling, false, PixelFormat::RGB);
        let expected = turbojpeg::decompress(&bytes, PixelFormat::RGB).unwrap();
        let found = decode(&bytes, &header_of(&bytes), Policy::default()).unwrap();
        assert!(found.pixels == expected.pixels, "{subsampling:?}");
    }
}

#[test]
fn alpha_is_dropped_or_laid_on_white() {
    let pixels = [10, 20, 30, 0, 10, 20, 30, 255, 10, 20, 30, 128, 0, 255, 1, 1];
    let bytes = encode_png(4, 1, ::png::ColorType::Rgba, &pixels);
    let decode =
        |alpha_white| decode(&bytes, &header_of(&bytes), Policy { alpha_white, exif: true }).unwrap().pixels;
    assert_eq!(decode(false), [10, 20, 30, 10, 20, 30, 10, 20, 30, 0, 255, 1]);
    // As PIL.Image.alpha_composite gives them.
    assert_eq!(decode(true), [255, 255, 255, 10, 20, 30, 132, 137, 142, 254, 255, 254]);
}

#[test]
fn gif_frame_lies_on_its_canvas() {
    let bytes = encode_gif((6, 5));
    let decode = |alpha_white| decode(&bytes, &header_of(&bytes), Policy { alpha_white, exif: true }).unwrap();
    let (ground, white) = (decode(false), decode(true));
    assert_eq!((ground.width, ground.height), (9, 7));
    let pixel = |image: &Rgb, x: usize, y: usize| image.pixels[(y * 9 + x) * 3..][..3].to_vec();
    // The second pixel of the frame, its transparent one, and a pixel of the canvas alone.
    for (x, y, on_ground, on_white) in
        [(3, 1, [15, 20, 25], [15, 20, 25]), (5, 1, [0, 5, 10], [255; 3]), (8, 6, [0, 5, 10], [255; 3])]
    {
        assert_eq!(pixel(&ground, x, y), on_ground);
        assert_eq!(pixel(&white, x, y), on_white);
    }
}

#[test]
fn frame_larger_than_the_canvas_widens_it() {
    assert_eq!(header_of(&encode_gif((12, 5))).size(), (12, 7));
}

#[test]
fn stray_bytes_are_allowed_before_the_end_marker_only() {
    let bytes = encode_jpeg(64, 48, Subsamp::Sub2x2, false, PixelFormat::RGB);
    let header = header_of(&bytes);
    let whole = decode(&bytes, &header, Policy::default()).unwrap();
    let (body, end) = bytes.split_at(bytes.len() - 2);
    let stray = [body, b"\0\0\0", end].concat();
    assert_eq!(decode(&stray, &header, Policy::default()).unwrap(), whole);
    let fault = decode(body, &header, Policy::default()).unwrap_err();
    assert_eq!((fault.code(), fault.to_string().contains("Premature end")), ("truncated", true));
    let fault = decode(&bytes[..bytes.len() / 2], &header, Policy::default()).unwrap_err();
    assert_eq!(fault.code(), "truncated");
    // A marker in the middle of the pixels ends them.
    let at = bytes.len() * 2 / 3;
    let broken = [&bytes[..at], b"\xff\xd9", &bytes[at..]].concat();
    assert_eq!(decode(&broken, &header, Policy::default()).unwrap_err().code(), "truncated");
}

#[test]
fn damage_below_the_region_goes_unseen() {
    let bytes = encode_jpeg(64, 256, Subsamp::Sub2x2, false, PixelFormat::RGB);
    let header = header_of(&bytes);
    let wanted = |height| Wanted { region: Region { left: 0, top: 0, width: 64, height }, denominator: 1 };
    let cut = &bytes[..bytes.len() * 3 / 4];
    assert!(decode_region(cut, &header, Policy::default(), wanted(64)).is_ok());
    assert!(decode_region(cut, &header, Policy::default(), wanted(256)).is_err());
}

#[test]
fn hostile_bytes_are_faults() {
    let files = [
        encode_jpeg(60, 40, Subsamp::Sub2x2, false, PixelFormat::RGB),
        encode_jpeg(60, 40, Subsamp::Sub1x2, true, PixelFormat::RGB),
        encode_png(30, 20, ::png::ColorType::GrayscaleAlpha, &draw(30, 20, 2)),
        encode_gif((6, 5)),
    ];
    let mut dice = Dice(3);
    for file in files {
        for _ in 0..400 {
            let mut bytes = file.clone();
            for _ in 0..=dice.roll(3) {
                let at = dice.roll(bytes.len() as u32) as usize;
                bytes[at] = dice.roll(256) as u8;
            }
            let Ok(header) = read_header(Cursor::new(&bytes), LIMITS) else { continue };
            let region = dice.roll_region(header.size());
            let _ = decode(&bytes, &header, Policy::default());
            let _ = decode_region(&bytes, &header, Policy::default(), Wanted { region, denominator: 1 });
        }
    }
}
