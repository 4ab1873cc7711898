//! PNG bytes to the RGB rows of a region: palettes expanded, 16 bits cut to the high 8.

use std::io::Cursor;

use png::{ColorType, Decoder, DecodingError, Limits, Transformations};

use crate::errors::{ImageFault, allocate, catch_panic};
use crate::geometry::Region;
use crate::header::{Header, name_io_fault};
use crate::rgb::{BYTES, Emit, Rows};
use crate::samples::{Samples, check_same_size, emit_region};

const CHUNK_BYTES: usize = 64 << 20;
/// Rows that are handed over at once.
const STRIP_ROWS: usize = 16;

type Reader<'a> = png::Reader<Cursor<&'a [u8]>>;

pub fn decode_rows(
    bytes: &[u8],
    header: &Header,
    alpha_white: bool,
    region: Region,
    emit: Emit<'_>,
) -> Result<(), ImageFault> {
    let mut reader = guard(|| {
        let mut decoder = Decoder::new_with_limits(Cursor::new(bytes), Limits { bytes: CHUNK_BYTES });
        decoder.set_ignore_text_chunk(true);
        decoder.set_ignore_iccp_chunk(true);
        decoder.set_transformations(Transformations::EXPAND | Transformations::STRIP_16);
        decoder.read_info()
    })?;
    check_same_size((header.width, header.height), (reader.info().width, reader.info().height))?;
    let samples = match reader.output_color_type().0 {
        ColorType::Rgb => Samples::Rgb,
        ColorType::Rgba => Samples::Rgba,
        ColorType::Grayscale => Samples::Grey,
        ColorType::GrayscaleAlpha => Samples::GreyAlpha,
        ColorType::Indexed => return Err(ImageFault::Undecodable("its palette was not expanded".into())),
    };
    if reader.info().interlaced {
        decode_whole(&mut reader, header, samples, alpha_white, region, emit)
    } else {
        stream_rows(&mut reader, header, samples, alpha_white, region, emit)
    }
}

/// The rows of an interlaced picture are complete only when its last pass is.
fn decode_whole(
    reader: &mut Reader<'_>,
    header: &Header,
    samples: Samples,
    alpha_white: bool,
    region: Region,
    emit: Emit<'_>,
) -> Result<(), ImageFault> {
    let mut pixels = allocate(reader.output_buffer_size().ok_or(ImageFault::OutOfMemory(usize::MAX))?)?;
    guard(|| reader.next_frame(&mut pixels))?;
    if samples == Samples::Rgb {
        return emit_region(&pixels, header.width, region, emit);
    }
    let mut rgb = allocate(header.width as usize * header.height as usize * BYTES)?;
    samples.write_rgb(&pixels, alpha_white, &mut rgb);
    emit_region(&rgb, header.width, region, emit)
}

fn stream_rows(
    reader: &mut Reader<'_>,
    header: &Header,
    samples: Samples,
    alpha_white: bool,
    region: Region,
    emit: Emit<'_>,
) -> Result<(), ImageFault> {
    let row_bytes = header.width as usize * samples.count();
    let mut row: Vec<u8> = allocate(row_bytes)?;
    let (width, left) = (region.width as usize, region.left as usize);
    let wanted = left * samples.count()..(left + width) * samples.count();
    let stride = width * BYTES;
    let mut strip: Vec<u8> = allocate(stride * STRIP_ROWS.min(region.height as usize))?;
    for _ in 0..region.top {
        guard(|| reader.read_row(&mut row))?;
    }
    let mut rest = region.height as usize;
    while rest > 0 {
        let count = rest.min(STRIP_ROWS);
        for target in strip.chunks_exact_mut(stride).take(count) {
            guard(|| reader.read_row(&mut row))?;
            samples.write_rgb(&row[wanted.clone()], alpha_white, target);
        }
        emit(Rows::new(&strip, width, stride, count))?;
        rest -= count;
    }
    if region.top + region.height == header.height {
        // Behind the last row: the checksums of what was read.
        guard(|| reader.read_row(&mut row))?;
    }
    Ok(())
}

/// Runs one call of the decoder.
fn guard<T>(work: impl FnOnce() -> Result<T, DecodingError>) -> Result<T, ImageFault> {
    catch_panic(|| {
        work().map_err(|error| match error {
            DecodingError::IoError(error) => name_io_fault(&error),
            other => ImageFault::Undecodable(other.to_string()),
        })
    })
}
