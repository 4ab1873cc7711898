//! JPEG bytes to the RGB rows of a region, by libjpeg-turbo: bit for bit what Pillow and torchvision give.
#![expect(unsafe_code, reason = "libjpeg-turbo is called through a C shim")]

use std::ffi::{CStr, c_char, c_int, c_long, c_uint};
use std::marker::PhantomData;
use std::ptr::NonNull;

// Nothing of it is named here: it brings the library that the shim calls.
use turbojpeg_sys as _;

use crate::errors::{ImageFault, allocate};
use crate::geometry::Region;
use crate::header::Header;
use crate::orient;
use crate::rgb::{BYTES, Emit, Rows};
use crate::samples::check_same_size;

/// Rows that are handed over at once: they stay in the second cache. Most files are coded by 8 or 16 rows.
const STRIP_ROWS: u32 = 16;
/// More where they become columns: each of these rows ends in another page of memory.
const TRANSPOSED_ROWS: u32 = orient::BLOCK as u32;
/// Pixels that all scans of a JPEG together may go over: more only burn time. Encoders write about ten scans.
const MAX_SCANNED_PIXELS: u64 = 1 << 31;
/// A progressive file's coefficients are held whole: two bytes each, of four components at most.
const MAX_COEFFICIENT_BYTES: u64 = 2 * 4;
/// What libjpeg needs beside the coefficients.
const WORKING_BYTES: u64 = 64 << 20;
/// Bytes of a pixel of four inks.
const INK_BYTES: usize = 4;

/// Hands over the rows of `region`, which is one of the stored picture at 1/`denominator`.
pub fn decode_rows(
    bytes: &[u8],
    header: &Header,
    denominator: u32,
    region: Region,
    emit: Emit<'_>,
) -> Result<(), ImageFault> {
    let (mut reader, inks) = Reader::open(bytes, header)?;
    let found = reader.start(denominator, region)?;
    let (width, row_pixels) = (region.width as usize, found.row_pixels as usize);
    let stride = row_pixels * BYTES;
    let strip_rows = if header.orientation.swaps_sides() { TRANSPOSED_ROWS } else { STRIP_ROWS };
    let mut strip: Vec<u8> = allocate(stride * strip_rows as usize)?;
    let mut ink_strip: Vec<u8> = allocate(if inks { row_pixels * INK_BYTES * strip_rows as usize } else { 0 })?;
    let mut read = |reader: &mut Reader<'_>, strip: &mut [u8], count: u32| {
        if !inks {
            return reader.read(strip, stride, count);
        }
        reader.read(&mut ink_strip, row_pixels * INK_BYTES, count)?;
        convert_inks(&ink_strip, strip);
        Ok(())
    };
    let mut above = region.top - found.top;
    while above > 0 {
        let count = above.min(strip_rows);
        read(&mut reader, &mut strip, count)?;
        above -= count;
    }
    let left = (region.left - found.left) as usize * BYTES;
    let mut rest = region.height;
    while rest > 0 {
        let count = rest.min(strip_rows);
        read(&mut reader, &mut strip, count)?;
        emit(Rows::new(&strip[left..], width, stride, count as usize))?;
        rest -= count;
    }
    if region.top + region.height == found.height { reader.finish() } else { Ok(()) }
}

/// Most scans of a JPEG of this size.
fn scan_limit(header: &Header) -> u32 {
    let pixels = u64::from(header.width) * u64::from(header.height);
    (MAX_SCANNED_PIXELS / pixels).clamp(16, 500) as u32
}

/// Most bytes that libjpeg may ask for at this size, whatever the file says of itself.
fn memory_limit(header: &Header) -> u64 {
    // A block has 8 pixels a side, and four of them at most make a component's part of the coded unit.
    let side = |pixels: u32| u64::from(pixels).next_multiple_of(32);
    side(header.width) * side(header.height) * MAX_COEFFICIENT_BYTES + WORKING_BYTES
}

