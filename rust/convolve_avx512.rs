//! The passes of `convolve` with AVX-512 (VBMI and VNNI): the same bytes, four pixels at a time.
#![expect(unsafe_code, reason = "SIMD loads and stores by pointer, and code that only some processors have")]

use std::arch::x86_64::{
    __m128i, __m512i, _mm_cvtsi32_si128, _mm_extract_epi32, _mm_loadu_si128, _mm_setr_epi8, _mm_shuffle_epi8,
    _mm_storeu_si128, _mm512_add_epi32, _mm512_broadcast_i32x4, _mm512_cvtusepi32_epi8, _mm512_dpwssd_epi32,
    _mm512_loadu_si512, _mm512_maskz_permutexvar_epi8, _mm512_max_epi32, _mm512_packs_epi32, _mm512_packus_epi16,
    _mm512_set1_epi32, _mm512_setzero_si512, _mm512_slli_epi32, _mm512_sra_epi32, _mm512_storeu_si512,
    _mm512_unpackhi_epi8, _mm512_unpackhi_epi32, _mm512_unpackhi_epi64, _mm512_unpacklo_epi8,
    _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
};

use crate::convolve::{BLOCK, check_vertical, pair};
use crate::errors::{ImageFault, allocate};
use crate::rgb::BYTES;
use crate::weights::{LOW_BITS, Span, Weights};

/// Bytes of a vector.
const VECTOR: usize = 64;
/// 32-bit lanes of each channel.
const LANES: usize = 4;

/// That this processor has AVX-512 with byte shuffles and 16-bit products.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Avx512(());

impl Avx512 {
    pub fn detect() -> Option<Self> {
        let found = std::is_x86_feature_detected!("avx512f")
            && std::is_x86_feature_detected!("avx512bw")
            && std::is_x86_feature_detected!("avx512vbmi")
            && std::is_x86_feature_detected!("avx512vnni")
            && std::is_x86_feature_detected!("sse4.1");
        found.then_some(Self(()))
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
        // SAFETY: an `Avx512` is made only where the processor has it; the lengths were checked just now.
        unsafe {
            if weights.low().is_empty() {
                pass_vertical::<false>(ring, starts, weights, index, target);
            } else {
                pass_vertical::<true>(ring, starts, weights, index, target);
            }
        }
    }
}

/// The weights of a horizontal pass in the order in which it multiplies.
///
/// A shuffle brings two neighbouring input pixels side by side, channel by channel: each 32-bit lane takes a pair of
/// them. The four lanes of a channel are the sums of four output pixels, as long as these begin in one vector; a step
/// then goes on by a pair. Where the picture shrinks more, they are four parts of the sum of one output pixel, and a
/// step goes on by four pairs.
#[derive(Debug)]
pub struct Lanes {
    avx512: Avx512,
    /// Whether each lane is an output pixel of its own.
    spread: bool,
    groups: Vec<Group>,
    /// How often a group multiplies.
    steps: usize,
    /// For each group and step: the pair of weights of each lane.
    high: Vec<[i16; 2 * LANES]>,
    /// As long as the high plane, or empty.
    low: Vec<[i16; 2 * LANES]>,
    shift: u32,
    source_bytes: usize,
}

/// What is made together: its first input pixel, and the places from there on of the first pair of each lane.
#[derive(Debug, Clone, Copy)]
struct Group {
    start: usize,
    shuffle: [u8; VECTOR],
}

