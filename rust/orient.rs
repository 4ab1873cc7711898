//! EXIF orientation: read from a TIFF block, applied to pixels.

use crate::errors::{ImageFault, allocate};
use crate::rgb::Rgb;

/// Side of the square in which pixels are turned: its lines of both images stay in the first cache.
const BLOCK: usize = 32;

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

    /// Turns `image` upright; the same image when it is already.
    pub fn apply(self, image: Rgb) -> Result<Rgb, ImageFault> {
        if self == Self::default() {
            return Ok(image);
        }
        let (stored_width, stored_height) = (image.width as usize, image.height as usize);
        let (width, height) =
            if self.transpose { (stored_height, stored_width) } else { (stored_width, stored_height) };
        let mut pixels = allocate(image.pixels.len())?;
        // The stored place of the upright pixel (x, y), and how far on the next one of its line is stored.
        let place = |x: usize, y: usize| {
            let (column, row) = if self.transpose { (y, x) } else { (x, y) };
            let column = if self.flip_x { stored_width - 1 - column } else { column };
            let row = if self.flip_y { stored_height - 1 - row } else { row };
            (row * stored_width + column) * 3
        };
        let (step, back) =
            if self.transpose { (stored_width as isize * 3, self.flip_y) } else { (3, self.flip_x) };
        let step = if back { -step } else { step };
        let span = if self.transpose { BLOCK } else { width };
        for (block_row, lines) in pixels.chunks_mut(width * 3 * BLOCK).enumerate() {
            for left in (0..width).step_by(span) {
                let right = width.min(left + span);
                for (y, line) in lines.chunks_exact_mut(width * 3).enumerate() {
                    let mut at = place(left, block_row * BLOCK + y);
                    for pixel in line[left * 3..right * 3].chunks_exact_mut(3) {
                        pixel.copy_from_slice(&image.pixels[at..at + 3]);
                        at = at.wrapping_add_signed(step);
                    }
                }
            }
        }
        Ok(Rgb { width: width as u32, height: height as u32, pixels })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
            let stored = Rgb { width: 3, height: 2, pixels: (1..=6).flat_map(|v| [v; 3]).collect() };
            let turned = Orientation::from_value(value).apply(stored).unwrap();
            assert_eq!((turned.width, turned.height), if value > 4 { (2, 3) } else { (3, 2) });
            let found: Vec<u8> = turned.pixels.iter().step_by(3).copied().collect();
            assert_eq!(found, expected, "orientation {value}");
        }
    }

    #[test]
    fn pixels_of_every_block_arrive() {
        let (width, height) = (70_u32, 45_u32);
        let pixels = (0..width * height).flat_map(|v| [v as u8, (v >> 8) as u8, 9]).collect();
        let stored = Rgb { width, height, pixels };
        for value in 2..=8 {
            let turned = Orientation::from_value(value).apply(stored.clone()).unwrap();
            for y in 0..turned.height {
                for x in 0..turned.width {
                    let (w, h) = (width - 1, height - 1);
                    let (column, row) = [
                        (w.wrapping_sub(x), y),
                        (w.wrapping_sub(x), h.wrapping_sub(y)),
                        (x, h.wrapping_sub(y)),
                        (y, x),
                        (y, h.wrapping_sub(x)),
                        (w.wrapping_sub(y), h.wrapping_sub(x)),
                        (w.wrapping_sub(y), x),
                    ][value as usize - 2];
                    let at = |image: &Rgb, x, y| {
                        let at = ((y * image.width + x) * 3) as usize;
                        image.pixels[at..at + 3].to_vec()
                    };
                    assert_eq!(at(&turned, x, y), at(&stored, column, row), "orientation {value}, ({x}, {y})");
                }
            }
        }
    }

    #[test]
    fn garbage_is_upright() {
        assert_eq!(Orientation::from_exif(b"MM\0*garbage"), Orientation::default());
    }
}