/// CMYK as JPEG files hold it (inverted, after Adobe) to RGB, rounded as Pillow rounds.
fn convert_inks(inks: &[u8], rgb: &mut [u8]) {
    let apply = |ink: u8, black: u8| {
        let product = u32::from(255 - ink) * u32::from(black) + 128;
        black - (((product >> 8) + product) >> 8) as u8
    };
    for (target, p) in rgb.chunks_exact_mut(BYTES).zip(inks.chunks_exact(INK_BYTES)) {
        target.copy_from_slice(&[apply(p[0], p[3]), apply(p[1], p[3]), apply(p[2], p[3])]);
    }
}

/// The structs and functions of `jpeg_shim.c`; a function gives 0, or the number of a fault.
mod shim {
    use super::{c_char, c_int, c_long, c_uint};

    pub const TRUNCATED: c_int = 2;
    pub const SCANS: c_int = 3;
    pub const MEMORY: c_int = 4;

    #[repr(C)]
    pub struct Jpeg {
        hidden: [u8; 0],
    }

    #[repr(C)]
    #[derive(Default)]
    pub struct Info {
        pub width: c_uint,
        pub height: c_uint,
        pub inks: c_int,
    }

    #[repr(C)]
    pub struct Settings {
        pub denominator: c_int,
        pub max_scans: c_int,
        pub max_memory: c_long,
        pub left: c_uint,
        pub top: c_uint,
        pub right: c_uint,
    }

    #[repr(C)]
    #[derive(Default)]
    pub struct Found {
        pub width: c_uint,
        pub height: c_uint,
        pub left: c_uint,
        pub top: c_uint,
        pub row_pixels: c_uint,
    }

    unsafe extern "C" {
        pub fn imagine_jpeg_new() -> *mut Jpeg;
        pub fn imagine_jpeg_free(jpeg: *mut Jpeg);
        pub fn imagine_jpeg_message(jpeg: *const Jpeg) -> *const c_char;
        pub fn imagine_jpeg_read_header(jpeg: *mut Jpeg, bytes: *const u8, len: usize, info: *mut Info) -> c_int;
        pub fn imagine_jpeg_start(jpeg: *mut Jpeg, settings: *const Settings, found: *mut Found) -> c_int;
        pub fn imagine_jpeg_read(jpeg: *mut Jpeg, target: *mut u8, pitch: usize, count: c_uint) -> c_int;
        pub fn imagine_jpeg_finish(jpeg: *mut Jpeg) -> c_int;
    }
}

/// A file being decoded, whose bytes it points into. After a fault it is good for nothing but being dropped.
struct Reader<'a> {
    jpeg: NonNull<shim::Jpeg>,
    scan_limit: u32,
    header: Header,
    row_pixels: usize,
    pixel_bytes: usize,
    bytes: PhantomData<&'a [u8]>,
}

impl<'a> Reader<'a> {
    /// Reads the header; also says whether its pixels are of four inks.
    fn open(bytes: &'a [u8], header: &Header) -> Result<(Self, bool), ImageFault> {
        // SAFETY: it takes nothing, and gives a new struct or null.
        let jpeg = NonNull::new(unsafe { shim::imagine_jpeg_new() }).ok_or(ImageFault::OutOfMemory(1))?;
        let scan_limit = scan_limit(header);
        let mut reader =
            Self { jpeg, scan_limit, header: *header, row_pixels: 0, pixel_bytes: 0, bytes: PhantomData };
        let mut info = shim::Info::default();
        // SAFETY: `jpeg` is a new struct; `bytes` is as long as told, and outlives the reader by its lifetime.
        let fault =
            unsafe { shim::imagine_jpeg_read_header(jpeg.as_ptr(), bytes.as_ptr(), bytes.len(), &raw mut info) };
        reader.check(fault)?;
        check_same_size((header.width, header.height), (info.width, info.height))?;
        reader.pixel_bytes = if info.inks == 1 { INK_BYTES } else { BYTES };
        Ok((reader, info.inks == 1))
    }

