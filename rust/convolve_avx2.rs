//! The passes of `convolve` with AVX2: the same bytes, sixteen products an instruction.
#![expect(unsafe_code, reason = "SIMD loads and stores by pointer, and code that only some processors have")]

use std::arch::x86_64::{
    __m128i, __m256i, _mm_cvtsi32_si128, _mm_extract_epi32, _mm_loadu_si128, _mm_unpacklo_epi16, _mm256_add_epi32,
    _mm256_broadcastsi128_si256, _mm256_castsi256_si128, _mm256_extracti128_si256, _mm256_hadd_epi32,
    _mm256_loadu_si256, _mm256_madd_epi16, _mm256_packs_epi32, _mm256_packus_epi16, _mm256_set1_epi32,
    _mm256_set1_epi64x, _mm256_setr_epi8, _mm256_setzero_si256, _mm256_shuffle_epi8, _mm256_slli_epi32,
    _mm256_sra_epi32, _mm256_storeu_si256, _mm256_unpackhi_epi8, _mm256_unpacklo_epi8,
};

use crate::convolve::{BLOCK, check_vertical, pair};
use crate::rgb::BYTES;
use crate::weights::{CHUNK, LOW_BITS, Weights};

/// That this processor has AVX2.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Avx2(());

impl Avx2 {
    pub fn detect() -> Option<Self> {
        std::is_x86_feature_detected!("avx2").then_some(Self(()))
    }

    pub fn pass_horizontal<const ROWS: usize>(
        Self(()): Self,
        sources: [&[u8]; ROWS],
        weights: &Weights,
        targets: [&mut [u8]; ROWS],
    ) {
        assert!(sources.iter().all(|source| source.len() >= weights.reach() * BYTES + 4));
        assert!(targets.iter().all(|target| target.len() > weights.spans().len() * BYTES));
        // SAFETY: an `Avx2` is made only where the processor has it; the lengths were checked just now.
        unsafe {
            if weights.low().is_empty() {
                pass_horizontal::<ROWS, false>(sources, weights, targets);
            } else {
                pass_horizontal::<ROWS, true>(sources, weights, targets);
            }
        }
    }

    pub fn pass_vertical(
        Self(()): Self,
        ring: &[u8],
        starts: &[usize],
        weights: &Weights,
        index: usize,
        target: &mut [u8],
    ) {
        check_vertical(ring, starts, weights, index, target);
        // SAFETY: an `Avx2` is made only where the processor has it; the lengths were checked just now.
        unsafe {
            if weights.low().is_empty() {
                pass_vertical::<2, false>(ring, starts, weights, index, target);
            } else {
                // Two planes need twice the sums: half as many bytes at a time, or the registers run out.
                pass_vertical::<1, true>(ring, starts, weights, index, target);
            }
        }
    }
}

/// # Safety
/// Each of `sources` has `reach` pixels and 4 bytes, each of `targets` all output pixels and a byte.
#[target_feature(enable = "avx2")]
unsafe fn pass_horizontal<const ROWS: usize, const SPLIT: bool>(
    sources: [&[u8]; ROWS],
    weights: &Weights,
    targets: [&mut [u8]; ROWS],
) {
    // Four pixels to pairs of i16 for the multiplication: red and green in the lower lane, blue in the upper.
    let pairs = _mm256_setr_epi8(
        0, -1, 3, -1, 6, -1, 9, -1, 1, -1, 4, -1, 7, -1, 10, -1, //
        2, -1, 5, -1, 8, -1, 11, -1, -1, -1, -1, -1, -1, -1, -1, -1,
    );
    let rounding = Rounding::new(weights.shift());
    let sources = sources.map(<[u8]>::as_ptr);
    let targets = targets.map(<[u8]>::as_mut_ptr);
    let (mut high, mut low) = (weights.high().as_ptr(), weights.low().as_ptr());
    for (index, span) in weights.spans().iter().enumerate() {
        let mut high_sums = [_mm256_setzero_si256(); ROWS];
        let mut low_sums = [_mm256_setzero_si256(); ROWS];
        for chunk in (0..weights.stored()).step_by(CHUNK) {
            // SAFETY: `stored` weights, a multiple of `CHUNK`, lie in each plane for each span; without a low plane
            // nothing is read of it. The source bytes end at most `(start + stored) * BYTES + 4`, which is
            // there.
            unsafe {
                let high_weights = _mm256_set1_epi64x(high.cast::<i64>().read_unaligned());
                let low_weights =
                    if SPLIT { _mm256_set1_epi64x(low.cast::<i64>().read_unaligned()) } else { high_weights };
                for row in 0..ROWS {
                    let bytes = sources[row].add((span.start + chunk) * BYTES);
                    let pixels = _mm256_broadcastsi128_si256(_mm_loadu_si128(bytes.cast()));
                    let pixels = _mm256_shuffle_epi8(pixels, pairs);
                    high_sums[row] = add_products(high_sums[row], pixels, high_weights);
                    if SPLIT {
                        low_sums[row] = add_products(low_sums[row], pixels, low_weights);
                    }
                }
                high = high.add(CHUNK);
                if SPLIT {
                    low = low.add(CHUNK);
                }
            }
        }
        let sums: [__m256i; 4] = std::array::from_fn(|row| {
            let row = row.min(ROWS - 1);
            if SPLIT { join_planes(high_sums[row], low_sums[row]) } else { high_sums[row] }
        });
        // Red, green of four rows in the lower lane; blue, nothing in the upper.
        let first = rounding.apply(_mm256_hadd_epi32(sums[0], sums[1]));
        let second = rounding.apply(_mm256_hadd_epi32(sums[2], sums[3]));
        let words = _mm256_packs_epi32(first, second);
        let bytes = _mm256_packus_epi16(words, words);
        let pixels = _mm_unpacklo_epi16(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256::<1>(bytes));
        let pixels = [
            _mm_extract_epi32::<0>(pixels),
            _mm_extract_epi32::<1>(pixels),
            _mm_extract_epi32::<2>(pixels),
            _mm_extract_epi32::<3>(pixels),
        ];
        for row in 0..ROWS {
            // SAFETY: four bytes from the pixel on are there. The next pixel overwrites the fourth.
            unsafe { targets[row].add(index * BYTES).cast::<i32>().write_unaligned(pixels[row]) };
        }
    }
}

