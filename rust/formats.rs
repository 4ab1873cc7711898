//! Which format a file has, and its header, by the reader of that format.

use std::io::{self, BufRead, Read, Seek, SeekFrom};

use crate::errors::ImageFault;
use crate::header::{Format, Header, Limits, MAX_EXIF_BYTES, check_size, name_io_fault, take};
use crate::orient::Orientation;
use crate::{gif, webp};

const PNG_MAGIC: &[u8] = b"\x89PNG\r\n\x1a\n";

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
        webp::read_header(reader, limits)
    } else if gif::MAGICS.iter().any(|gif| magic.starts_with(gif)) {
        gif::read_header(reader, limits)
    } else {
        Err(ImageFault::Undecodable("the file does not begin as one of them".into()))
    }
}

fn walk_jpeg<R: BufRead + Seek>(mut reader: R, limits: Limits) -> Result<Header, ImageFault> {
    let mut header: Option<Header> = None;
    let mut components = 0;
    let mut orientation = None;
    let mut read = |reader: &mut R| -> io::Result<Result<bool, ImageFault>> {
        let marker = next_marker(reader)?;
        if matches!(marker, 0x01 | 0xd0..=0xd8) {
            return Ok(Ok(false)); // stand-alone, without a body
        }
        if marker == 0xd9 {
            return Ok(Ok(true)); // nothing follows
        }
        let body = usize::from(u16::from_be_bytes(take(reader)?));
        let Some(body) = body.checked_sub(2) else {
            return Ok(Err(ImageFault::Undecodable("a segment is shorter than its own length".into())));
        };
        if marker == 0xda {
            // Pixels follow. A scan that leaves out a component is one of several, also where it is not progressive.
            let [found] = take(reader)?;
            if let Some(header) = &mut header {
                header.passes |= found < components;
            }
            return Ok(Ok(true));
        }
        if matches!(marker, 0xc0..=0xcf) && !matches!(marker, 0xc4 | 0xc8 | 0xcc) && header.is_none() {
            let [_, h0, h1, w0, w1, count] = take(reader)?;
            components = count;
            let (width, height) = (u16::from_be_bytes([w0, w1]), u16::from_be_bytes([h0, h1]));
            match check_size(Format::Jpeg, width.into(), height.into(), limits) {
                Ok(found) => header = Some(Header { passes: marker & 3 == 2, ..found }),
                Err(fault) => return Ok(Err(fault)),
            }
            reader.seek_relative(body as i64 - 6)?;
        } else if marker == 0xe1 && orientation.is_none() {
            let mut data = vec![0; body];
            reader.read_exact(&mut data)?;
            if data.starts_with(b"Exif\0\0") {
                // The first block counts, also where it says nothing of it: so Pillow and torchvision read it.
                orientation = Some(Orientation::from_exif(&data));
            }
        } else {
            reader.seek_relative(body as i64)?;
        }
        Ok(Ok(false))
    };
    while !read(&mut reader).map_err(|error| name_io_fault(&error))?? {}
    let header = header.ok_or_else(|| ImageFault::Undecodable("the JPEG has no frame header".into()))?;
    Ok(Header { orientation: orientation.unwrap_or_default(), ..header })
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
    let [.., w0, w1, w2, w3, h0, h1, h2, h3, _, _, _, _, interlace] = take::<29>(&mut reader).map_err(eof)?;
    let (width, height) = (u32::from_be_bytes([w0, w1, w2, w3]), u32::from_be_bytes([h0, h1, h2, h3]));
    let mut header = Header { passes: interlace != 0, ..check_size(Format::Png, width, height, limits)? };
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Cursor;

    const LIMITS: Limits = Limits { max_pixels: 2_000_000, max_bytes: 1_000_000 };

    /// One pixel, of a palette of two colours.
    const GIF: &[u8] = b"GIF89a\x01\0\x01\0\x80\0\0\0\0\0\xff\xff\xff,\0\0\0\0\x01\0\x01\0\0\x02\x02D\x01\0;";

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

    /// The segments of a JPEG before its pixels: a frame of three components and a scan of `scanned` of them.
    fn jpeg(frame: u8, scanned: u8, blocks: &[&[u8]]) -> Vec<u8> {
        let mut bytes = b"\xff\xd8".to_vec();
        for block in blocks {
            bytes.extend([&[0xff, 0xe1, 0, block.len() as u8 + 2], *block].concat());
        }
        bytes.extend([0xff, frame, 0, 17, 8, 0, 20, 0, 30, 3, 1, 0x11, 0, 2, 0x11, 0, 3, 0x11, 0]);
        bytes.extend([0xff, 0xda, 0, 6 + 2 * scanned, scanned]);
        bytes
    }

    #[test]
    fn jpeg_of_several_scans_is_held_whole() {
        for (frame, scanned, expected) in [(0xc0, 3, false), (0xc2, 3, true), (0xc0, 1, true)] {
            let header = read_header(Cursor::new(jpeg(frame, scanned, &[])), LIMITS).unwrap();
            assert_eq!((header.size(), header.passes), ((30, 20), expected), "{frame:x} {scanned}");
        }
    }

    #[test]
    fn first_exif_block_of_a_jpeg_counts() {
        const SAYS_NOTHING: &[u8] = b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0";
        const SAYS_6: &[u8] = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0";
        let size = |blocks| read_header(Cursor::new(jpeg(0xc0, 3, blocks)), LIMITS).unwrap().size();
        assert_eq!(size(&[SAYS_6, SAYS_NOTHING]), (20, 30));
        assert_eq!(size(&[b"http://ns.adobe.com/xap/1.0/", SAYS_6]), (20, 30));
        assert_eq!(size(&[SAYS_NOTHING, SAYS_6]), (30, 20));
    }

    #[test]
    fn header_faults_are_told_apart() {
        assert_eq!(code(b""), "truncated");
        assert_eq!(code(b"BM6\0\0\0"), "undecodable");
        assert_eq!(code(b"GIF89a"), "truncated");
        assert_eq!(code(GIF), "ok");
        assert_eq!(code(&GIF[..GIF.len() - 1]), "truncated");
        assert_eq!(code(&[&GIF[..19], b";"].concat()), "undecodable");
        assert_eq!(code(&[&GIF[..19], b"?"].concat()), "undecodable");
        assert_eq!(code(b"\xff\xd8"), "truncated");
        assert_eq!(code(b"\xff\xd8\xff\xd9"), "undecodable");
        assert_eq!(code(&png(10, 20)), "ok");
        assert_eq!(code(&png(0, 20)), "undecodable");
        assert_eq!(code(&png(100_000, 100_000)), "too_large");
        assert_eq!((code(&png(1_000_000, 1)), code(&png(1_000_001, 1))), ("ok", "too_large"));
        assert_eq!(code(&png(10, 20)[..40]), "truncated");
        assert_eq!(code(b"RIFF\xff\0\0\0WEBPVP8 "), "truncated");
    }
}
