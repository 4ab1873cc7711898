//! RGB8 rows to square frames `[channel, row, column]`, cut row after row from one picture.

use std::mem::MaybeUninit;

use crate::normalize::{Normalizer, Sample};
use crate::rgb::{BYTES, Rows};

/// Takes the rows of one picture, whose sides are multiples of `side`, and writes its frames.
#[derive(Debug)]
pub struct FrameWriter {
    side: usize,
    /// Of frames, in a row of them.
    columns: usize,
    /// Rows written.
    done: usize,
}

impl FrameWriter {
    #[must_use]
    pub fn new(side: usize, width: u32) -> Self {
        Self { side, columns: width as usize / side, done: 0 }
    }

    /// Frames written so far.
    #[must_use]
    pub fn written(&self) -> usize {
        self.done / self.side * self.columns
    }

    /// Takes the next rows; `out` is all of the picture's `[frames, 3, side, side]`.
    pub fn push<T: Sample>(&mut self, rows: Rows<'_>, normalizer: &Normalizer<T>, out: &mut [MaybeUninit<T>]) {
        let (side, area) = (self.side, self.side * self.side);
        for row in rows.iter() {
            let (frame_row, y) = (self.done / side, self.done % side);
            for column in 0..self.columns {
                let frame = &mut out[(frame_row * self.columns + column) * 3 * area..][..3 * area];
                let (red, rest) = frame.split_at_mut(area);
                let (green, blue) = rest.split_at_mut(area);
                let at = y * side..(y + 1) * side;
                let targets = [&mut red[at.clone()], &mut green[at.clone()], &mut blue[at]];
                let run = &row[column * side * BYTES..];
                normalizer.spread(Rows::new(run, side, side * BYTES, 1), targets);
            }
            self.done += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::normalize::{Scaling, unwritten};
    use crate::weights::Parity;

    #[test]
    fn frames_are_cut_row_after_row() {
        let scaling = Scaling { mean: [0.0; 3], std: [1.0; 3], rescale_factor: 1.0 };
        let normalizer = Normalizer::<u8>::new(scaling, Parity::Torchvision);
        // 4x4 pixels, the red of each its place; frames of 2x2.
        let pixels: Vec<u8> = (0..16).flat_map(|v| [v, v + 100, v + 200]).collect();
        let mut out = vec![0; 4 * 12];
        let mut writer = FrameWriter::new(2, 4);
        writer.push(Rows::new(&pixels, 4, 12, 3), &normalizer, unwritten(&mut out));
        writer.push(Rows::new(&pixels[36..], 4, 12, 1), &normalizer, unwritten(&mut out));
        assert_eq!(out[..12], [0, 1, 4, 5, 100, 101, 104, 105, 200, 201, 204, 205]);
        assert_eq!(out[12..16], [2, 3, 6, 7]);
        assert_eq!(out[24..28], [8, 9, 12, 13]);
        assert_eq!(out[36..40], [10, 11, 14, 15]);
    }
}
