//! Eight-bit RGB pixels in memory: a whole image, and a run of rows of one.

use crate::errors::ImageFault;
use crate::geometry::Region;

/// Bytes of one pixel.
pub const BYTES: usize = 3;

/// One decoded image: pixels in rows without gaps, three bytes each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rgb {
    pub width: u32,
    pub height: u32,
    pub pixels: Vec<u8>,
}

impl Rgb {
    /// All rows.
    #[must_use]
    pub fn rows(&self) -> Rows<'_> {
        let width = self.width as usize;
        Rows::new(&self.pixels, width, width * BYTES, self.height as usize)
    }
}

/// Who takes rows as soon as they are there, from top to bottom.
pub type Emit<'e> = &'e mut dyn FnMut(Rows<'_>) -> Result<(), ImageFault>;

/// A run of rows of `width` pixels each, the first bytes of two rows `stride` bytes apart.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    pixels: &'a [u8],
    width: usize,
    stride: usize,
    count: usize,
}

impl<'a> Rows<'a> {
    /// # Panics
    /// When `pixels` ends before the last pixel of the last row, or rows overlap.
    #[must_use]
    pub fn new(pixels: &'a [u8], width: usize, stride: usize, count: usize) -> Self {
        assert!(stride >= width * BYTES && width > 0);
        assert!(count == 0 || pixels.len() >= (count - 1) * stride + width * BYTES);
        Self { pixels, width, stride, count }
    }

    #[must_use]
    pub fn width(&self) -> usize {
        self.width
    }

    #[must_use]
    pub fn count(&self) -> usize {
        self.count
    }

    #[must_use]
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// From the first pixel of the first row on; what lies between rows is not part of them.
    #[must_use]
    pub fn bytes(&self) -> &'a [u8] {
        self.pixels
    }

    /// The bytes of one row.
    #[must_use]
    pub fn row(&self, index: usize) -> &'a [u8] {
        &self.pixels[index * self.stride..][..self.width * BYTES]
    }

    pub fn iter(&self) -> impl Iterator<Item = &'a [u8]> + use<'a> {
        let rows = *self;
        (0..rows.count).map(move |index| rows.row(index))
    }

    /// These rows in runs of `count` of them; the last may be shorter.
    pub fn strips(&self, count: usize) -> impl Iterator<Item = Rows<'a>> + use<'a> {
        let rows = *self;
        (0..rows.count).step_by(count).map(move |first| {
            Self::new(&rows.pixels[first * rows.stride..], rows.width, rows.stride, count.min(rows.count - first))
        })
    }

    /// The part of these rows inside `region`, when the first of them is row `top` of its image.
    #[must_use]
    pub fn window(&self, top: u32, region: Region) -> Option<Rows<'a>> {
        let (top, end) = (top as usize, top as usize + self.count);
        let first = top.max(region.top as usize);
        let last = end.min(region.top as usize + region.height as usize);
        if first >= last {
            return None;
        }
        let at = (first - top) * self.stride + region.left as usize * BYTES;
        Some(Self::new(&self.pixels[at..], region.width as usize, self.stride, last - first))
    }
}
