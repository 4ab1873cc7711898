//! RGB8 pixels to the Qwen-VL layout: which size an image gets, and its normalised patches in order.

/// Sides further apart than this are refused, as the reference `smart_resize` does.
const MAX_ASPECT: f64 = 200.0;

/// Area in pixels that a resized image must have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    pub min_pixels: u64,
    pub max_pixels: u64,
}

/// How pixels are cut into patches and normalised.
#[derive(Debug, Clone)]
pub struct Layout {
    pub patch: usize,
    pub merge: usize,
    pub temporal: usize,
    /// Per channel, the normalised value of each byte.
    tables: Box<[[f32; 256]; 3]>,
}

impl Layout {
    #[must_use]
    pub fn new(patch: usize, merge: usize, temporal: usize, mean: [f64; 3], std: [f64; 3]) -> Self {
        let mut tables = Box::new([[0.0; 256]; 3]);
        for (channel, table) in tables.iter_mut().enumerate() {
            // The order of operations of the torchvision backend, each rounded to f32: the mean and the
            // deviation are scaled by 255, then subtract, then divide.
            let (mean, std) = (mean[channel] as f32 * 255.0, std[channel] as f32 * 255.0);
            for (byte, value) in table.iter_mut().enumerate() {
                *value = (byte as f32 - mean) / std;
            }
        }
        Self { patch, merge, temporal, tables }
    }

    /// Values in one patch: channels x temporal copies x pixels.
    #[must_use]
    pub fn features(&self) -> usize {
        3 * self.temporal * self.patch * self.patch
    }

    /// (rows, columns) of patches of an image of this size.
    #[must_use]
    pub fn grid(&self, width: u32, height: u32) -> (usize, usize) {
        (height as usize / self.patch, width as usize / self.patch)
    }

    /// The size an image is resized to, or `None` when its sides are over 200 to 1.
    ///
    /// Both sides become multiples of `patch * merge`; the area goes into `budget`, the aspect ratio stays about
    /// the same. Floats and half-to-even rounding as in the reference, so that grids never differ by one.
    #[must_use]
    pub fn smart_resize(&self, width: u32, height: u32, budget: Budget) -> Option<(u32, u32)> {
        let factor = (self.patch * self.merge) as f64;
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

    /// Writes the patches of `pixels` (rows of `width` RGB) into `out`, `[patches, features]`.
    ///
    /// Patches go by merge block (rows of blocks, blocks, then rows and columns inside a block); a patch is
    /// `[channel, temporal copy, row, column]`.
    pub fn write_patches(&self, pixels: &[u8], width: u32, height: u32, out: &mut [f32]) {
        let (rows, columns) = self.grid(width, height);
        debug_assert_eq!(out.len(), rows * columns * self.features());
        let line = width as usize * 3;
        let mut patches = out.chunks_exact_mut(self.features());
        for block_row in (0..rows).step_by(self.merge) {
            for block_column in (0..columns).step_by(self.merge) {
                for row in block_row..block_row + self.merge {
                    for column in block_column..block_column + self.merge {
                        let Some(patch) = patches.next() else { return };
                        let start = row * self.patch * line + column * self.patch * 3;
                        self.write_patch(&pixels[start..], line, patch);
                    }
                }
            }
        }
    }

    fn write_patch(&self, pixels: &[u8], line: usize, out: &mut [f32]) {
        let area = self.patch * self.patch;
        let (red, rest) = out.split_at_mut(self.temporal * area);
        let (green, blue) = rest.split_at_mut(self.temporal * area);
        let [red_table, green_table, blue_table] = &*self.tables;
        for y in 0..self.patch {
            let source = pixels[y * line..][..self.patch * 3].chunks_exact(3);
            let at = y * self.patch..(y + 1) * self.patch;
            let targets = red[at.clone()].iter_mut().zip(&mut green[at.clone()]).zip(&mut blue[at]);
            for (pixel, ((r, g), b)) in source.zip(targets) {
                *r = red_table[usize::from(pixel[0])];
                *g = green_table[usize::from(pixel[1])];
                *b = blue_table[usize::from(pixel[2])];
            }
        }
        for channel in [red, green, blue] {
            for copy in 1..self.temporal {
                channel.copy_within(..area, copy * area);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_follow_the_reference() {
        // Expected values: transformers 5.23, models/qwen2_vl/image_processing_qwen2_vl.py.
        let layout = Layout::new(14, 2, 2, [0.5; 3], [0.5; 3]);
        let budget = Budget { min_pixels: 3136, max_pixels: 1_003_520 };
        let table = [
            ((100, 1), Some((560, 28))), // rounds to zero first, then grows
            ((42, 70), Some((56, 56))),  // 1.5 and 2.5: both go to the even 2
            ((4032, 3024), Some((1148, 840))),
            ((200, 1), Some((812, 28))),
            ((201, 1), None),
        ];
        for ((width, height), expected) in table {
            assert_eq!(layout.smart_resize(width, height, budget), expected, "{width}x{height}");
        }
    }

    #[test]
    fn patches_go_by_merge_block_and_repeat_in_time() {
        let layout = Layout::new(1, 2, 2, [0.0; 3], [1.0 / 255.0; 3]);
        // 4x2 pixels of value 0..8; blocks of 2x2.
        let pixels: Vec<u8> = (0..8).flat_map(|v| [v, v + 10, v + 20]).collect();
        let mut out = vec![f32::NAN; 8 * layout.features()];
        layout.write_patches(&pixels, 4, 2, &mut out);
        let first: Vec<f32> = out.iter().step_by(6).map(|v| v.round()).collect();
        assert_eq!(first, [0.0, 1.0, 4.0, 5.0, 2.0, 3.0, 6.0, 7.0]);
        let patch: Vec<f32> = out[..6].iter().map(|v| v.round()).collect();
        assert_eq!(patch, [0.0, 0.0, 10.0, 10.0, 20.0, 20.0]);
    }
}
