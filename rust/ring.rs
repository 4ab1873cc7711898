//! A few rows of a picture in memory, each new one in the place of the oldest; the rows lie so that the kernels of
//! `convolve` may read and write them.

use crate::convolve::{BLOCK, SLACK};
use crate::errors::{ImageFault, allocate};
use crate::rgb::{BYTES, Rows};

#[derive(Debug)]
pub struct Ring {
    bytes: Vec<u8>,
    /// Where the first row lies: at a block's boundary in memory.
    base: usize,
    pitch: usize,
    capacity: usize,
    width: usize,
}

impl Ring {
    /// Room for the last `capacity` rows of `width` pixels; `row_bytes` of each row at least are there.
    pub fn new(width: usize, row_bytes: usize, capacity: usize) -> Result<Self, ImageFault> {
        let wanted = row_bytes.max(width * BYTES + SLACK).next_multiple_of(BLOCK);
        // An odd number of blocks: rows above each other then lie in different sets of the cache.
        let pitch = if (wanted / BLOCK).is_multiple_of(2) { wanted + BLOCK } else { wanted };
        let size = pitch.checked_mul(capacity).and_then(|size| size.checked_add(BLOCK));
        let bytes: Vec<u8> = allocate(size.ok_or(ImageFault::OutOfMemory(usize::MAX))?)?;
        let base = bytes.as_ptr().align_offset(BLOCK).min(BLOCK);
        Ok(Self { bytes, base, pitch, capacity, width })
    }

    #[must_use]
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// All bytes, for the vertical pass; row `index` begins at `start(index)`.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    #[must_use]
    pub fn start(&self, index: usize) -> usize {
        self.base + index % self.capacity * self.pitch
    }

    /// Row `index` with the bytes after its pixels.
    pub fn row_mut(&mut self, index: usize) -> &mut [u8] {
        let start = self.start(index);
        &mut self.bytes[start..][..self.pitch]
    }

    /// The whole blocks that the pixels of row `index` lie in.
    pub fn blocks_mut(&mut self, index: usize) -> &mut [u8] {
        let len = (self.width * BYTES).next_multiple_of(BLOCK);
        &mut self.row_mut(index)[..len]
    }

    /// `ROWS` rows from row `first` on.
    ///
    /// # Panics
    /// When there are more of them than the ring has room for.
    pub fn rows_mut<const ROWS: usize>(&mut self, first: usize) -> [&mut [u8]; ROWS] {
        let ranges = std::array::from_fn(|row| {
            let start = self.start(first + row);
            start..start + self.pitch
        });
        self.bytes.get_disjoint_mut(ranges).expect("the ring has room for the rows of a group")
    }

    /// The rows from 0 to `count`, of a ring that never went round.
    #[must_use]
    pub fn rows(&self, count: usize) -> Rows<'_> {
        Rows::new(&self.bytes[self.base..], self.width, self.pitch, count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newest_row_takes_the_place_of_the_oldest() {
        let mut ring = Ring::new(2, 0, 3).unwrap();
        for index in 0..4 {
            ring.row_mut(index)[..6].fill(index as u8);
        }
        let firsts: Vec<u8> = (1..5).map(|index| ring.bytes()[ring.start(index)]).collect();
        assert_eq!(firsts, [1, 2, 3, 1]);
        assert_eq!(ring.rows(3).iter().map(|row| row[5]).collect::<Vec<_>>(), [3, 1, 2]);
    }

    #[test]
    fn rows_of_a_group_wrap_around() {
        let mut ring = Ring::new(2, 0, 5).unwrap();
        for (value, row) in ring.rows_mut::<4>(3).into_iter().enumerate() {
            row[..6].fill(value as u8 + 3);
        }
        assert_eq!((3..7).map(|index| ring.bytes()[ring.start(index)]).collect::<Vec<_>>(), [3, 4, 5, 6]);
        assert!(ring.start(0).is_multiple_of(BLOCK) || ring.bytes().as_ptr().align_offset(BLOCK) == ring.start(0));
    }
}
