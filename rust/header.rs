//! What an encoded image says of itself (format, size, EXIF orientation), read without its pixels.

use std::io::{self, BufRead, ErrorKind, Read, Seek, SeekFrom};

use crate::errors::ImageFault;
use crate::orient::Orientation;

/// Largest EXIF block worth reading; a JPEG's cannot exceed 64 KiB.
const MAX_EXIF_BYTES: usize = 1 << 20;
const PNG_MAGIC: &[u8] = b"\x89PNG\r\n\x1a\n";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Jpeg,
    Png,
    Webp,
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
}

impl Header {
    /// (width, height) after EXIF: the frame in which boxes are given.
    #[must_use]
    pub fn size(&self) -> (u32, u32) {
        if self.orientation.swaps_sides() { (self.height, self.width) } else { (self.width, self.height) }
    }
}

/// Reads the header at the start of `reader`, refusing what is over `limits`.
pub fn read_header<R: BufRead + Seek>(mut reader: R, limits: Limits) -> Result<Header, ImageFault> {
    let mut magic = Vec::with_capacity(12);
    reader.by_ref().take(12).read_to_end(&mut magic).map_err(|error| name_io_fault(&error))?;
    if magic.is_empty() {
        return Err(ImageFault::Truncated("the file is empty".into()));
    }
    reader.rewind().map_err(|error| name_io_fault(&error))?;
    if magic.starts_with(&[0xff, 0xd8]) {
        walk_jpeg(reader, limits)
    } else if magic.starts_with(PNG_MAGIC) {
        walk_png(reader, limits)
    } else if magic.starts_with(b"RIFF") && magic.get(8..12).is_none_or(|kind| kind == b"WEBP") {
        read_webp(reader, limits)
    } else {
        Err(ImageFault::Undecodable("the file does not begin as one of them".into()))
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

fn check_size(format: Format, width: u32, height: u32, limits: Limits) -> Result<Header, ImageFault> {
    if width == 0 || height == 0 {
        return Err(ImageFault::Undecodable(format!("its size is {width}x{height}")));
    }
    if u64::from(width) * u64::from(height) > limits.max_pixels {
        return Err(ImageFault::TooManyPixels { width, height, limit: limits.max_pixels });
    }
    Ok(Header { format, width, height, orientation: Orientation::default() })
}

fn walk_jpeg<R: BufRead + Seek>(mut reader: R, limits: Limits) -> Result<Header, ImageFault> {
    let mut header = None;
    let mut orientation = Orientation::default();
    let mut read = |reader: &mut R| -> io::Result<Result<bool, ImageFault>> {
        let marker = next_marker(reader)?;
        if matches!(marker, 0x01 | 0xd0..=0xd8) {
            return Ok(Ok(false)); // stand-alone, without a body
        }
        if matches!(marker, 0xd9 | 0xda) {
            return Ok(Ok(true)); // pixels (or nothing) follow
        }
        let body = usize::from(u16::from_be_bytes(take(reader)?));
        let Some(body) = body.checked_sub(2) else {
            return Ok(Err(ImageFault::Undecodable("a segment is shorter than its own length".into())));
        };
        if matches!(marker, 0xc0..=0xcf) && !matches!(marker, 0xc4 | 0xc8 | 0xcc) && header.is_none() {
            let [_, h0, h1, w0, w1] = take::<5>(reader)?;
            let (width, height) = (u16::from_be_bytes([w0, w1]), u16::from_be_bytes([h0, h1]));
            match check_size(Format::Jpeg, width.into(), height.into(), limits) {
                Ok(found) => header = Some(found),
                Err(fault) => return Ok(Err(fault)),
            }
            reader.seek_relative(body as i64 - 5)?;
        } else if marker == 0xe1 && orientation == Orientation::default() {
            let mut data = vec![0; body];
            reader.read_exact(&mut data)?;
            if data.starts_with(b"Exif\0\0") {
                orientation = Orientation::from_exif(&data);
            }
        } else {
            reader.seek_relative(body as i64)?;
        }
        Ok(Ok(false))
    };
    while !read(&mut reader).map_err(|error| name_io_fault(&error))?? {}
    let header = header.ok_or_else(|| ImageFault::Undecodable("the JPEG has no frame header".into()))?;
    Ok(Header { orientation, ..header })
}

/// Skips to the next JPEG marker, over fill bytes and stray data as libjpeg does.
fn next_marker(reader: &mut impl Read) -> io::Result<u8> {
    loop {
        while take::<1>(reader)? != [0xff] {}
        let mut byte = 0xff;
        while byte == 0xff {
            [byte] = take(reader)?;
        }
        if byte != 0 {
            return Ok(byte);
        }
    }
}

fn walk_png<R: BufRead + Seek>(mut reader: R, limits: Limits) -> Result<Header, ImageFault> {
    let eof = |error: io::Error| name_io_fault(&error);
    let [.., w0, w1, w2, w3, h0, h1, h2, h3] = take::<24>(&mut reader).map_err(eof)?;
    let (width, height) = (u32::from_be_bytes([w0, w1, w2, w3]), u32::from_be_bytes([h0, h1, h2, h3]));
    let mut header = check_size(Format::Png, width, height, limits)?;
    reader.seek(SeekFrom::Start(PNG_MAGIC.len() as u64)).map_err(eof)?;
    // To the end: eXIf may stand behind the pixels, and a missing IEND is a truncated file.
    loop {
        let [l0, l1, l2, l3, kind @ ..] = take::<8>(&mut reader).map_err(eof)?;
        let len = u32::from_be_bytes([l0, l1, l2, l3]);
        match &kind {
            b"IEND" => {
                take::<4>(&mut reader).map_err(eof)?;
                return Ok(header);
            }
            b"eXIf" if len as usize <= MAX_EXIF_BYTES => {
                let mut data = vec![0; len as usize];
                reader.read_exact(&mut data).map_err(eof)?;
                header.orientation = Orientation::from_exif(&data);
                reader.seek_relative(4).map_err(eof)?;
            }
            _ => reader.seek_relative(i64::from(len) + 4).map_err(eof)?,
        }
    }
}

fn read_webp<R: BufRead + Seek>(mut reader: R, limits: Limits) -> Result<Header, ImageFault> {
    let eof = |error: io::Error| name_io_fault(&error);
    let [.., l0, l1, l2, l3] = take::<8>(&mut reader).map_err(eof)?;
    let len = reader.seek(SeekFrom::End(0)).map_err(eof)?;
    let promised = u64::from(u32::from_le_bytes([l0, l1, l2, l3])) + 8;
    if len < promised {
        return Err(ImageFault::Truncated(format!("{len} of {promised} bytes")));
    }
    reader.rewind().map_err(eof)?;
    let mut webp = image_webp::WebPDecoder::new(&mut reader).map_err(|error| name_webp_fault(&error))?;
    let (width, height) = webp.dimensions();
    let mut header = check_size(Format::Webp, width, height, limits)?;
    webp.set_memory_limit(MAX_EXIF_BYTES);
    if let Ok(Some(data)) = webp.exif_metadata() {
        header.orientation = Orientation::from_exif(&data);
    }
    check_webp_frames(&mut reader, (width, height))?;
    Ok(header)
}

/// Refuses an extended file whose frame has another size than promised: the decoder asks for the memory of a lossy
/// frame before it compares.
fn check_webp_frames<R: BufRead + Seek>(reader: &mut R, canvas: (u32, u32)) -> Result<(), ImageFault> {
    let eof = |error: io::Error| name_io_fault(&error);
    let end = reader.seek(SeekFrom::End(0)).map_err(eof)?;
    let mut at = 12;
    let mut animated = false;
    // Every still frame, and the first one of an animation: the ones that the decoder may take.
    reader.seek(SeekFrom::Start(at)).map_err(eof)?;
    while at + 8 <= end {
        skip_to(reader, at).map_err(eof)?;
        let (kind, next) = take_chunk(reader, at).map_err(eof)?;
        match &kind {
            b"VP8X" if at == 12 => {}
            _ if at == 12 => return Ok(()), // a plain file: its one frame says the size
            b"ANMF" if !animated => {
                animated = true;
                let [.., w0, w1, w2, h0, h1, h2, _, _, _, _] = take::<16>(reader).map_err(eof)?;
                let side = |low, middle, high| u32::from_le_bytes([low, middle, high, 0]) + 1;
                let promised = (side(w0, w1, w2), side(h0, h1, h2));
                let (mut kind, next) = take_chunk(reader, at + 24).map_err(eof)?;
                if &kind == b"ALPH" {
                    skip_to(reader, next).map_err(eof)?;
                    (kind, _) = take_chunk(reader, next).map_err(eof)?;
                }
                check_webp_frame(reader, kind, promised).map_err(eof)??;
            }
            _ => check_webp_frame(reader, kind, canvas).map_err(eof)??,
        }
        at = next;
    }
    Ok(())
}

/// Goes on to a place; within what the reader holds already when it is near.
fn skip_to(reader: &mut impl Seek, at: u64) -> io::Result<()> {
    let here = reader.stream_position()?;
    reader.seek_relative(at as i64 - here as i64)
}

/// The kind of the chunk that begins at `at`, where the reader stands, and where the next one begins.
fn take_chunk(reader: &mut impl Read, at: u64) -> io::Result<([u8; 4], u64)> {
    let [k0, k1, k2, k3, l0, l1, l2, l3] = take(reader)?;
    let len = u64::from(u32::from_le_bytes([l0, l1, l2, l3]));
    Ok(([k0, k1, k2, k3], at + 8 + len + len % 2))
}

fn check_webp_frame(
    reader: &mut impl Read,
    kind: [u8; 4],
    promised: (u32, u32),
) -> io::Result<Result<(), ImageFault>> {
    let found = match &kind {
        b"VP8 " => {
            let [.., w0, w1, h0, h1] = take::<10>(reader)?;
            let side = |low, high| u32::from(u16::from_le_bytes([low, high]) & 0x3fff);
            (side(w0, w1), side(h0, h1))
        }
        b"VP8L" => {
            let [_, bits @ ..] = take::<5>(reader)?;
            let bits = u32::from_le_bytes(bits);
            ((bits & 0x3fff) + 1, (bits >> 14 & 0x3fff) + 1)
        }
        _ => return Ok(Ok(())),
    };
    if found == promised {
        return Ok(Ok(()));
    }
    let ((width, height), (old_width, old_height)) = (found, promised);
    Ok(Err(ImageFault::Undecodable(format!(
        "it holds a frame of {width}x{height} pixels where its header says {old_width}x{old_height}"
    ))))
}

/// The fault behind an error of the WebP decoder.
#[must_use]
pub fn name_webp_fault(error: &image_webp::DecodingError) -> ImageFault {
    match error {
        image_webp::DecodingError::IoError(error) => name_io_fault(error),
        other => ImageFault::Undecodable(other.to_string()),
    }
}

fn take<const N: usize>(reader: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    reader.read_exact(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Cursor;

    const LIMITS: Limits = Limits { max_pixels: 1_000_000, max_bytes: 1_000_000 };

    fn code(bytes: &[u8]) -> &'static str {
        read_header(Cursor::new(bytes), LIMITS).map_or_else(|fault| fault.code(), |_| "ok")
    }

    fn png(width: u32, height: u32) -> Vec<u8> {
        let mut bytes = PNG_MAGIC.to_vec();
        bytes.extend(b"\0\0\0\x0dIHDR");
        bytes.extend(width.to_be_bytes());
        bytes.extend(height.to_be_bytes());
        bytes.extend(b"\x08\x02\0\0\0crc!\0\0\0\0IENDcrc!");
        bytes
    }

    #[test]
    fn header_faults_are_told_apart() {
        assert_eq!(code(b""), "truncated");
        assert_eq!(code(b"GIF89a"), "undecodable");
        assert_eq!(code(b"\xff\xd8"), "truncated");
        assert_eq!(code(b"\xff\xd8\xff\xd9"), "undecodable");
        assert_eq!(code(&png(10, 20)), "ok");
        assert_eq!(code(&png(0, 20)), "undecodable");
        assert_eq!(code(&png(100_000, 100_000)), "too_large");
        assert_eq!(code(&png(10, 20)[..40]), "truncated");
        assert_eq!(code(b"RIFF\xff\0\0\0WEBPVP8 "), "truncated");
    }
}
