//! GIF bytes to a header and to the RGB rows of a region of the first frame, laid on its canvas.

use std::io::{self, BufRead, Cursor, Seek};

use gif::{DecodeOptions, DecodingError};

use crate::errors::{ImageFault, allocate, catch_panic};
use crate::geometry::Region;
use crate::header::{Format, Header, Limits, check_size, name_io_fault, take};
use crate::rgb::{BYTES, Emit, Rows};
use crate::samples::check_same_size;

pub const MAGICS: [&[u8]; 2] = [b"GIF87a", b"GIF89a"];
/// Rows that are handed over at once.
const STRIP_ROWS: usize = 16;
const WHITE: [u8; BYTES] = [255; BYTES];

/// The canvas is as large as the file says, or as its first frame if that is larger: so torchvision reads it.
pub fn read_header<R: BufRead + Seek>(mut reader: R, limits: Limits) -> Result<Header, ImageFault> {
    let (width, height) = walk_blocks(&mut reader)
        .map_err(|error| name_io_fault(&error))?
        .ok_or_else(|| ImageFault::Undecodable("the GIF holds no picture".into()))?;
    check_size(Format::Gif, width, height, limits)
}

/// Goes over all blocks to the end mark, and gives the size; `None` when there is no frame or something unknown.
fn walk_blocks<R: BufRead + Seek>(reader: &mut R) -> io::Result<Option<(u32, u32)>> {
    let pixels = |low, high| u32::from(u16::from_le_bytes([low, high]));
    let [_, _, _, _, _, _, w0, w1, h0, h1, flags, _, _] = take(reader)?;
    let canvas = (pixels(w0, w1), pixels(h0, h1));
    let mut size = None;
    reader.seek_relative(palette_bytes(flags))?;
    loop {
        match take(reader)? {
            [0x21] => {
                take::<1>(reader)?;
            }
            [0x2c] => {
                let [_, _, _, _, w0, w1, h0, h1, flags] = take(reader)?;
                size = size.or(Some((canvas.0.max(pixels(w0, w1)), canvas.1.max(pixels(h0, h1)))));
                reader.seek_relative(palette_bytes(flags) + 1)?;
            }
            [0x3b] => return Ok(size),
            _ => return Ok(None),
        }
        loop {
            let [len] = take(reader)?;
            if len == 0 {
                break;
            }
            reader.seek_relative(len.into())?;
        }
    }
}

fn palette_bytes(flags: u8) -> i64 {
    if flags & 0x80 == 0 { 0 } else { 3 << ((flags & 7) + 1) }
}

/// The first frame as it is stored.
struct Frame {
    /// One index of a colour for each pixel.
    indices: Vec<u8>,
    left: usize,
    top: usize,
    width: usize,
    palette: Vec<[u8; BYTES]>,
    /// The colour of pixels outside of the frame, and of transparent ones.
    ground: [u8; BYTES],
    transparent: Option<u8>,
}

pub fn decode_rows(
    bytes: &[u8],
    header: &Header,
    alpha_white: bool,
    region: Region,
    emit: Emit<'_>,
) -> Result<(), ImageFault> {
    let canvas = walk_blocks(&mut Cursor::new(bytes)).map_err(|error| name_io_fault(&error))?;
    check_same_size((header.width, header.height), canvas.unwrap_or_default())?;
    let frame = catch_panic(|| read_frame(bytes, alpha_white))?;
    let (width, height) = (region.width as usize, region.height as usize);
    let mut strip: Vec<[u8; BYTES]> = allocate(width * STRIP_ROWS.min(height))?;
    for first in (0..height).step_by(STRIP_ROWS) {
        let count = STRIP_ROWS.min(height - first);
        for (row, target) in strip.chunks_exact_mut(width).take(count).enumerate() {
            frame.write_row(region.top as usize + first + row, region.left as usize, target);
        }
        emit(Rows::new(strip.as_flattened(), width, width * BYTES, count))?;
    }
    Ok(())
}

fn read_frame(bytes: &[u8], alpha_white: bool) -> Result<Frame, ImageFault> {
    let mut decoder = DecodeOptions::new().read_info(Cursor::new(bytes)).map_err(name_fault)?;
    let found = decoder.next_frame_info().map_err(name_fault)?;
    let found = found.ok_or_else(|| ImageFault::Undecodable("the GIF holds no picture".into()))?.clone();
    let mut indices = allocate(usize::from(found.width) * usize::from(found.height))?;
    decoder.read_into_buffer(&mut indices).map_err(name_fault)?;
    let colours =
        |palette: &[u8]| -> Vec<[u8; BYTES]> { palette.chunks_exact(BYTES).map(|p| [p[0], p[1], p[2]]).collect() };
    let shared = decoder.global_palette().map(colours).unwrap_or_default();
    // torchvision lays the frame on the background colour. Pillow fills with a colour index: the transparent one,
    // which is then white, or 0.
    let background = decoder.bg_color().and_then(|index| shared.get(index).copied()).unwrap_or_default();
    let palette = found.palette.as_deref().map_or(shared, colours);
    let ground = match (alpha_white, found.transparent) {
        (false, _) => background,
        (true, Some(_)) => WHITE,
        (true, None) => palette.first().copied().unwrap_or_default(),
    };
    if indices.iter().any(|&index| usize::from(index) >= palette.len() && Some(index) != found.transparent) {
        return Err(ImageFault::Undecodable("a pixel has a colour that is not in the palette".into()));
    }
    let (left, top, width) = (found.left.into(), found.top.into(), found.width.into());
    Ok(Frame { indices, left, top, width, palette, ground, transparent: found.transparent })
}

impl Frame {
    /// Row `y` of the canvas from column `left` on.
    fn write_row(&self, y: usize, left: usize, target: &mut [[u8; BYTES]]) {
        target.fill(self.ground);
        let row = y.checked_sub(self.top).and_then(|y| self.indices.get(y * self.width..(y + 1) * self.width));
        let Some(row) = row else { return };
        let row = row.get(left.saturating_sub(self.left)..).unwrap_or_default();
        for (pixel, &index) in target.iter_mut().skip(self.left.saturating_sub(left)).zip(row) {
            if Some(index) != self.transparent {
                *pixel = self.palette[usize::from(index)];
            }
        }
    }
}

fn name_fault(error: DecodingError) -> ImageFault {
    match error {
        DecodingError::Io(error) => name_io_fault(&error),
        DecodingError::UnexpectedEof => name_io_fault(&io::ErrorKind::UnexpectedEof.into()),
        other => ImageFault::Undecodable(other.to_string()),
    }
}
