//! EXIF orientation: read from a TIFF block, applied to pixels.

use crate::geometry::Region;
use crate::rgb::{BYTES, Rows};

/// Stored rows that are transposed at once: their pixels of one column fill whole lines of the cache.
pub const BLOCK: usize = 64;
/// Side of the square of pixels that is transposed in registers.
const TILE: usize = 4;
const TILE_BYTES: usize = TILE * BYTES;

/// How stored pixels are to be turned for viewing: mirrored along the sides, then transposed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Orientation {
    flip_x: bool,
    flip_y: bool,
    transpose: bool,
}

impl Orientation {
    /// The orientation of an EXIF block; upright when it has none that can be read.
    #[must_use]
    pub fn from_exif(data: &[u8]) -> Self {
        // The head of a JPEG's block, which some writers leave on in PNG and WebP.
        let tiff = data.strip_prefix(b"Exif\0\0").unwrap_or(data);
        let mut reader = exif::Reader::new();
        reader.continue_on_error(true);
        let value = reader
            .read_raw(tiff.to_vec())
            .or_else(|error| error.distill_partial_result(|_| ()))
            .ok()
            .and_then(|data| data.get_field(exif::Tag::Orientation, exif::In::PRIMARY)?.value.get_uint(0));
        Self::from_value(value.unwrap_or(1))
    }

    /// EXIF's values 1 to 8; any other is upright.
    #[must_use]
    pub fn from_value(value: u32) -> Self {
        // Flips are told in the stored frame, before the transposition.
        let (flip_x, flip_y, transpose) = match value {
            2 => (true, false, false),
            3 => (true, true, false),
            4 => (false, true, false),
            5 => (false, false, true),
            6 => (false, true, true),
            7 => (true, true, true),
            8 => (true, false, true),
            _ => (false, false, false),
        };
        Self { flip_x, flip_y, transpose }
    }

    /// Whether width and height trade places.
    #[must_use]
    pub fn swaps_sides(self) -> bool {
        self.transpose
    }

    #[must_use]
    pub fn is_upright(self) -> bool {
        self == Self::default()
    }

    /// Where `region` of the upright picture of `size` (width, height) is stored.
    #[must_use]
    pub fn store_region(self, region: Region, (width, height): (u32, u32)) -> Region {
        let Region { left, top, width: region_width, height: region_height } = region;
        let (mut stored, (stored_width, stored_height)) = if self.transpose {
            (Region { left: top, top: left, width: region_height, height: region_width }, (height, width))
        } else {
            (region, (width, height))
        };
        if self.flip_x {
            stored.left = stored_width - stored.left - stored.width;
        }
        if self.flip_y {
            stored.top = stored_height - stored.top - stored.height;
        }
        stored
    }

    /// Writes stored rows, the first of which is row `top` of `height`, to their places in the upright picture.
    pub fn turn_rows(self, rows: Rows<'_>, top: usize, height: usize, upright: &mut [u8]) {
        let place_row = |row: usize| if self.flip_y { height - 1 - row } else { row };
        let line = if self.transpose { height } else { rows.width() } * BYTES;
        if !self.transpose {
            for (row, source) in rows.iter().enumerate() {
                let target = &mut upright[place_row(top + row) * line..][..line];
                if self.flip_x {
                    let turned = target.chunks_exact_mut(BYTES).zip(source.chunks_exact(BYTES).rev());
                    turned.for_each(|(target, pixel)| target.copy_from_slice(pixel));
                } else {
                    target.copy_from_slice(source);
                }
            }
            return;
        }
        for first in (0..rows.count()).step_by(BLOCK) {
            let count = BLOCK.min(rows.count() - first);
            let left = if self.flip_y { height - top - first - count } else { top + first };
            // The rows that become the columns from `left` on, in that order.
            let mut sources: [&[u8]; BLOCK] = [&[]; BLOCK];
            for (row, source) in sources[..count].iter_mut().enumerate() {
                *source = rows.row(if self.flip_y { first + count - 1 - row } else { first + row });
            }
            let place = |column: usize| {
                let y = if self.flip_x { rows.width() - 1 - column } else { column };
                y * line + left * BYTES
            };
            transpose(&sources[..count], upright, place);
        }
    }
}