impl Lanes {
    pub fn new(weights: &Weights, avx512: Avx512) -> Result<Self, ImageFault> {
        let begin_in_one_vector = |spans: &[Span]| {
            let first = |index: usize| spans[index].first;
            (first(spans.len() - 1) - first(0) + 2) * BYTES <= VECTOR
        };
        let spread = weights.spans().chunks(LANES).all(begin_in_one_vector);
        let (pixels, step) = if spread { (LANES, 2) } else { (1, 2 * LANES) };
        let steps = weights.most_taps().div_ceil(step).max(1);
        let count = weights.spans().len().div_ceil(pixels);
        let size = count.saturating_mul(steps);
        let mut high: Vec<[i16; 2 * LANES]> = allocate(size)?;
        let mut low: Vec<[i16; 2 * LANES]> = allocate(if weights.low().is_empty() { 0 } else { size })?;
        let mut groups = Vec::new();
        groups.try_reserve_exact(count).map_err(|_| ImageFault::OutOfMemory(size))?;
        // No further right than that all steps lie in the row.
        let last = weights.input().saturating_sub(steps * step);
        for (group, spans) in weights.spans().chunks(pixels).enumerate() {
            let start = spans[0].first.min(last);
            let mut shuffle = [0; VECTOR];
            for lane in 0..LANES {
                let pixel = if spread { lane.min(spans.len() - 1) } else { 0 };
                let first = spans[pixel].first.min(last) - start + if spread { 0 } else { 2 * lane };
                for channel in 0..BYTES {
                    let at = (channel * LANES + lane) * 4;
                    shuffle[at] = (first * BYTES + channel) as u8;
                    shuffle[at + 2] = ((first + 1) * BYTES + channel) as u8;
                }
            }
            for (pixel, span) in spans.iter().enumerate() {
                let skipped = span.first - span.first.min(last);
                for (tap, from) in (skipped..).zip(weights.taps(group * pixels + pixel)) {
                    let to = (group * steps + tap / step, 2 * pixel + tap % step);
                    high[to.0][to.1] = weights.high()[from];
                    if let Some(&weight) = weights.low().get(from) {
                        low[to.0][to.1] = weight;
                    }
                }
            }
            groups.push(Group { start, shuffle });
        }
        let source_bytes = weights.input().max(steps * step) * BYTES + VECTOR;
        let shift = weights.shift();
        Ok(Self { avx512, spread, groups, steps, high, low, shift, source_bytes })
    }

    pub fn source_bytes(&self) -> usize {
        self.source_bytes
    }

    pub fn target_bytes(&self) -> usize {
        self.groups.len() * if self.spread { LANES * BYTES } else { BYTES } + 4
    }

    pub fn pass<const ROWS: usize>(&self, sources: [&[u8]; ROWS], targets: [&mut [u8]; ROWS]) {
        let Avx512(()) = self.avx512;
        assert!(sources.iter().all(|source| source.len() >= self.source_bytes()));
        assert!(targets.iter().all(|target| target.len() >= self.target_bytes()));
        // SAFETY: an `Avx512` is made only where the processor has it; the lengths were checked just now.
        unsafe {
            match (self.low.is_empty(), self.spread) {
                (true, true) => pass_horizontal::<ROWS, false, true>(self, sources, targets),
                (true, false) => pass_horizontal::<ROWS, false, false>(self, sources, targets),
                (false, true) => pass_horizontal::<ROWS, true, true>(self, sources, targets),
                (false, false) => pass_horizontal::<ROWS, true, false>(self, sources, targets),
            }
        }
    }
}

