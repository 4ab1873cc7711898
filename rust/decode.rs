//! Encoded bytes to upright RGB8 pixels: alpha dropped, 16 bits cut to the high 8, a damaged file refused.

use std::io::Cursor;

use image_webp::WebPDecoder;
use png::{ColorType, DecodingError, Transformations};
use turbojpeg::{Colorspace, Decompressor, Image, PixelFormat};

use crate::errors::{ImageFault, allocate, catch_panic};
use crate::header::{Format, Header, name_io_fault, name_webp_fault};

/// A progressive file with more scans than this only burns time.
const MAX_JPEG_SCANS: u32 = 500;
const PNG_CHUNK_BYTES: usize = 64 << 20;

/// Pixels in rows, three bytes each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rgb {
    pub width: u32,
    pub height: u32,
    pub pixels: Vec<u8>,
}

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
    decoder.set_scan_limit(MAX_JPEG_SCANS).map_err(|error| name_jpeg_fault(&error))?;
    let found = decoder.read_header(bytes).map_err(|error| name_jpeg_fault(&error))?;
    check_same_size(header, (found.width, found.height))?;
    // libjpeg does not turn four inks into RGB; that step is below, as Pillow does it.
    let inks = matches!(found.colorspace, Colorspace::CMYK | Colorspace::YCCK);
    let format = if inks { PixelFormat::CMYK } else { PixelFormat::RGB };
    let pitch = found.width * format.size();
    let mut pixels = allocate(pitch * found.height)?;
    let image = Image { pixels: &mut pixels[..], width: found.width, pitch, height: found.height, format };
    if let Err(error) = decoder.decompress(bytes, image) {
        // Any warning ends here, so that no grey pixel passes for data. Stray bytes between the last of the
        // pixels and the end marker are the exception: the picture is whole, and cameras write them.
        if !error.to_string().contains("extraneous bytes before marker 0xd9") {
            return Err(name_jpeg_fault(&error));
        }
    }
    Ok(if inks { convert_inks(&pixels) } else { pixels })
}

/// CMYK as JPEG files hold it (inverted, after Adobe) to RGB, rounded as Pillow rounds.
fn convert_inks(pixels: &[u8]) -> Vec<u8> {
    let apply = |ink: u8, black: u8| {
        let product = u32::from(255 - ink) * u32::from(black) + 128;
        black - (((product >> 8) + product) >> 8) as u8
    };
    pixels.chunks_exact(4).flat_map(|p| [apply(p[0], p[3]), apply(p[1], p[3]), apply(p[2], p[3])]).collect()
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

    #[test]
    fn inks_follow_the_adobe_convention() {
        // Inverted inks: 255 is no ink, so white; no black value (0) is full black.
        assert_eq!(convert_inks(&[255, 255, 255, 255, 9, 9, 9, 0]), [255, 255, 255, 0, 0, 0]);
        assert_eq!(convert_inks(&[0, 255, 128, 200]), [0, 200, 100]);
    }
}
