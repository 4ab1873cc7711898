//! The two passes over rows that come one after the other: input rows in, finished rows out, with the rows that are
//! still needed held in between.

use crate::convolve::{Horizontal, Kernel};
use crate::errors::{ImageFault, allocate};
use crate::rgb::{BYTES, Emit, Rows};
use crate::ring::Ring;
use crate::weights::Weights;

/// Rows that go through the horizontal pass together, sharing each load of a weight.
pub const GROUP: usize = 4;

/// Rows waiting to be handed on together.
#[derive(Debug)]
pub struct Batch {
    rows: Ring,
    count: usize,
}

impl Batch {
    pub fn new(width: u32, row_bytes: usize, capacity: usize) -> Result<Self, ImageFault> {
        Ok(Self { rows: Ring::new(width as usize, row_bytes, capacity)?, count: 0 })
    }

    fn make_room(&mut self, count: usize, emit: Emit<'_>) -> Result<(), ImageFault> {
        if self.count + count > self.rows.capacity() { self.hand_on(emit) } else { Ok(()) }
    }

    pub fn hand_on(&mut self, emit: Emit<'_>) -> Result<(), ImageFault> {
        match std::mem::take(&mut self.count) {
            0 => Ok(()),
            count => emit(self.rows.rows(count)),
        }
    }
}

/// The horizontal pass.
#[derive(Debug)]
pub struct Across {
    horizontal: Horizontal,
    /// Copies of rows after which too little of their buffer is left for the kernel.
    copies: Vec<u8>,
}

impl Across {
    pub fn new(horizontal: Horizontal) -> Result<Self, ImageFault> {
        let copies = allocate(horizontal.source_bytes().saturating_mul(GROUP))?;
        Ok(Self { horizontal, copies })
    }

    /// Bytes of a row that need not be copied.
    pub fn source_bytes(&self) -> usize {
        self.horizontal.source_bytes()
    }

    /// The group of `rows` that begins at row `first`, into `finished`.
    pub fn push(
        &mut self,
        rows: Rows<'_>,
        first: usize,
        finished: &mut Batch,
        emit: Emit<'_>,
    ) -> Result<(), ImageFault> {
        let count = GROUP.min(rows.count() - first);
        finished.make_room(count, emit)?;
        self.pass(rows, first, count, &mut finished.rows, finished.count);
        finished.count += count;
        Ok(())
    }

    /// `count` of `rows` from row `first` on, to `targets` from row `target` on.
    fn pass(&mut self, rows: Rows<'_>, first: usize, count: usize, targets: &mut Ring, target: usize) {
        let len = self.horizontal.source_bytes();
        let whole = |index: usize| rows.bytes().get(index * rows.stride()..)?.get(..len);
        for (copy, index) in self.copies.chunks_exact_mut(len).zip(first..first + count) {
            if whole(index).is_none() {
                copy[..rows.width() * BYTES].copy_from_slice(rows.row(index));
            }
        }
        let source = |row: usize| whole(first + row).unwrap_or_else(|| &self.copies[row * len..(row + 1) * len]);
        if count == GROUP {
            let sources: [&[u8]; GROUP] = std::array::from_fn(source);
            self.horizontal.pass(sources, targets.rows_mut(target));
        } else {
            for row in 0..count {
                self.horizontal.pass([source(row)], [targets.row_mut(target + row)]);
            }
        }
    }
}

/// The vertical pass.
#[derive(Debug)]
pub struct Down {
    weights: Weights,
    kernel: Kernel,
    /// The rows from the first that the next output row is made of.
    ring: Ring,
    seen: usize,
    /// The next output row.
    next: usize,
    /// Where in the ring the rows of that lie.
    starts: Vec<usize>,
}

impl Down {
    pub fn new(weights: Weights, width: u32, kernel: Kernel) -> Result<Self, ImageFault> {
        let taps = weights.most_taps();
        // A group comes in at once, when all but one of the rows of an output row may be there already.
        let ring = Ring::new(width as usize, 0, taps + GROUP)?;
        let mut starts = Vec::new();
        starts.try_reserve_exact(taps).map_err(|_| ImageFault::OutOfMemory(taps))?;
        Ok(Self { weights, kernel, ring, seen: 0, next: 0, starts })
    }

    /// Whether one of the next `count` rows is needed.
    fn wants(&self, count: usize) -> bool {
        self.weights.spans().get(self.next).is_some_and(|span| span.first < self.seen + count)
    }

    pub fn is_finished(&self) -> bool {
        self.next == self.weights.spans().len()
    }

    pub fn push(&mut self, row: &[u8]) {
        if self.wants(1) {
            self.ring.row_mut(self.seen)[..row.len()].copy_from_slice(row);
        }
        self.seen += 1;
    }

    /// The group of `rows` that begins at row `first`, through the horizontal pass before.
    pub fn push_across(&mut self, rows: Rows<'_>, first: usize, across: &mut Across) {
        let count = GROUP.min(rows.count() - first);
        if self.wants(count) {
            across.pass(rows, first, count, &mut self.ring, self.seen);
        }
        self.seen += count;
    }

    /// Makes the output rows all of whose input rows are there.
    pub fn finish_rows(&mut self, finished: &mut Batch, emit: Emit<'_>) -> Result<(), ImageFault> {
        while let Some(span) = self.weights.spans().get(self.next).filter(|span| span.end() <= self.seen) {
            finished.make_room(1, emit)?;
            self.starts.clear();
            self.starts.extend((span.first..span.end()).map(|row| self.ring.start(row)));
            let target = finished.rows.blocks_mut(finished.count);
            self.kernel.pass_vertical(self.ring.bytes(), &self.starts, &self.weights, self.next, target);
            finished.count += 1;
            self.next += 1;
        }
        Ok(())
    }
}
