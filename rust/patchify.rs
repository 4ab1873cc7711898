//! RGB8 rows to patches: which size an image gets in the Qwen-VL layout, and its normalised patches in order.

use std::mem::MaybeUninit;

use crate::errors::{ImageFault, allocate};
use crate::normalize::{Normalizer, Sample};
use crate::rgb::{BYTES, Rows};

/// Sides further apart than this are refused, as the reference `smart_resize` does.
const MAX_ASPECT: f64 = 200.0;

/// Area in pixels that a resized image must have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    pub min_pixels: u64,
    pub max_pixels: u64,
}

/// How a picture is cut into patches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patches {
    pub side: usize,
    pub merge: usize,
    /// How often a still is repeated in time.
    pub temporal: usize,
}

impl Patches {
    /// Values in one patch: channels x temporal copies x pixels.
    #[must_use]
    pub fn features(&self) -> usize {
        3 * self.temporal * self.side * self.side
    }

    /// (rows, columns) of patches of a picture of this size.
    #[must_use]
    pub fn grid(&self, width: u32, height: u32) -> (usize, usize) {
        (height as usize / self.side, width as usize / self.side)
    }

    /// The size an image is resized to, or `None` when its sides are over 200 to 1.
    ///
    /// Both sides become multiples of `side * merge`; the area goes into `budget`, the aspect ratio stays about
    /// the same. Floats and half-to-even rounding as in the reference, so that grids never differ by one.
    #[must_use]
    pub fn smart_resize(&self, width: u32, height: u32, budget: Budget) -> Option<(u32, u32)> {
        let factor = (self.side * self.merge) as f64;
        let (w, h) = (f64::from(width), f64::from(height));
        if w.max(h) / w.min(h) > MAX_ASPECT {
            return None;
        }
        let (min_pixels, max_pixels) = (budget.min_pixels as f64, budget.max_pixels as f64);
        let fit = |side: f64| (side / factor).round_ties_even() * factor;
        let (mut out_w, mut out_h) = (fit(w), fit(h));
        if out_w * out_h > max_pixels {
            let shrink = (w * h / max_pixels).sqrt();
            let fit = |side: f64| factor.max((side / shrink / factor).floor() * factor);
            (out_w, out_h) = (fit(w), fit(h));
        } else if out_w * out_h < min_pixels {
            let grow = (min_pixels / (w * h)).sqrt();
            let fit = |side: f64| (side * grow / factor).ceil() * factor;
            (out_w, out_h) = (fit(w), fit(h));
        }
        Some((out_w as u32, out_h as u32))
    }
}

/// Takes the rows of one picture and writes its patches.
///
/// Patches go by merge block (rows of blocks, blocks, then rows and columns inside a block); a patch is
/// `[channel, temporal copy, row, column]`.
#[derive(Debug)]
pub struct PatchWriter {
    patches: Patches,
    /// Of patches, in a row of them.
    columns: usize,
    /// The rows of the patches that are being collected: a patch is then written in one go, one line of memory
    /// after the other.
    strip: Vec<u8>,
    held: usize,
    /// Rows of patches written.
    done: usize,
}

impl PatchWriter {
    pub fn new(patches: Patches, width: u32) -> Result<Self, ImageFault> {
        let columns = width as usize / patches.side;
        let strip = allocate(patches.side * columns * patches.side * BYTES)?;
        Ok(Self { patches, columns, strip, held: 0, done: 0 })
    }

    /// Patches written so far.
    #[must_use]
    pub fn written(&self) -> usize {
        self.done * self.columns
    }

    /// Takes the next rows; `out` is all of the picture's `[patches, features]`.
    pub fn push<T: Sample>(&mut self, rows: Rows<'_>, normalizer: &Normalizer<T>, out: &mut [MaybeUninit<T>]) {
        let line = self.columns * self.patches.side * BYTES;
        for row in rows.iter() {
            self.strip[self.held * line..][..line].copy_from_slice(&row[..line]);
            self.held += 1;
            if self.held == self.patches.side {
                self.write_strip(normalizer, out);
                self.held = 0;
                self.done += 1;
            }
        }
    }

    fn write_strip<T: Sample>(&self, normalizer: &Normalizer<T>, out: &mut [MaybeUninit<T>]) {
        let Patches { side, merge, .. } = self.patches;
        let features = self.patches.features();
        // Of this row of patches: the block row it is in, and where it is in that.
        let (block_row, inner_row) = (self.done / merge, self.done % merge);
        let first = block_row * merge * self.columns;
        for column in 0..self.columns {
            let (block, inner) = (column / merge, column % merge);
            let patch = first + block * merge * merge + inner_row * merge + inner;
            let start = column * side * BYTES;
            self.write_patch(start, normalizer, &mut out[patch * features..][..features]);
        }
    }

    fn write_patch<T: Sample>(&self, start: usize, normalizer: &Normalizer<T>, out: &mut [MaybeUninit<T>]) {
        let Patches { side, temporal, .. } = self.patches;
        let (line, area) = (self.columns * side * BYTES, side * side);
        let (red, rest) = out.split_at_mut(temporal * area);
        let (green, blue) = rest.split_at_mut(temporal * area);
        let block = Rows::new(&self.strip[start..], side, line, side);
        normalizer.spread(block, [red, green, blue]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::normalize::{Scaling, unwritten};
    use crate::weights::Parity;

    #[test]
    fn sizes_follow_the_reference() {
        // Expected values: transformers 5.23, models/qwen2_vl/image_processing_qwen2_vl.py.
        let patches = Patches { side: 14, merge: 2, temporal: 2 };
        let budget = Budget { min_pixels: 3136, max_pixels: 1_003_520 };
        let table = [
            ((100, 1), Some((560, 28))), // rounds to zero first, then grows
            ((42, 70), Some((56, 56))),  // 1.5 and 2.5: both go to the even 2
            ((4032, 3024), Some((1148, 840))),
            ((200, 1), Some((812, 28))),
            ((201, 1), None),
        ];
        for ((width, height), expected) in table {
            assert_eq!(patches.smart_resize(width, height, budget), expected, "{width}x{height}");
        }
    }

    #[test]
    fn patches_go_by_merge_block_and_repeat_in_time() {
        let patches = Patches { side: 1, merge: 2, temporal: 2 };
        let scaling = Scaling { mean: [0.0; 3], std: [1.0 / 255.0; 3], rescale_factor: 1.0 / 255.0 };
        let normalizer = Normalizer::<f32>::new(scaling, Parity::Torchvision);
        // 4x2 pixels of value 0..8; blocks of 2x2.
        let pixels: Vec<u8> = (0..8).flat_map(|v| [v, v + 10, v + 20]).collect();
        let mut out = vec![f32::NAN; 8 * patches.features()];
        let mut writer = PatchWriter::new(patches, 4).unwrap();
        writer.push(Rows::new(&pixels, 4, 12, 2), &normalizer, unwritten(&mut out));
        let first: Vec<f32> = out.iter().step_by(6).map(|v| v.round()).collect();
        assert_eq!(first, [0.0, 1.0, 4.0, 5.0, 2.0, 3.0, 6.0, 7.0]);
        let patch: Vec<f32> = out[..6].iter().map(|v| v.round()).collect();
        assert_eq!(patch, [0.0, 0.0, 10.0, 10.0, 20.0, 20.0]);
    }
}