/// Writes the pixels of each column of `sources` side by side, from byte `place(column)` on.
fn transpose(sources: &[&[u8]], target: &mut [u8], place: impl Fn(usize) -> usize) {
    let width = sources.first().map_or(0, |source| source.len() / BYTES);
    let mut column = 0;
    while column < width {
        let columns = if column + TILE <= width { TILE } else { 1 };
        let starts: [usize; TILE] = std::array::from_fn(|c| if c < columns { place(column + c) } else { 0 });
        let (tiles, rest) = sources.as_chunks::<TILE>();
        let tiles = if columns == TILE { tiles } else { &[] };
        for (at, tile) in tiles.iter().enumerate() {
            let lines = tile.map(|source| load_pixels(&source[column * BYTES..]));
            for (c, start) in starts.iter().enumerate() {
                let pixel = |line: u128| line >> (24 * c) & 0xff_ffff;
                let [l0, l1, l2, l3] = lines;
                let turned = pixel(l0) | pixel(l1) << 24 | pixel(l2) << 48 | pixel(l3) << 72;
                target[start + at * TILE_BYTES..][..TILE_BYTES]
                    .copy_from_slice(&turned.to_le_bytes()[..TILE_BYTES]);
            }
        }
        let done = tiles.len() * TILE;
        let rest = if columns == TILE { rest } else { sources };
        for (row, source) in rest.iter().enumerate() {
            for (c, start) in starts[..columns].iter().enumerate() {
                target[start + (done + row) * BYTES..][..BYTES]
                    .copy_from_slice(&source[(column + c) * BYTES..][..BYTES]);
            }
        }
        column += columns;
    }
}

/// Four pixels in a number, the first one in its lowest bytes.
fn load_pixels(bytes: &[u8]) -> u128 {
    let mut pixels = [0; size_of::<u128>()];
    pixels[..TILE_BYTES].copy_from_slice(&bytes[..TILE_BYTES]);
    u128::from_le_bytes(pixels)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Turns a stored picture of one byte a pixel, handed over in runs of `run` rows.
    fn turn(value: u32, stored: &[u8], width: usize, run: usize) -> Vec<u8> {
        let orientation = Orientation::from_value(value);
        let rgb: Vec<u8> = stored.iter().flat_map(|&v| [v, v ^ 1, v ^ 2]).collect();
        let height = stored.len() / width;
        let rows = Rows::new(&rgb, width, width * BYTES, height);
        let mut upright = vec![0; rgb.len()];
        for top in (0..height).step_by(run) {
            let part = Region { left: 0, top: top as u32, width: width as u32, height: run as u32 };
            orientation.turn_rows(rows.window(0, part).unwrap(), top, height, &mut upright);
        }
        upright
            .chunks_exact(BYTES)
            .map(|p| {
                assert_eq!([p[0], p[0] ^ 1, p[0] ^ 2], p);
                p[0]
            })
            .collect()
    }

    #[test]
    fn all_eight_orientations_place_every_pixel() {
        // Stored as 3x2:  1 2 3 / 4 5 6.
        let table: [(u32, [u8; 6]); 8] = [
            (1, [1, 2, 3, 4, 5, 6]),
            (2, [3, 2, 1, 6, 5, 4]),
            (3, [6, 5, 4, 3, 2, 1]),
            (4, [4, 5, 6, 1, 2, 3]),
            (5, [1, 4, 2, 5, 3, 6]),
            (6, [4, 1, 5, 2, 6, 3]),
            (7, [6, 3, 5, 2, 4, 1]),
            (8, [3, 6, 2, 5, 1, 4]),
        ];
        for (value, expected) in table {
            for run in [1, 2] {
                assert_eq!(turn(value, &[1, 2, 3, 4, 5, 6], 3, run), expected, "orientation {value}");
            }
        }
    }

    #[test]
    fn pixels_of_every_region_and_run_arrive() {
        let (width, height) = (70_usize, 45_usize);
        let stored: Vec<u8> = (0..width * height).map(|v| (v * 7 + v / 251) as u8).collect();
        for value in 1..=8 {
            let whole = turn(value, &stored, width, height);
            let (w, h) = if value > 4 { (height, width) } else { (width, height) };
            for run in [1, 16, 40] {
                assert_eq!(turn(value, &stored, width, run), whole, "orientation {value}, runs of {run}");
            }
            for (left, top, right, bottom) in
                [(0, 0, w, h), (3, 5, 17, 40), (w - 1, h - 1, w, h), (0, h - 9, 1, h)]
            {
                let region = Region {
                    left: left as u32,
                    top: top as u32,
                    width: (right - left) as u32,
                    height: (bottom - top) as u32,
                };
                let part = Orientation::from_value(value).store_region(region, (w as u32, h as u32));
                let cut: Vec<u8> = (part.top..part.top + part.height)
                    .flat_map(|y| &stored[y as usize * width + part.left as usize..][..part.width as usize])
                    .copied()
                    .collect();
                let expected: Vec<u8> =
                    (top..bottom).flat_map(|y| &whole[y * w + left..y * w + right]).copied().collect();
                assert_eq!(
                    turn(value, &cut, part.width as usize, 16),
                    expected,
                    "orientation {value}, {region:?}"
                );
            }
        }
    }

    #[test]
    fn garbage_is_upright() {
        assert_eq!(Orientation::from_exif(b"MM\0*garbage"), Orientation::default());
    }
}
