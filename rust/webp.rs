//! WebP bytes to a header and to the RGB rows of a region, by libwebp as Pillow and torchvision; of an animation the
//! first frame.
#![expect(unsafe_code, reason = "libwebp is called")]

use std::io::{self, BufRead, Cursor, Seek, SeekFrom};

use libwebp_sys::{VP8StatusCode, WEBP_CSP_MODE, WebPDecode, WebPDecoderConfig, WebPRGBABuffer};

use crate::errors::{ImageFault, allocate};
use crate::geometry::Region;
use crate::header::{Format, Header, Limits, MAX_EXIF_BYTES, check_size, name_io_fault, skip_to, take};
use crate::orient::Orientation;
use crate::rgb::{BYTES, Emit};
use crate::samples::{Samples, check_same_size, emit_region};

/// Bits of the flags of an extended file.
const HAS_ALPHA: u8 = 0x10;
const IS_ANIMATED: u8 = 0x02;

pub fn read_header<R: BufRead + Seek>(mut reader: R, limits: Limits) -> Result<Header, ImageFault> {
    let layout = walk_chunks(&mut reader)?;
    let (width, height) = layout.canvas;
    let mut header = check_size(Format::Webp, width, height, limits)?;
    header.orientation = layout.orientation;
    Ok(header)
}

pub fn decode_rows(
    bytes: &[u8],
    header: &Header,
    alpha_white: bool,
    region: Region,
    emit: Emit<'_>,
) -> Result<(), ImageFault> {
    let layout = walk_chunks(&mut Cursor::new(bytes))?;
    check_same_size((header.width, header.height), layout.canvas)?;
    let on_white = alpha_white && layout.has_alpha;
    let Some(frame) = layout.frame else {
        return emit_region(&decode_frame(bytes, layout.canvas, on_white)?, header.width, region, emit);
    };
    let bytes = bytes.get(frame.start..frame.end).ok_or_else(|| name_io_fault(&early_end()))?;
    let pixels = decode_frame(bytes, frame.size, on_white)?;
    if frame.size == layout.canvas {
        return emit_region(&pixels, header.width, region, emit);
    }
    let mut canvas = allocate(header.width as usize * header.height as usize * BYTES)?;
    if on_white {
        canvas.fill(255);
    }
    let (line, stride) = (frame.size.0 as usize * BYTES, header.width as usize * BYTES);
    let (left, top) = (frame.left as usize * BYTES, frame.top as usize);
    for (target, row) in canvas.chunks_exact_mut(stride).skip(top).zip(pixels.chunks_exact(line)) {
        target[left..left + line].copy_from_slice(row);
    }
    emit_region(&canvas, header.width, region, emit)
}

/// Decodes one picture of `size`: a whole file, or what a frame of an animation holds.
fn decode_frame(bytes: &[u8], size: (u32, u32), on_white: bool) -> Result<Vec<u8>, ImageFault> {
    if !on_white {
        return run_libwebp(bytes, size, WEBP_CSP_MODE::MODE_RGB, BYTES);
    }
    let pixels = run_libwebp(bytes, size, WEBP_CSP_MODE::MODE_RGBA, Samples::Rgba.count())?;
    let mut rgb = allocate(pixels.len() / Samples::Rgba.count() * BYTES)?;
    Samples::Rgba.write_rgb(&pixels, true, &mut rgb);
    Ok(rgb)
}