/// # Safety
/// Each of `sources` has `source_bytes()`, each of `targets` `target_bytes()`, and `SPREAD` is as in `lanes`.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512vnni,sse4.1")]
unsafe fn pass_horizontal<const ROWS: usize, const SPLIT: bool, const SPREAD: bool>(
    lanes: &Lanes,
    sources: [&[u8]; ROWS],
    targets: [&mut [u8]; ROWS],
) {
    // The high byte of each 16-bit half is zero, and so is the fourth channel.
    const USED: u64 = 0x0000_5555_5555_5555;
    let step = if SPREAD { 2 } else { 2 * LANES };
    let rounding = Rounding::new(lanes.shift);
    let sources = sources.map(<[u8]>::as_ptr);
    let targets = targets.map(<[u8]>::as_mut_ptr);
    for (index, group) in lanes.groups.iter().enumerate() {
        let weights = index * lanes.steps..(index + 1) * lanes.steps;
        let low = if SPLIT { &lanes.low[weights.clone()] } else { &[] };
        let mut high_sums = [_mm512_setzero_si512(); ROWS];
        let mut low_sums = [_mm512_setzero_si512(); ROWS];
        // SAFETY: an array of a vector's size.
        let shuffle = unsafe { _mm512_loadu_si512(group.shuffle.as_ptr().cast()) };
        for (at, high) in lanes.high[weights].iter().enumerate() {
            let high = broadcast(high);
            let low = if SPLIT { broadcast(&low[at]) } else { high };
            for row in 0..ROWS {
                // SAFETY: `start` is 0, or so far from the input's end that all steps begin before that; a vector
                // more is in `source_bytes()`.
                let bytes =
                    unsafe { _mm512_loadu_si512(sources[row].add((group.start + at * step) * BYTES).cast()) };
                let values = _mm512_maskz_permutexvar_epi8(USED, shuffle, bytes);
                high_sums[row] = _mm512_dpwssd_epi32(high_sums[row], values, high);
                if SPLIT {
                    low_sums[row] = _mm512_dpwssd_epi32(low_sums[row], values, low);
                }
            }
        }
        let sums: [__m512i; ROWS] =
            std::array::from_fn(
                |row| {
                    if SPLIT { join_planes(high_sums[row], low_sums[row]) } else { high_sums[row] }
                },
            );
        if SPREAD {
            let pixels_first = _mm_setr_epi8(0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11, -1, -1, -1, -1);
            for row in 0..ROWS {
                let pixels = _mm_shuffle_epi8(rounding.to_bytes(sums[row]), pixels_first);
                // SAFETY: the 16 bytes end 4 after the group's pixels, in `target_bytes()`.
                unsafe { _mm_storeu_si128(targets[row].add(index * LANES * BYTES).cast(), pixels) };
            }
        } else {
            let rows_first = _mm_setr_epi8(0, 4, 8, -1, 1, 5, 9, -1, 2, 6, 10, -1, 3, 7, 11, -1);
            let sums = add_lanes(std::array::from_fn(|row| sums[row.min(ROWS - 1)]));
            let pixels = _mm_shuffle_epi8(rounding.to_bytes(sums), rows_first);
            let pixels = [
                _mm_extract_epi32::<0>(pixels),
                _mm_extract_epi32::<1>(pixels),
                _mm_extract_epi32::<2>(pixels),
                _mm_extract_epi32::<3>(pixels),
            ];
            for row in 0..ROWS {
                // SAFETY: four bytes from the pixel on are in `target_bytes()`. The next pixel overwrites the fourth.
                unsafe { targets[row].add(index * BYTES).cast::<i32>().write_unaligned(pixels[row]) };
            }
        }
    }
}

/// The sum of a channel's lanes, for each channel: that of the first vector in its first lane, and so on.
#[inline]
#[target_feature(enable = "avx512f")]
fn add_lanes([a, b, c, d]: [__m512i; LANES]) -> __m512i {
    let first = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    let second = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    _mm512_add_epi32(_mm512_unpacklo_epi64(first, second), _mm512_unpackhi_epi64(first, second))
}

/// The pairs of weights of a channel's lanes, for each channel.
#[inline]
#[target_feature(enable = "avx512f")]
fn broadcast(weights: &[i16; 2 * LANES]) -> __m512i {
    // SAFETY: 16 bytes are there.
    _mm512_broadcast_i32x4(unsafe { _mm_loadu_si128(weights.as_ptr().cast()) })
}

