//! One pass along one axis over RGB8 rows: rows and weights in, rounded and clipped rows out; by the kernel that suits
//! the processor.

#[cfg(target_arch = "x86_64")]
use crate::convolve_avx2::Avx2;
#[cfg(target_arch = "x86_64")]
use crate::convolve_avx512::{Avx512, Lanes};
use crate::errors::ImageFault;
use crate::rgb::BYTES;
use crate::weights::Weights;

/// Bytes after the last pixel that a kernel may write in a target row.
pub const SLACK: usize = 16;
/// Rows that the vertical pass works on are a multiple of this long.
pub const BLOCK: usize = 64;

/// Which code does the passes; all of them give the same bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernel {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
}

impl Kernel {
    /// Those that this processor has, the fastest last.
    pub fn all() -> impl Iterator<Item = Self> {
        #[cfg(target_arch = "x86_64")]
        let more = [Avx2::detect().map(Self::Avx2), Avx512::detect().map(Self::Avx512)];
        #[cfg(not(target_arch = "x86_64"))]
        let more: [Option<Self>; 0] = [];
        std::iter::once(Self::Portable).chain(more.into_iter().flatten())
    }

    /// The fastest one that this processor has.
    #[must_use]
    pub fn detect() -> Self {
        Self::all().last().unwrap_or(Self::Portable)
    }

    /// Makes output row `index`: `starts` says where in `ring` the rows lie that it is made of, top to bottom.
    ///
    /// # Panics
    /// When there is not one start for each tap, `target` is not a multiple of `BLOCK` long, or a row of that length
    /// would end outside of `ring`.
    pub fn pass_vertical(self, ring: &[u8], starts: &[usize], weights: &Weights, index: usize, target: &mut [u8]) {
        match self {
            Self::Portable => pass_vertical(ring, starts, weights, index, target),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(avx2) => Avx2::pass_vertical(avx2, ring, starts, weights, index, target),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(avx512) => Avx512::pass_vertical(avx512, ring, starts, weights, index, target),
        }
    }
}

/// What the kernels rely on in the vertical pass.
#[cfg(target_arch = "x86_64")]
pub(crate) fn check_vertical(ring: &[u8], starts: &[usize], weights: &Weights, index: usize, target: &[u8]) {
    assert!(starts.len() == weights.spans()[index].taps && target.len().is_multiple_of(BLOCK));
    assert!(starts.iter().all(|&start| ring.len().checked_sub(start) >= Some(target.len())));
}

/// The horizontal pass with one set of weights.
#[derive(Debug)]
pub enum Horizontal {
    Portable(Weights),
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2, Weights),
    #[cfg(target_arch = "x86_64")]
    Avx512(Lanes),
}

impl Horizontal {
    pub fn new(weights: Weights, kernel: Kernel) -> Result<Self, ImageFault> {
        Ok(match kernel {
            Kernel::Portable => Self::Portable(weights),
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx2(avx2) => Self::Avx2(avx2, weights),
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx512(avx512) => Self::Avx512(Lanes::new(&weights, avx512)?),
        })
    }

    /// Bytes that it may read of a source row. What lies after the pixels does not matter, but must be there.
    #[must_use]
    pub fn source_bytes(&self) -> usize {
        match self {
            Self::Portable(weights) => weights.reach() * BYTES + 1,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(_, weights) => weights.reach() * BYTES + 4,
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(lanes) => lanes.source_bytes(),
        }
    }

    /// Bytes that it may write to a target row.
    #[must_use]
    pub fn target_bytes(&self) -> usize {
        match self {
            Self::Portable(weights) => weights.spans().len() * BYTES,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(_, weights) => weights.spans().len() * BYTES + 1,
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(lanes) => lanes.target_bytes(),
        }
    }

    /// Resamples each of `sources` along its row into the target of the same index.
    ///
    /// # Panics
    /// When a source is shorter than `source_bytes()`, or a target than `target_bytes()`.
    pub fn pass<const ROWS: usize>(&self, sources: [&[u8]; ROWS], targets: [&mut [u8]; ROWS]) {
        assert!(sources.iter().all(|source| source.len() >= self.source_bytes()));
        assert!(targets.iter().all(|target| target.len() >= self.target_bytes()));
        match self {
            Self::Portable(weights) => {
                for (source, target) in sources.into_iter().zip(targets) {
                    pass_horizontal(source, weights, target);
                }
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(avx2, weights) => Avx2::pass_horizontal(*avx2, sources, weights, targets),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(lanes) => lanes.pass(sources, targets),
        }
    }
}

/// Two weights for a multiplication of pairs.
#[cfg(target_arch = "x86_64")]
#[must_use]
pub(crate) fn pair([first, second]: [i16; 2]) -> i32 {
    i32::from(second) << 16 | i32::from(first.cast_unsigned())
}

/// Rounds half up and clips; `sum` has `shift` bits after the point.
fn finish(sum: i32, shift: u32) -> u8 {
    (sum.wrapping_add(1 << (shift - 1)) >> shift).clamp(0, 255) as u8
}

fn pass_horizontal(source: &[u8], weights: &Weights, target: &mut [u8]) {
    for (index, (span, pixel)) in weights.spans().iter().zip(target.chunks_exact_mut(BYTES)).enumerate() {
        // Four channels, the last one unused: a vector register's worth.
        let mut sums = [0_i32; 4];
        for (tap, weight) in weights.values(index).enumerate() {
            let bytes = &source[(span.first + tap) * BYTES..][..4];
            for (sum, &byte) in sums.iter_mut().zip(bytes) {
                *sum = sum.wrapping_add(i32::from(byte).wrapping_mul(weight));
            }
        }
        pixel.copy_from_slice(&sums.map(|sum| finish(sum, weights.shift()))[..BYTES]);
    }
}

fn pass_vertical(ring: &[u8], starts: &[usize], weights: &Weights, index: usize, target: &mut [u8]) {
    for (block, target) in target.chunks_exact_mut(BLOCK).enumerate() {
        let mut sums = [0_i32; BLOCK];
        for (&start, weight) in starts.iter().zip(weights.values(index)) {
            let bytes = &ring[start + block * BLOCK..][..BLOCK];
            for (sum, &byte) in sums.iter_mut().zip(bytes) {
                *sum = sum.wrapping_add(i32::from(byte).wrapping_mul(weight));
            }
        }
        for (byte, sum) in target.iter_mut().zip(sums) {
            *byte = finish(sum, weights.shift());
        }
    }
}