fn run_libwebp(
    bytes: &[u8],
    (width, height): (u32, u32),
    mode: WEBP_CSP_MODE,
    pixel_bytes: usize,
) -> Result<Vec<u8>, ImageFault> {
    let mut config = WebPDecoderConfig::new().map_err(|()| name_fault(VP8StatusCode::VP8_STATUS_INVALID_PARAM))?;
    let stride = width as usize * pixel_bytes;
    let mut pixels: Vec<u8> = allocate(stride * height as usize)?;
    config.output.colorspace = mode;
    config.output.is_external_memory = 1;
    config.output.u.RGBA = WebPRGBABuffer { rgba: pixels.as_mut_ptr(), stride: stride as i32, size: pixels.len() };
    // SAFETY: `bytes` is as long as told. The picture goes into `pixels`, of which libwebp knows the length: it
    // refuses a picture that needs more. Nothing of its own is left allocated, as the buffer is ours.
    let status = unsafe { WebPDecode(bytes.as_ptr(), bytes.len(), &raw mut config) };
    if status != VP8StatusCode::VP8_STATUS_OK {
        return Err(name_fault(status));
    }
    // A smaller picture would leave the rest of the buffer black.
    check_same_size((width, height), (config.output.width as u32, config.output.height as u32))?;
    Ok(pixels)
}

fn name_fault(status: VP8StatusCode) -> ImageFault {
    match status {
        VP8StatusCode::VP8_STATUS_SUSPENDED | VP8StatusCode::VP8_STATUS_NOT_ENOUGH_DATA => {
            name_io_fault(&early_end())
        }
        VP8StatusCode::VP8_STATUS_OUT_OF_MEMORY => ImageFault::OutOfMemory(1),
        VP8StatusCode::VP8_STATUS_UNSUPPORTED_FEATURE => {
            ImageFault::Undecodable("it uses a feature of WebP that is not supported".into())
        }
        _ => ImageFault::Undecodable("its WebP data is corrupt".into()),
    }
}

fn early_end() -> io::Error {
    io::ErrorKind::UnexpectedEof.into()
}

/// What the chunks of a file say.
struct Layout {
    canvas: (u32, u32),
    has_alpha: bool,
    orientation: Orientation,
    /// The first frame of an animation; `None` for a still picture, which libwebp finds by itself.
    frame: Option<Frame>,
}

/// A frame of an animation: where its data is in the file, and its place on the canvas.
struct Frame {
    start: usize,
    end: usize,
    left: u32,
    top: u32,
    size: (u32, u32),
}

/// Goes over all chunks, refusing a file that ends early or whose frame has another size than it promises.
fn walk_chunks<R: BufRead + Seek>(reader: &mut R) -> Result<Layout, ImageFault> {
    let eof = |error: io::Error| name_io_fault(&error);
    let [.., l0, l1, l2, l3] = take::<8>(reader).map_err(eof)?;
    let promised = u64::from(u32::from_le_bytes([l0, l1, l2, l3])) + 8;
    let len = reader.seek(SeekFrom::End(0)).map_err(eof)?;
    if len < promised {
        return Err(ImageFault::Truncated(format!("{len} of {promised} bytes")));
    }
    reader.seek(SeekFrom::Start(12)).map_err(eof)?;
    let (kind, mut at) = take_chunk(reader, 12).map_err(eof)?;
    if &kind != b"VP8X" {
        let (canvas, has_alpha) = read_frame_head(reader, kind).map_err(eof)?.ok_or_else(no_picture)?;
        return Ok(Layout { canvas, has_alpha, orientation: Orientation::default(), frame: None });
    }
    let [flags, _, _, _, w0, w1, w2, h0, h1, h2] = take(reader).map_err(eof)?;
    let (has_alpha, is_animated) = (flags & HAS_ALPHA != 0, flags & IS_ANIMATED != 0);
    let canvas = read_sides([w0, w1, w2, h0, h1, h2]);
    let mut layout = Layout { canvas, has_alpha, orientation: Orientation::default(), frame: None };
    let mut has_picture = false;
    while at + 8 <= promised {
        skip_to(reader, at).map_err(eof)?;
        let start = at;
        let (kind, next) = take_chunk(reader, at).map_err(eof)?;
        at = next;
        match &kind {
            b"ANMF" if is_animated && layout.frame.is_none() => {
                layout.frame = Some(read_frame(reader, start, next, canvas)?);
                has_picture = true;
            }
            b"EXIF" if next - start <= MAX_EXIF_BYTES as u64 => {
                let mut data = vec![0; (next - start - 8) as usize];
                reader.read_exact(&mut data).map_err(eof)?;
                layout.orientation = Orientation::from_exif(&data);
            }
            _ if !is_animated => {
                if let Some((size, _)) = read_frame_head(reader, kind).map_err(eof)? {
                    check_frame_size(size, canvas)?;
                    has_picture = true;
                }
            }
            _ => {}
        }
    }
    if has_picture { Ok(layout) } else { Err(no_picture()) }
}