    /// Goes on to `region`; the rows to come begin at it, or as far before it as the coding makes necessary.
    fn start(&mut self, denominator: u32, region: Region) -> Result<shim::Found, ImageFault> {
        let settings = shim::Settings {
            denominator: denominator as c_int,
            max_scans: self.scan_limit as c_int,
            max_memory: c_long::try_from(memory_limit(&self.header)).unwrap_or(c_long::MAX),
            left: region.left,
            top: region.top,
            right: region.left + region.width,
        };
        let mut found = shim::Found::default();
        // SAFETY: the header was read (`open` gives no reader otherwise), and both structs are laid out as in C.
        let fault = unsafe { shim::imagine_jpeg_start(self.jpeg.as_ptr(), &raw const settings, &raw mut found) };
        self.check(fault)?;
        let scaled = |side: u32| side.div_ceil(denominator);
        check_same_size((scaled(self.header.width), scaled(self.header.height)), (found.width, found.height))?;
        let covered = found.left <= region.left
            && found.top <= region.top
            && region.left + region.width <= found.left + found.row_pixels;
        if !covered {
            return Err(ImageFault::Undecodable("the decoder left out pixels that were wanted".into()));
        }
        self.row_pixels = found.row_pixels as usize;
        Ok(found)
    }

    /// Reads the next `count` rows, whose first bytes are `pitch` apart.
    fn read(&mut self, target: &mut [u8], pitch: usize, count: u32) -> Result<(), ImageFault> {
        let row = self.row_pixels * self.pixel_bytes;
        assert!(row > 0 && pitch >= row && target.len() >= pitch * count as usize);
        // SAFETY: `start` has set the length of a row, and `count` of them fit in `target` as just asserted.
        let fault = unsafe { shim::imagine_jpeg_read(self.jpeg.as_ptr(), target.as_mut_ptr(), pitch, count) };
        self.check(fault)
    }

    /// Reads on from the last row to the end marker.
    fn finish(&mut self) -> Result<(), ImageFault> {
        // SAFETY: the struct is alive until `drop`.
        let fault = unsafe { shim::imagine_jpeg_finish(self.jpeg.as_ptr()) };
        self.check(fault)
    }

    fn check(&self, fault: c_int) -> Result<(), ImageFault> {
        if fault == 0 {
            return Ok(());
        }
        // SAFETY: the struct is alive, and its message ends in a zero: it is set before any fault is told.
        let message = unsafe { CStr::from_ptr(shim::imagine_jpeg_message(self.jpeg.as_ptr())) };
        let message = message.to_string_lossy().into_owned();
        Err(match fault {
            shim::TRUNCATED => ImageFault::Truncated(message),
            shim::SCANS => {
                let (Header { width, height, .. }, limit) = (self.header, self.scan_limit);
                ImageFault::Undecodable(format!(
                    "it has more than {limit} scans, the limit at {width}x{height} pixels"
                ))
            }
            shim::MEMORY => ImageFault::OutOfMemory(memory_limit(&self.header) as usize),
            _ => ImageFault::Undecodable(message),
        })
    }
}

impl Drop for Reader<'_> {
    fn drop(&mut self) {
        // SAFETY: the struct came from `imagine_jpeg_new`, and nothing uses it after its only owner.
        unsafe { shim::imagine_jpeg_free(self.jpeg.as_ptr()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::header::Format;
    use orient::Orientation;

    #[test]
    fn inks_follow_the_adobe_convention() {
        // Inverted inks: 255 is no ink, so white; no black value (0) is full black.
        let mut rgb = [1; 9];
        convert_inks(&[255, 255, 255, 255, 9, 9, 9, 0, 0, 255, 128, 200], &mut rgb);
        assert_eq!(rgb, [255, 255, 255, 0, 0, 0, 0, 200, 100]);
    }

    #[test]
    fn larger_pictures_may_have_fewer_scans() {
        for ((width, height), expected) in [((64, 64), 500), ((4000, 3000), 178), ((13_000, 13_000), 16)] {
            let header =
                Header { format: Format::Jpeg, width, height, orientation: Orientation::default(), passes: false };
            assert_eq!(scan_limit(&header), expected, "{width}x{height}");
        }
    }
}