/// # Safety
/// There is a start for each tap of span `index`, `target` is a multiple of `BLOCK` long, and so many bytes from each
/// start on are in `ring`.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn pass_vertical<const SPLIT: bool>(
    ring: &[u8],
    starts: &[usize],
    weights: &Weights,
    index: usize,
    target: &mut [u8],
) {
    const { assert!(BLOCK == VECTOR) };
    let rounding = Rounding::new(weights.shift());
    let taps = weights.taps(index);
    let high = &weights.high()[taps.clone()];
    let low = if SPLIT { &weights.low()[taps] } else { high };
    let (start_pairs, start_rest) = starts.as_chunks::<2>();
    let (high_pairs, high_rest) = high.as_chunks::<2>();
    let (low_pairs, low_rest) = low.as_chunks::<2>();
    let ring = ring.as_ptr();
    for (block, target) in target.chunks_exact_mut(BLOCK).enumerate() {
        let mut high_sums = [_mm512_setzero_si512(); 4];
        let mut low_sums = [_mm512_setzero_si512(); 4];
        let mut add_rows = |starts: [usize; 2], high: [i16; 2], low: [i16; 2]| {
            let (high, low) = (_mm512_set1_epi32(pair(high)), _mm512_set1_epi32(pair(low)));
            let [upper, lower] = starts.map(|start| {
                // SAFETY: the block is inside of `target.len()` bytes from the start on.
                unsafe { _mm512_loadu_si512(ring.add(start + block * BLOCK).cast()) }
            });
            for (part, values) in interleave(upper, lower).into_iter().enumerate() {
                high_sums[part] = _mm512_dpwssd_epi32(high_sums[part], values, high);
                if SPLIT {
                    low_sums[part] = _mm512_dpwssd_epi32(low_sums[part], values, low);
                }
            }
        };
        for ((&starts, &high), &low) in start_pairs.iter().zip(high_pairs).zip(low_pairs) {
            add_rows(starts, high, low);
        }
        if let (&[start], &[high], &[low]) = (start_rest, high_rest, low_rest) {
            add_rows([start; 2], [high, 0], [low, 0]);
        }
        let sums: [__m512i; 4] = std::array::from_fn(|part| {
            rounding.cut(if SPLIT { join_planes(high_sums[part], low_sums[part]) } else { high_sums[part] })
        });
        let bytes =
            _mm512_packus_epi16(_mm512_packs_epi32(sums[0], sums[1]), _mm512_packs_epi32(sums[2], sums[3]));
        // SAFETY: the chunk is a vector long.
        unsafe { _mm512_storeu_si512(target.as_mut_ptr().cast(), bytes) };
    }
}

/// Bytes of two rows to pairs of i16, in the order that packing them again undoes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn interleave(upper: __m512i, lower: __m512i) -> [__m512i; 4] {
    let zero = _mm512_setzero_si512();
    let (first, second) = (_mm512_unpacklo_epi8(upper, lower), _mm512_unpackhi_epi8(upper, lower));
    [
        _mm512_unpacklo_epi8(first, zero),
        _mm512_unpackhi_epi8(first, zero),
        _mm512_unpacklo_epi8(second, zero),
        _mm512_unpackhi_epi8(second, zero),
    ]
}

/// The whole sum; bits that run over on the way cancel out, as it fits in an i32.
#[inline]
#[target_feature(enable = "avx512f")]
fn join_planes(high: __m512i, low: __m512i) -> __m512i {
    _mm512_add_epi32(_mm512_slli_epi32::<LOW_BITS>(high), low)
}

/// Takes the bits after the point away, half up.
#[derive(Clone, Copy)]
struct Rounding {
    half: __m512i,
    bits: __m128i,
}

impl Rounding {
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn new(shift: u32) -> Self {
        Self { half: _mm512_set1_epi32(1 << (shift - 1)), bits: _mm_cvtsi32_si128(shift as i32) }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn cut(self, sums: __m512i) -> __m512i {
        _mm512_sra_epi32(_mm512_add_epi32(sums, self.half), self.bits)
    }

    /// To bytes, clipped.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn to_bytes(self, sums: __m512i) -> __m128i {
        // The conversion takes its input as unsigned: negative sums are cut off before.
        _mm512_cvtusepi32_epi8(_mm512_max_epi32(self.cut(sums), _mm512_setzero_si512()))
    }
}
