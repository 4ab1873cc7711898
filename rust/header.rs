//! What an encoded image says of itself (format, size, EXIF orientation), read without its pixels.

use std::io::{self, ErrorKind, Read, Seek};

use crate::errors::{ImageFault, MAX_SIDE_PX};
use crate::orient::Orientation;

/// Largest EXIF block worth reading; a JPEG's cannot exceed 64 KiB.
pub const MAX_EXIF_BYTES: usize = 1 << 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Jpeg,
    Png,
    Webp,
    Gif,
}

/// What is refused before any buffer for pixels is asked for.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub max_pixels: u64,
    pub max_bytes: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    pub format: Format,
    /// Size as stored, before EXIF.
    pub width: u32,
    pub height: u32,
    pub orientation: Orientation,
    /// Whether the decoder must hold the whole picture: it is coded in several passes.
    pub passes: bool,
}

impl Header {
    /// (width, height) after EXIF: the frame in which boxes are given.
    #[must_use]
    pub fn size(&self) -> (u32, u32) {
        if self.orientation.swaps_sides() { (self.height, self.width) } else { (self.width, self.height) }
    }

    /// The same picture in its stored frame.
    #[must_use]
    pub fn without_orientation(self) -> Self {
        Self { orientation: Orientation::default(), ..self }
    }
}

/// The fault behind a failed read: an early end is a truncated file.
#[must_use]
pub fn name_io_fault(error: &io::Error) -> ImageFault {
    match error.kind() {
        ErrorKind::UnexpectedEof => ImageFault::Truncated("the data ends early".into()),
        ErrorKind::NotFound => ImageFault::Missing,
        _ => ImageFault::Unreadable(error.to_string()),
    }
}

/// Refuses a picture that costs too much, be it by its area or by one side.
pub fn check_pixels(width: u32, height: u32, limits: Limits) -> Result<(), ImageFault> {
    if u64::from(width) * u64::from(height) > limits.max_pixels {
        return Err(ImageFault::TooManyPixels { width, height, limit: limits.max_pixels });
    }
    if width.max(height) > MAX_SIDE_PX {
        return Err(ImageFault::TooLong { width, height });
    }
    Ok(())
}

/// A header without orientation, when its size is allowed.
pub fn check_size(format: Format, width: u32, height: u32, limits: Limits) -> Result<Header, ImageFault> {
    if width == 0 || height == 0 {
        return Err(ImageFault::Undecodable(format!("its size is {width}x{height}")));
    }
    check_pixels(width, height, limits)?;
    let passes = matches!(format, Format::Webp | Format::Gif);
    Ok(Header { format, width, height, orientation: Orientation::default(), passes })
}

/// Goes on to a place in the file; within what the reader holds already when it is near.
pub fn skip_to(reader: &mut impl Seek, at: u64) -> io::Result<()> {
    let here = reader.stream_position()?;
    reader.seek_relative(at as i64 - here as i64)
}

pub fn take<const N: usize>(reader: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    reader.read_exact(&mut bytes)?;
    Ok(bytes)
}
