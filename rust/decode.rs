//! Encoded bytes to upright RGB8 pixels: alpha dropped, 16 bits cut to the high 8, a damaged file refused.

use std::io::Cursor;

use image_webp::WebPDecoder;
use png::{ColorType, DecodingError, Transformations};
use turbojpeg::{Colorspace, Decompressor, Image, PixelFormat};

use crate::errors::{ImageFault, allocate, catch_panic};
use crate::header::{Format, Header, name_io_fault, name_webp_fault};
use crate::rgb::Rgb;

/// Pixels that all scans of a JPEG together may go over: more only burn time. Encoders write about ten scans.
const MAX_SCANNED_PIXELS: u64 = 1 << 31;
const PNG_CHUNK_BYTES: usize = 64 << 20;

/// Decodes `bytes`, whose header was read before, and turns the pixels as EXIF says.
pub fn decode(bytes: &[u8], header: &Header) -> Result<Rgb, ImageFault> {
    let pixels = match header.format {
        Format::Jpeg => decode_jpeg(bytes, header)?,
        Format::Png => catch_panic(|| decode_png(bytes, header))?,
        Format::Webp => catch_panic(|| decode_webp(bytes, header))?,
    };
    header.orientation.apply(Rgb { width: header.width, height: header.height, pixels })
}

fn decode_jpeg(bytes: &[u8], header: &Header) -> Result<Vec<u8>, ImageFault> {
    let mut decoder = Decompressor::new().map_err(|error| name_jpeg_fault(&error))?;
    decoder.set_scan_limit(scan_limit(header)).map_err(|error| name_jpeg_fault(&error))?;
    let found = decoder.read_header(bytes).map_err(|error| name_jpeg_fault(&error))?;
    check_same_size(header, (found.width, found.height))?;
    // libjpeg does not turn four inks into RGB; that step is below, as Pillow does it.
    let inks = matches!(found.colorspace, Colorspace::CMYK | Colorspace::YCCK);
    let format = if inks { PixelFormat::CMYK } else { PixelFormat::RGB };
    let pitch = found.width * format.size();
    let mut pixels = allocate(pitch * found.height)?;
    let (width, height) = (found.width, found.height);
    let mut decompress = |bytes: &[u8]| {
        let image = Image { pixels: &mut pixels[..], width, pitch, height, format };
        decoder.decompress(bytes, image)
    };
    // Any warning is a fault, so that no grey pixel passes for data. Stray bytes before the end marker are the
    // exception, since cameras write them. libjpeg tells its first warning only: they are cut out, and then
    // there may be none at all.
    if let Err(error) = decompress(bytes) {
        let whole =
            cut_stray_bytes(bytes, &error.to_string()).ok_or_else(|| name_decompress_fault(&error, header))?;
        decompress(&whole).map_err(|error| name_decompress_fault(&error, header))?;
    }
    if inks { convert_inks(&pixels) } else { Ok(pixels) }
}

/// Most scans of a JPEG of this size.
fn scan_limit(header: &Header) -> u32 {
    let pixels = u64::from(header.width) * u64::from(header.height);
    (MAX_SCANNED_PIXELS / pixels).clamp(16, 500) as u32
}

/// The file without its stray bytes before the end marker, when `warning` tells of such; `None` for another warning.
fn cut_stray_bytes(bytes: &[u8], warning: &str) -> Option<Vec<u8>> {
    let (before, _) = warning.split_once(" extraneous bytes before marker 0xd9")?;
    let count: usize = before.rsplit(' ').next()?.parse().ok()?;
    let end = find_end_marker(bytes)?;
    let mut whole = Vec::new();
    whole.try_reserve_exact(bytes.len()).ok()?;
    whole.extend_from_slice(bytes.get(..end.checked_sub(count)?)?);
    whole.extend_from_slice(&[0xff, 0xd9]);
    Some(whole)
}

/// Where a JPEG's end marker begins, its fill bytes included.
fn find_end_marker(bytes: &[u8]) -> Option<usize> {
    let mut at = 0;
    loop {
        let start = at + bytes.get(at..)?.iter().position(|&byte| byte == 0xff)?;
        at = start + bytes[start..].iter().position(|&byte| byte != 0xff)?;
        let marker = bytes[at];
        at += 1;
        match marker {
            0xd9 => return Some(start),
            0x00 | 0x01 | 0xd0..=0xd8 => {} // a byte of pixels, or a marker without a body
            _ => at += usize::from(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?])),
        }
    }
}

/// CMYK as JPEG files hold it (inverted, after Adobe) to RGB, rounded as Pillow rounds.
fn convert_inks(pixels: &[u8]) -> Result<Vec<u8>, ImageFault> {
    let apply = |ink: u8, black: u8| {
        let product = u32::from(255 - ink) * u32::from(black) + 128;
        black - (((product >> 8) + product) >> 8) as u8
    };
    let mut rgb = allocate(pixels.len() / 4 * 3)?;
    for (target, p) in rgb.chunks_exact_mut(3).zip(pixels.chunks_exact(4)) {
        target.copy_from_slice(&[apply(p[0], p[3]), apply(p[1], p[3]), apply(p[2], p[3])]);
    }
    Ok(rgb)
}

fn name_decompress_fault(error: &turbojpeg::Error, header: &Header) -> ImageFault {
    if error.to_string().contains("more than") && error.to_string().contains("scans") {
        let (Header { width, height, .. }, limit) = (header, scan_limit(header));
        return ImageFault::Undecodable(format!(
            "it has more than {limit} scans, the limit at {width}x{height} pixels"
        ));
    }
    name_jpeg_fault(error)
}