/// # Safety
/// There is a start for each tap of span `index`, `target` is a multiple of `BLOCK` long, and so many bytes from each
/// start on are in `ring`.
#[target_feature(enable = "avx2")]
unsafe fn pass_vertical<const VECTORS: usize, const SPLIT: bool>(
    ring: &[u8],
    starts: &[usize],
    weights: &Weights,
    index: usize,
    target: &mut [u8],
) {
    const { assert!(BLOCK.is_multiple_of(VECTORS * 32)) };
    let rounding = Rounding::new(weights.shift());
    let taps = weights.taps(index);
    let high = &weights.high()[taps.clone()];
    let low = if SPLIT { &weights.low()[taps] } else { high };
    let ring = ring.as_ptr();
    for (at, target) in (0..target.len()).step_by(VECTORS * 32).zip(target.chunks_exact_mut(VECTORS * 32)) {
        let mut high_sums = [[_mm256_setzero_si256(); 4]; VECTORS];
        let mut low_sums = [[_mm256_setzero_si256(); 4]; VECTORS];
        let mut add_rows = |starts: [usize; 2], high: [i16; 2], low: [i16; 2]| {
            let (high, low) = (_mm256_set1_epi32(pair(high)), _mm256_set1_epi32(pair(low)));
            for vector in 0..VECTORS {
                let [upper, lower] = starts.map(|start| {
                    // SAFETY: `at` and the vector are inside `target.len()` bytes from the start on.
                    unsafe { _mm256_loadu_si256(ring.add(start + at + vector * 32).cast()) }
                });
                for (part, values) in interleave(upper, lower).into_iter().enumerate() {
                    high_sums[vector][part] = add_products(high_sums[vector][part], values, high);
                    if SPLIT {
                        low_sums[vector][part] = add_products(low_sums[vector][part], values, low);
                    }
                }
            }
        };
        let (start_pairs, start_rest) = starts.as_chunks::<2>();
        let (high_pairs, high_rest) = high.as_chunks::<2>();
        let (low_pairs, low_rest) = low.as_chunks::<2>();
        for ((&starts, &high), &low) in start_pairs.iter().zip(high_pairs).zip(low_pairs) {
            add_rows(starts, high, low);
        }
        if let (&[start], &[high], &[low]) = (start_rest, high_rest, low_rest) {
            add_rows([start; 2], [high, 0], [low, 0]);
        }
        for (vector, target) in target.chunks_exact_mut(32).enumerate() {
            let sums: [__m256i; 4] = std::array::from_fn(|part| {
                let high = high_sums[vector][part];
                rounding.apply(if SPLIT { join_planes(high, low_sums[vector][part]) } else { high })
            });
            let bytes =
                _mm256_packus_epi16(_mm256_packs_epi32(sums[0], sums[1]), _mm256_packs_epi32(sums[2], sums[3]));
            // SAFETY: the chunk is 32 bytes long.
            unsafe { _mm256_storeu_si256(target.as_mut_ptr().cast(), bytes) };
        }
    }
}

/// Bytes of two rows to pairs of i16, in the order that packing them again undoes.
#[inline]
#[target_feature(enable = "avx2")]
fn interleave(upper: __m256i, lower: __m256i) -> [__m256i; 4] {
    let zero = _mm256_setzero_si256();
    let (first, second) = (_mm256_unpacklo_epi8(upper, lower), _mm256_unpackhi_epi8(upper, lower));
    [
        _mm256_unpacklo_epi8(first, zero),
        _mm256_unpackhi_epi8(first, zero),
        _mm256_unpacklo_epi8(second, zero),
        _mm256_unpackhi_epi8(second, zero),
    ]
}

#[inline]
#[target_feature(enable = "avx2")]
fn add_products(sums: __m256i, values: __m256i, weights: __m256i) -> __m256i {
    _mm256_add_epi32(sums, _mm256_madd_epi16(values, weights))
}

/// The whole sum; bits that run over on the way cancel out, as it fits in an i32.
#[inline]
#[target_feature(enable = "avx2")]
fn join_planes(high: __m256i, low: __m256i) -> __m256i {
    _mm256_add_epi32(_mm256_slli_epi32::<{ LOW_BITS.cast_signed() }>(high), low)
}

/// Takes the bits after the point away, half up.
#[derive(Clone, Copy)]
struct Rounding {
    half: __m256i,
    shift: __m128i,
}

impl Rounding {
    #[inline]
    #[target_feature(enable = "avx2")]
    fn new(shift: u32) -> Self {
        Self { half: _mm256_set1_epi32(1 << (shift - 1)), shift: _mm_cvtsi32_si128(shift as i32) }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn apply(self, sums: __m256i) -> __m256i {
        _mm256_sra_epi32(_mm256_add_epi32(sums, self.half), self.shift)
    }
}