/// The frame whose chunk begins at `start` and of which the reader stands behind the chunk's head.
fn read_frame<R: BufRead + Seek>(
    reader: &mut R,
    start: u64,
    end: u64,
    canvas: (u32, u32),
) -> Result<Frame, ImageFault> {
    let eof = |error: io::Error| name_io_fault(&error);
    let [x0, x1, x2, y0, y1, y2, w0, w1, w2, h0, h1, h2, ..] = take::<16>(reader).map_err(eof)?;
    // Places are told in steps of two pixels.
    let [left, top] =
        [[x0, x1, x2], [y0, y1, y2]].map(|[low, middle, high]| u32::from_le_bytes([low, middle, high, 0]) * 2);
    let size = read_sides([w0, w1, w2, h0, h1, h2]);
    if left + size.0 > canvas.0 || top + size.1 > canvas.1 {
        return Err(ImageFault::Undecodable("it holds a frame that lies outside of the picture".into()));
    }
    let data = start + 24;
    let (mut kind, next) = take_chunk(reader, data).map_err(eof)?;
    if &kind == b"ALPH" {
        skip_to(reader, next).map_err(eof)?;
        (kind, _) = take_chunk(reader, next).map_err(eof)?;
    }
    let (found, _) = read_frame_head(reader, kind).map_err(eof)?.ok_or_else(no_picture)?;
    check_frame_size(found, size)?;
    Ok(Frame { start: data as usize, end: end as usize, left, top, size })
}

fn no_picture() -> ImageFault {
    ImageFault::Undecodable("the WebP holds no picture".into())
}

fn check_frame_size(found: (u32, u32), promised: (u32, u32)) -> Result<(), ImageFault> {
    if found == promised {
        return Ok(());
    }
    let ((width, height), (old_width, old_height)) = (found, promised);
    Err(ImageFault::Undecodable(format!(
        "it holds a frame of {width}x{height} pixels where its header says {old_width}x{old_height}"
    )))
}

/// The kind of the chunk that begins at `at`, where the reader stands, and where the next one begins.
fn take_chunk(reader: &mut impl BufRead, at: u64) -> io::Result<([u8; 4], u64)> {
    let [k0, k1, k2, k3, l0, l1, l2, l3] = take(reader)?;
    let len = u64::from(u32::from_le_bytes([l0, l1, l2, l3]));
    Ok(([k0, k1, k2, k3], at + 8 + len + len % 2))
}

/// (width, height), each one less than it is and of three bytes.
fn read_sides([w0, w1, w2, h0, h1, h2]: [u8; 6]) -> (u32, u32) {
    (u32::from_le_bytes([w0, w1, w2, 0]) + 1, u32::from_le_bytes([h0, h1, h2, 0]) + 1)
}

/// Size and whether there is alpha, by the head of the pixels; `None` when the chunk holds something else.
fn read_frame_head(reader: &mut impl BufRead, kind: [u8; 4]) -> io::Result<Option<((u32, u32), bool)>> {
    Ok(match &kind {
        b"VP8 " => {
            let [.., w0, w1, h0, h1] = take::<10>(reader)?;
            let side = |low, high| u32::from(u16::from_le_bytes([low, high]) & 0x3fff);
            Some(((side(w0, w1), side(h0, h1)), false))
        }
        b"VP8L" => {
            let [_, bits @ ..] = take::<5>(reader)?;
            let bits = u32::from_le_bytes(bits);
            Some((((bits & 0x3fff) + 1, (bits >> 14 & 0x3fff) + 1), bits >> 28 & 1 == 1))
        }
        _ => None,
    })
}