fn name_jpeg_fault(error: &turbojpeg::Error) -> ImageFault {
    let text = error.to_string();
    let why = text.rsplit_once(": ").map_or(text.as_str(), |(_, why)| why).to_owned();
    if text.to_lowercase().contains("premature end") {
        ImageFault::Truncated(why)
    } else {
        ImageFault::Undecodable(why)
    }
}

fn decode_png(bytes: &[u8], header: &Header) -> Result<Vec<u8>, ImageFault> {
    let limits = png::Limits { bytes: PNG_CHUNK_BYTES };
    let mut decoder = png::Decoder::new_with_limits(Cursor::new(bytes), limits);
    decoder.set_ignore_text_chunk(true);
    decoder.set_ignore_iccp_chunk(true);
    decoder.set_transformations(Transformations::EXPAND | Transformations::STRIP_16);
    let mut reader = decoder.read_info().map_err(|error| name_png_fault(&error))?;
    check_same_size(header, (reader.info().width as usize, reader.info().height as usize))?;
    let len = reader.output_buffer_size().ok_or(ImageFault::OutOfMemory(usize::MAX))?;
    let mut pixels = allocate(len)?;
    let found = reader.next_frame(&mut pixels).map_err(|error| name_png_fault(&error))?;
    match found.color_type {
        ColorType::Rgb => Ok(pixels),
        ColorType::Rgba => keep_rgb(&pixels, header),
        ColorType::Grayscale => spread_grey(&pixels, 1, header),
        ColorType::GrayscaleAlpha => spread_grey(&pixels, 2, header),
        ColorType::Indexed => Err(ImageFault::Undecodable("its palette was not expanded".into())),
    }
}

fn name_png_fault(error: &DecodingError) -> ImageFault {
    match error {
        DecodingError::IoError(error) => name_io_fault(error),
        other => ImageFault::Undecodable(other.to_string()),
    }
}

fn decode_webp(bytes: &[u8], header: &Header) -> Result<Vec<u8>, ImageFault> {
    let mut decoder = WebPDecoder::new(Cursor::new(bytes)).map_err(|error| name_webp_fault(&error))?;
    let (width, height) = decoder.dimensions();
    check_same_size(header, (width as usize, height as usize))?;
    let len = decoder.output_buffer_size().ok_or(ImageFault::OutOfMemory(usize::MAX))?;
    let mut pixels = allocate(len)?;
    // No chunk is larger than the file, whatever its length field says.
    decoder.set_memory_limit(bytes.len().saturating_add(len));
    decoder.read_image(&mut pixels).map_err(|error| name_webp_fault(&error))?;
    if decoder.has_alpha() { keep_rgb(&pixels, header) } else { Ok(pixels) }
}

/// The header was read from the same file moments before: another size means that it changed, or lies.
fn check_same_size(header: &Header, (width, height): (usize, usize)) -> Result<(), ImageFault> {
    if (header.width as usize, header.height as usize) == (width, height) {
        return Ok(());
    }
    let Header { width: old_width, height: old_height, .. } = header;
    Err(ImageFault::Undecodable(format!("{old_width}x{old_height} by its header, then {width}x{height}")))
}

fn keep_rgb(rgba: &[u8], header: &Header) -> Result<Vec<u8>, ImageFault> {
    let mut rgb = allocate(header.width as usize * header.height as usize * 3)?;
    for (pixel, source) in rgb.chunks_exact_mut(3).zip(rgba.chunks_exact(4)) {
        pixel.copy_from_slice(&source[..3]);
    }
    Ok(rgb)
}

fn spread_grey(grey: &[u8], step: usize, header: &Header) -> Result<Vec<u8>, ImageFault> {
    let mut rgb = allocate(header.width as usize * header.height as usize * 3)?;
    for (pixel, source) in rgb.chunks_exact_mut(3).zip(grey.chunks_exact(step)) {
        pixel.fill(source[0]);
    }
    Ok(rgb)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::orient::Orientation;

    #[test]
    fn inks_follow_the_adobe_convention() {
        // Inverted inks: 255 is no ink, so white; no black value (0) is full black.
        assert_eq!(convert_inks(&[255, 255, 255, 255, 9, 9, 9, 0]).unwrap(), [255, 255, 255, 0, 0, 0]);
        assert_eq!(convert_inks(&[0, 255, 128, 200]).unwrap(), [0, 200, 100]);
    }

    #[test]
    fn larger_pictures_may_have_fewer_scans() {
        for ((width, height), expected) in [((64, 64), 500), ((4000, 3000), 178), ((13_000, 13_000), 16)] {
            let header = Header { format: Format::Jpeg, width, height, orientation: Orientation::default() };
            assert_eq!(scan_limit(&header), expected, "{width}x{height}");
        }
    }

    #[test]
    fn stray_bytes_are_cut_before_the_end_marker_of_the_picture() {
        // An application segment that holds an end marker, pixels with a stuffed byte and a restart, two fill bytes.
        let head = b"\xff\xd8\xff\xe1\0\x06\xff\xd9..\xff\xda\0\x02pix\xff\0\xff\xd0els".as_slice();
        let file = [head, b"\0\0\0\xff\xff\xff\xd9 tail \xff\xd9"].concat();
        let warning = "Corrupt JPEG data: 3 extraneous bytes before marker 0xd9";
        assert_eq!(cut_stray_bytes(&file, warning).unwrap(), [head, b"\xff\xd9"].concat());
        assert_eq!(cut_stray_bytes(&file, "Premature end of JPEG file"), None);
        assert_eq!(cut_stray_bytes(&file[..20], warning), None);
    }
}
